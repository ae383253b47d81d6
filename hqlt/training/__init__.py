"""Training."""

from hqlt.stopping import Interrupted
from hqlt.training.config import Curriculum, TrainingConfig
from hqlt.training.loop import Task, evaluate, train
from hqlt.training.parallel import Job, run_parallel

__all__ = ["Curriculum", "Interrupted", "Job", "Task", "TrainingConfig", "evaluate", "run_parallel", "train"]
