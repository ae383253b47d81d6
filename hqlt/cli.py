"""Command line: `hqlt quickstart`, `hqlt bench`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 1 failed, 130 interrupted (progress saved)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.arguments = arguments
    from hqlt.training.loop import Interrupted

    try:
        status: int = options.run(options)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is saved", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"hqlt: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    from hqlt import __version__

    parser = argparse.ArgumentParser(prog="hqlt", description="Hybrid Quadratic-Linear Transformers.")
    parser.add_argument("--version", action="version", version=f"hqlt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "quickstart",
        help="train, compare and look: a few minutes on a CPU, no download",
        description="Train an HQLT and its parents on this interpreter's own documentation and on parity, sample "
        "text, and write a report. Interrupt and repeat at will: finished work is kept.",
    )
    command.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), help="folder of the results (default: %(default)s)"
    )
    command.add_argument("--seed", type=_seed, default=0, help="of weights, batches and sampling (default: 0)")
    command.add_argument("--workers", type=_workers, help="runs at a time (default: one per core)")
    command.set_defaults(run=_quickstart)
    _add_bench(commands)
    return parser


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "bench",
        help="measure speed and memory against what else there is",
        description="Time implementations side by side in one process, in interleaved rounds. One whose result differs "
        "from the reference is not timed. Prints a Markdown table and writes JSON after every case.",
    )
    command.add_argument(
        "suite",
        choices=("ops", "layer", "train", "generate"),
        help="ops: delta rules and window attention; layer: both reads and their blend over sequence lengths; "
        "train: the quick start's models in float32 and bfloat16; generate: one token at a time",
    )
    command.add_argument("--output", type=Path, help="JSON file (default: runs/bench/SUITE.json)")
    command.add_argument("--repeats", type=_count, help="rounds (default: 15; train 200; generate 40)")
    command.add_argument(
        "--seconds", type=_count, help="ops, layer: no round begins after this, but three are run (default: 60)"
    )
    command.add_argument("--threads", type=_workers, help="of torch (default: its own choice)")
    command.add_argument(
        "--keep-freed-memory", dest="keep_memory", action="store_true", help="keep freed memory in the process (glibc)"
    )
    command.add_argument("--lengths", type=_count, nargs="+", help="layer: sequence lengths (2048 4096 8192 16384)")
    command.add_argument("--plot", type=Path, help="layer: SVG file of cost against length")
    command.add_argument("--other", type=Path, help="generate: another checkout of hqlt to measure in the same rounds")
    command.set_defaults(run=_bench)


def _quickstart(options: argparse.Namespace) -> int:
    from hqlt.quickstart import quickstart

    quickstart(options.output, options.seed, options.workers)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from hqlt.bench.suites import bench

    given = {name: x for name, x in vars(options).items() if name not in ("run", "arguments")}
    return 0 if bench(**given, command=shlex.join(["hqlt", *options.arguments])) else 1


def _count(text: str) -> int:
    return _integer(text, 1, 2**24)


def _seed(text: str) -> int:
    return _integer(text, 0, 2**30)


def _workers(text: str) -> int:
    return _integer(text, 1, 1024)


def _integer(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{value} is outside {low} … {high}")
    return value
