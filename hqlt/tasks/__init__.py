"""Tasks: where batches come from."""

from hqlt.tasks.formal import FORMAL_TASKS
from hqlt.tasks.recall import mqar_task, state_based_recall_task
from hqlt.tasks.synthetic import SyntheticTask

TASKS: dict[str, SyntheticTask] = {
    **FORMAL_TASKS,
    "mqar": mqar_task(32, vocab_size=128),
    "mqar_far": mqar_task(16, vocab_size=128, tokens_per_pair=32, power=1.0),
    "mqar_far_2048": mqar_task(16, vocab_size=128, tokens_per_pair=128, power=1.0),
    "state_based_recall": state_based_recall_task(),
}
