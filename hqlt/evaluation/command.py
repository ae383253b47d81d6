"""`hqlt evaluate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `evaluate`."""
    command = commands.add_parser(
        "evaluate",
        help="the paper's evaluation, and recall that separates the memories",
        description="Run tasks of lm-evaluation-harness, and of our own: kv_recall (questions about documents of keys "
        "and values), recall (the same against the distance between fact and question), mqar (associative recall of "
        "tokens), positions (perplexity by position in a text of any length). Finished tasks are kept: repeat the "
        "command to go on.",
    )
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a model or of a run")
    command.add_argument("--tasks", metavar="A,B,…", help="what to run (default: what the preset needs)")
    command.add_argument(
        "--preset", choices=("table2", "table4"), help="a table of the paper, its numbers beside the model's"
    )
    command.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[TASK=]PATH",
        help="local copies in place of the hub, offline: a folder with TASK.jsonl, .json or .parquet in the schema of "
        "the hub or with original distributions, or a file for one task; may be repeated",
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="default: runs/evaluation/NAME OF THE MODEL")
    command.add_argument("--batch-size", type=int, default=16, help="changes no result but by rounding (default: 16)")
    command.add_argument(
        "--limit", type=int, help="the most items of a task (default: all; kv_recall 200, recall 100, mqar 256)"
    )
    command.add_argument(
        "--max-length", type=int, default=2048, help="context of every kind of model, in tokens (default: 2048)"
    )
    command.add_argument("--dtype", default="float32", help="float64, float32 or bfloat16 (default: float32)")
    command.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    command.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    command.add_argument(
        "--lesion",
        default="none",
        metavar="L,…",
        help="conditions, each of which runs all tasks: none, kv or fw (without the read of that memory), gate=G (the "
        "mixer's gate fixed, 1 is FW memory alone)",
    )
    command.add_argument("--threads", type=int, help="of torch")
    command.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    import torch

    from hqlt.evaluation.paper import PRESETS
    from hqlt.evaluation.report import preset_table, results_table, write_report
    from hqlt.evaluation.runs import Evaluation, evaluate
    from hqlt.evaluation.subject import Subject

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    preset = PRESETS[options.preset].tasks if options.preset else ()
    named = tuple(_names(options.tasks or ""))
    if not preset and not named:
        raise ValueError("name what to run: --tasks wikitext,piqa or --preset table2")
    wanted = Evaluation(
        tasks=tuple(dict.fromkeys([*preset, *named])),
        data=_data(options.data),
        lesions=tuple(dict.fromkeys(_names(options.lesion))),
        batch_size=options.batch_size,
        limit=options.limit,
        max_length=options.max_length,
        dtype=options.dtype,
        seed=options.seed,
    )
    subject = Subject.load(options.model, options.dtype, options.device)
    name = _model_name(options.model)
    output = options.output or Path("runs/evaluation") / name
    results, errors = evaluate(subject, wanted, output)
    write_report(subject, wanted, results, errors, output)
    if options.preset:
        print(preset_table(options.preset, name, results), end="\n\n")
    if results:
        print(results_table(results))
    for what, error in errors.items():
        print(f"hqlt: {what} failed: {error}", file=sys.stderr)
    print(f"{len(results)} results in {output / 'results.json'}", file=sys.stderr)
    return 1 if errors else 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _data(given: list[str]) -> dict[str, Path]:
    """Paths by task, under "" that for all others."""
    found: dict[str, Path] = {}
    for text in given:
        task, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            task, path = "", text
        if task in found:
            raise ValueError(f"--data {text}: there is a path for {task or 'all tasks'} already, {found[task]}")
        if not Path(path).exists():
            raise FileNotFoundError(f"--data {text}: there is no {path}")
        found[task] = Path(path)
    return found


def _model_name(folder: Path) -> str:
    """Of a folder; of the model in a run, that of the run."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name
