"""Command line: `hqlt quickstart`, `hqlt data`, `hqlt train`, `hqlt generate`, `hqlt convert` and the others."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hqlt.data.command import add_data
from hqlt.evaluation.command import add_evaluate
from hqlt.stopping import Interrupted
from hqlt.train import add_train

if TYPE_CHECKING:
    from hqlt.speak import Sampling, Speaker


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 1 failed, 130 interrupted (progress saved)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.arguments = arguments
    try:
        status: int = options.run(options)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, FloatingPointError, ImportError) as error:
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
    add_data(commands)
    add_train(commands)
    _add_speech(commands)
    _add_score(commands)
    add_evaluate(commands)
    _add_convert(commands)
    _add_bench(commands)
    _add_doctor(commands)
    return parser


def _add_speech(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a text with a model",
        description="Print a prompt and what the model makes of it, token by token. The folder of the model holds "
        "config.json and model.safetensors, and tokenizer.json unless it reads bytes.",
    )
    generate.add_argument(
        "--prompt",
        help="text to continue (default: standard input); an empty one begins a text, if the tokenizer has a token "
        "for that",
    )
    generate.add_argument("--stats", action="store_true", help="speed and size of the memories, on standard error")
    generate.add_argument("--save-state", type=Path, metavar="FILE", help="write the memories at the end")
    generate.set_defaults(run=_generate)
    chat = commands.add_parser(
        "chat",
        help="continue a text turn by turn",
        description="Type a text and the model goes on; it keeps its memories from turn to turn. /help lists commands.",
    )
    chat.add_argument("--stop", default="\n", help="an answer ends with this text (default: a line break)")
    chat.set_defaults(run=_chat)
    for command in (generate, chat):
        command.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of the model")
        command.add_argument("--state", type=Path, metavar="FILE", help="go on from memories that were saved")
        command.add_argument("--max-new-tokens", type=_count, default=200, help="default: %(default)s")
        command.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
        command.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
        command.add_argument("--seed", type=_seed, default=0, help="of the sampling (default: 0)")
        command.add_argument("--compile", action="store_true", help="compile the step: slow start, fast tokens")
        command.add_argument(
            "--threads", type=_workers, help="of torch (default: one for a small model, which waits for others in vain)"
        )


def _add_score(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "score",
        help="bits per token of a text of any length, in constant memory",
        description="Read a text file as one document and print how well a model predicts it. Interrupt and repeat at "
        "will: with --progress the work done is kept. Memory is constant where every KV memory has a window.",
    )
    command.add_argument("file", type=Path, help="UTF-8 text")
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of the model")
    command.add_argument("--progress", type=Path, metavar="FILE", help="where to keep the work done, and go on from it")
    command.add_argument("--chunk-size", type=_count, default=4096, help="tokens read at a time (default: 4096)")
    command.set_defaults(run=_score)


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "convert",
        help="convert checkpoints from and to the published formats",
        description="A published checkpoint of HQLT, DeltaNet or Transformer++ becomes a model of this library, and a "
        "model of this library becomes a published checkpoint. Of a folder of `hqlt train lm` the newest checkpoint "
        "becomes a model, which transformers reads too.",
    )
    command.add_argument("source", type=Path, help="folder of a model or of a run, or file of weights")
    command.add_argument("target", type=Path, help="new folder")
    command.add_argument("--config", type=Path, help="configuration of a file of weights (default: beside it)")
    command.set_defaults(run=_convert)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "bench",
        help="measure speed and memory against what else there is",
        description="Time implementations side by side in one process, in interleaved rounds. One whose result differs "
        "from the reference is not timed. Prints a Markdown table and writes JSON after every case.",
    )
    command.add_argument(
        "suite",
        choices=("ops", "native", "layer", "train", "generate", "context", "state"),
        help="ops: delta rules and window attention; native: compiled code beside tiles, over sizes of heads and "
        "windows; layer: both reads and their blend over sequence lengths; train: the quick start's models in float32 "
        "and bfloat16; generate: one token at a time; context: one token after contexts of any length; state: memories "
        "kept in fewer bits",
    )
    command.add_argument("--output", type=Path, help="JSON file (default: runs/bench/SUITE.json)")
    command.add_argument("--repeats", type=_count, help="rounds (default: 15; train 200; generate and context 40)")
    command.add_argument(
        "--seconds", type=_count, help="ops, native, layer: no round begins after this, but three are run (default: 60)"
    )
    command.add_argument("--threads", type=_workers, help="of torch (default: its own choice)")
    command.add_argument(
        "--keep-freed-memory", dest="keep_memory", action="store_true", help="keep freed memory in the process (glibc)"
    )
    command.add_argument(
        "--lengths",
        type=_count,
        nargs="+",
        help="layer: of sequences (2048 4096 8192 16384); context: of contexts (1024 16384 262144)",
    )
    command.add_argument("--plot", type=Path, help="layer: SVG file of cost against length")
    command.add_argument("--other", type=Path, help="generate: another checkout of hqlt to measure in the same rounds")
    command.add_argument("--model", type=Path, help="state: folder of a model (default: runs/quickstart/model)")
    command.set_defaults(run=_bench)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "doctor",
        help="what this machine has, and which implementations run on it",
        description="Print versions, the device, and for each op, dtype, head size and schedule what backend='auto' "
        "runs, and why not the other implementations.",
    )
    command.add_argument("--json", action="store_true", help="all of it, for programs")
    command.set_defaults(run=_doctor)


def _quickstart(options: argparse.Namespace) -> int:
    from hqlt.quickstart import quickstart

    quickstart(options.output, options.seed, options.workers)
    return 0


def _speaker(options: argparse.Namespace) -> tuple[Speaker, Sampling]:
    from hqlt.models.generation import check_sampling
    from hqlt.speak import Sampling, Speaker

    check_sampling(options.temperature, options.top_p)
    stop = getattr(options, "stop", None)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed, stop)
    return Speaker(options.model, options.compile, options.state, options.threads), sampling


def _generate(options: argparse.Namespace) -> int:
    from hqlt.speak import generate_text

    speaker, sampling = _speaker(options)
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    generate_text(speaker, prompt, sampling, options.save_state, options.stats)
    return 0


def _chat(options: argparse.Namespace) -> int:
    from hqlt.speak import chat

    with contextlib.suppress(ImportError):  # line editing, where the platform has it
        import readline  # noqa: F401
    speaker, sampling = _speaker(options)
    chat(speaker, sampling, lambda: input("> "))
    return 0


def _score(options: argparse.Namespace) -> int:
    from hqlt.score import score_file

    print(score_file(options.model, options.file, options.progress, options.chunk_size))
    return 0


def _convert(options: argparse.Namespace) -> int:
    from hqlt.models.conversion import convert
    from hqlt.training.export import export_run, is_run

    if is_run(options.source):
        print(export_run(options.source, options.target))
        return 0
    print(convert(options.source, options.target, options.config))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from hqlt.bench.suites import bench

    given = {name: x for name, x in vars(options).items() if name not in ("run", "arguments")}
    return 0 if bench(**given, command=shlex.join(["hqlt", *options.arguments])) else 1


def _doctor(options: argparse.Namespace) -> int:
    from hqlt.doctor import doctor

    print(doctor(options.json))
    return 0


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
