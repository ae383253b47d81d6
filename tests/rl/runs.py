"""A tiny run, also for processes of their own: python -m tests.rl.runs DIRECTORY."""

import sys
from pathlib import Path

import torch

from hqlt import MemoryConfig, ModelConfig
from hqlt.rl.config import AgentConfig, RLRecipe, WorldConfig
from hqlt.training.distributed import World

MEMORY = MemoryConfig(hidden_size=8, num_heads=2, window=3, dropout=0.1)
MODEL = ModelConfig(num_hidden_layers=1, memory=MEMORY, intermediate_size=8, dropout=0.1)
ALONE = World(0, 1, 1, torch.device("cpu"))
TINY = RLRecipe(
    agent=AgentConfig(memory=MODEL, head_sizes=(8,)),
    world=WorldConfig(distractor_steps=3),
    episodes=16,
    random_episodes=6,
    num_envs=5,
    updates_per_step=1 / 32,
    batch_size=4,
    replay_episodes=16,
    evaluate_every=8,
    evaluate_episodes=3,
    seed=3,
)


def main(directory: Path) -> None:
    """Train the tiny recipe, saving after every step."""
    import hqlt.rl.training as training

    torch.set_num_threads(1)
    training.SAVE_EVERY = 0.0
    training.train(TINY, directory, ALONE, silent=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
