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

_PAPER = RLRecipe(agent=AgentConfig(memory=MEMORIES["hqlt"]), episodes=2575)


def _cpu(distractor_steps: int, episodes: int) -> RLRecipe:
    """Episodes side by side, fewer updates for each of them, smaller batches and a faster learner."""
    return replace(
        _PAPER,
        world=WorldConfig(distractor_steps=distractor_steps),
        sac=SACConfig(learning_rate=1e-3),
        episodes=episodes,
        random_episodes=64,
        num_envs=16,
        updates_per_step=1 / 32,
        batch_size=32,
        evaluate_every=320,
        evaluate_episodes=100,
    )


VISUAL_MATCH: dict[str, RLRecipe] = {
    "visual_match_15": _cpu(15, 4000),
    "visual_match_30": _cpu(30, 4000),
    "visual_match_60": _cpu(60, 4000),
    "visual_match_250": _cpu(250, 4000),
    "visual_match_750": _PAPER,
}
"""Recipes by name; the number is that of distractor steps. All share the doors between training and evaluation."""


def visual_match(name: str, memory: str = "hqlt") -> RLRecipe:
    """The recipe of this name with the sequence model of this name.

    The Transformer's embedding passes one dropout in the published runs, that of the others two in series.

    Raises:
        ValueError: no such recipe or model.
    """
    for what, given, known in (("recipe", name, VISUAL_MATCH), ("model", memory, MEMORIES)):
        if given not in known:
            raise ValueError(f"{given!r} is no {what}; choose one of {', '.join(known)}")
    recipe = VISUAL_MATCH[name]
    dropout = 0.1 if memory in ("hqlt", "deltanet") else 0.0
    return replace(recipe, agent=replace(recipe.agent, memory=MEMORIES[memory], dropout=dropout))
