"""Training."""

from hqlt.training.loop import Curriculum, Interrupted, Task, TrainingConfig, evaluate, train
from hqlt.training.parallel import Job, run_parallel

__all__ = ["Curriculum", "Interrupted", "Job", "Task", "TrainingConfig", "evaluate", "run_parallel", "train"]
