"""Evaluation: the paper's tasks through lm-evaluation-harness, and recall that separates the two memories."""
