"""Reinforcement learning under partial observation (paper section 4.4, figure 2): environments, agent, training.

Nothing is imported here: environments and video need the extra ``rl``.
"""
