"""Training."""

from hqlt.training.loop import Interrupted, Task, TrainingConfig, evaluate, train
from hqlt.training.parallel import Job, run_parallel

__all__ = ["Interrupted", "Job", "Task", "TrainingConfig", "evaluate", "run_parallel", "train"]
