"""Recipes of visual match: the paper's (section 4.4, figure 2), and shorter ones for a CPU."""

from __future__ import annotations

from dataclasses import replace

from hqlt.config import MemoryConfig, ModelConfig
from hqlt.rl.config import AgentConfig, LSTMConfig, RLRecipe, SACConfig, WorldConfig

_HQLT = MemoryConfig(hidden_size=100, num_heads=2, window=64, allow_negative_eigenvalues=True, dropout=0.1)
# β of DeltaNet ends at 1 in the published runs, whatever their configuration asks; its weights begin smaller.
_DELTANET = replace(_HQLT, kv_memory=False, window=None, allow_negative_eigenvalues=False)
_ATTENTION = MemoryConfig(
    hidden_size=100, num_heads=2, window=None, update_rule=None, position_encoding="none", bias=True, dropout=0.1
)
MEMORIES: dict[str, ModelConfig | LSTMConfig] = {
    "hqlt": ModelConfig(num_hidden_layers=3, memory=_HQLT, dropout=0.1),
    "deltanet": ModelConfig(num_hidden_layers=3, memory=_DELTANET, dropout=0.1, initializer_range=0.006),
    "transformer": ModelConfig(
        num_hidden_layers=2,
        memory=_ATTENTION,
        mlp="gelu",
        norm="layer",
        norm_eps=1e-5,
        position_embedding="sinusoidal",
        rescale_residual=False,
        dropout=0.1,
    ),
    "lstm": LSTMConfig(hidden_size=100, num_hidden_layers=1),
}
"""The sequence models of the paper, and an LSTM, by name."""


def _small(memory: ModelConfig | LSTMConfig) -> ModelConfig | LSTMConfig:
    """A width of 64, two layers, an MLP of twice the width, no dropout: a fifth of the arithmetic."""
    if isinstance(memory, LSTMConfig):
        return replace(memory, hidden_size=64, dropout=0.0)
    narrow = replace(memory.memories[0], hidden_size=64, dropout=0.0)
    return replace(memory, num_hidden_layers=2, memory=narrow, intermediate_size=128, dropout=0.0)


SMALL_MEMORIES = {name: _small(memory) for name, memory in MEMORIES.items()}
"""The same, smaller, for a CPU."""

_PAPER = RLRecipe(agent=AgentConfig(memory=MEMORIES["hqlt"]), episodes=2575)


def _cpu(distractor_steps: int, episodes: int) -> RLRecipe:
    """A smaller agent, many episodes side by side, fewer updates for each, a faster learner, the reward of Ni et al.

    Without a bound of the gradient, which the published runs do without, DeltaNet loses again what it has learned.
    """
    return RLRecipe(
        agent=AgentConfig(memory=SMALL_MEMORIES["hqlt"], head_sizes=(128, 128), dropout=0.0),
        world=WorldConfig(distractor_steps=distractor_steps, final_reward=10.0),
        sac=SACConfig(learning_rate=1e-3, target_rate=0.02, clip=1.0),
        episodes=episodes,
        random_episodes=512,
        num_envs=64,
        updates_per_step=0.36 / (30 + distractor_steps),
        batch_size=32,
        replay_episodes=4096,
        evaluate_every=1024,
        evaluate_episodes=100,
    )


VISUAL_MATCH: dict[str, RLRecipe] = {
    **{f"visual_match_{steps}": _cpu(steps, 16_384) for steps in (15, 30, 60, 250)},
    "visual_match_750": _PAPER,
}
"""Recipes by name; the number is that of distractor steps. All share the doors between training and evaluation."""


def visual_match(name: str, memory: str = "hqlt") -> RLRecipe:
    """The recipe of this name with the sequence model of this name.

    ``hqlt_window_N`` is the HQLT whose attention sees N frames instead of 64. In the paper's recipe the embedding of
    the Transformer and the LSTM passes one dropout, that of the others two in series.

    Raises:
        ValueError: no such recipe or model.
    """
    if name not in VISUAL_MATCH:
        raise ValueError(f"{name!r} is no recipe; choose one of {', '.join(VISUAL_MATCH)}")
    recipe = VISUAL_MATCH[name]
    if recipe is not _PAPER:
        return replace(recipe, agent=replace(recipe.agent, memory=_named(memory, SMALL_MEMORIES)))
    dropout = 0.1 if memory.startswith(("hqlt", "deltanet")) else 0.0
    return replace(recipe, agent=replace(recipe.agent, memory=_named(memory, MEMORIES), dropout=dropout))


def _named(name: str, memories: dict[str, ModelConfig | LSTMConfig]) -> ModelConfig | LSTMConfig:
    """The sequence model of this name, with the window that the name may end in."""
    if name in memories:
        return memories[name]
    window, hqlt = name.removeprefix("hqlt_window_"), memories["hqlt"]
    if window == name or not window.isdecimal() or not isinstance(hqlt, ModelConfig):
        raise ValueError(f"{name!r} is no model; choose one of {', '.join(memories)}, hqlt_window_N (such as 4)")
    return replace(hqlt, memory=replace(hqlt.memories[0], window=int(window)))
