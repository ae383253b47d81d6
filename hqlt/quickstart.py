"""The quick start: train, compare and look, in a few minutes on a CPU, from nothing but the installed packages."""

from __future__ import annotations

import hashlib
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hqlt.analysis.gates import memory_gates
from hqlt.files import write_jsonl, write_text
from hqlt.machine import available_cores
from hqlt.models.files import save_model
from hqlt.models.generation import generate
from hqlt.models.language_model import LanguageModel
from hqlt.recipes import TextRecipe, quickstart_parity, quickstart_text
from hqlt.tasks.text import ByteCorpus, python_documents
from hqlt.training.loop import Metrics, Task, train
from hqlt.training.parallel import Job, run_parallel
from hqlt.training.synthetic import SyntheticRecipe, synthetic_task

PROMPT = "def read_file(path):\n    "
NATS_PER_BIT = math.log(2)
VALIDATION_WINDOWS = 96


@dataclass(frozen=True)
class Run:
    """A trained model and what was measured while it was trained."""

    name: str
    model: LanguageModel
    rows: list[Metrics]

    @property
    def final(self) -> Metrics:
        """The last measurements."""
        return self.rows[-1]


def quickstart(directory: Path, seed: int = 0, workers: int | None = None) -> Path:
    """Run or finish the quick start; the path of the report.

    Every model is trained in a folder of its own and resumed where it stopped, so an interrupted quick start goes on
    when it is called again, and a finished one only writes its report anew.

    Args:
        directory: receives ``report.html``, ``metrics.jsonl`` and a folder per run.
        seed: of weights, batches and sampling.
        workers: runs at a time, one per core by default.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the progress is saved.
    """
    text, parity = quickstart_text(seed), quickstart_parity(seed)
    workers = workers or available_cores()
    corpus = ByteCorpus.from_documents(python_documents())
    _say(f"Python {platform.python_version()}, torch {torch.__version__}; results go to {directory}")
    _say(f"1. Language: {len(corpus.train) / 1e6:.1f} MB of this interpreter's documentation and library, "
         f"{len(corpus.validation) / 1e6:.1f} MB of other files held out")  # fmt: skip
    names = [("text", name) for name in text.models] + [("parity", name) for name in parity]
    _say(f"2. Parity: is the number of ones odd? Training {len(names)} models, {workers} at a time:")
    run_parallel([Job(name, _train, (task, name, directory, seed)) for task, name in names], workers)
    text_runs = [_finished("text", name, directory, seed, corpus) for name in text.models]
    parity_runs = [_finished("parity", name, directory, seed, corpus) for name in parity]
    hqlt = text_runs[0].model
    save_model(hqlt, directory / "model")
    _say("3. Text from the HQLT model")
    sample = stream_text(hqlt, PROMPT, 400, seed)
    rows = [{"task": t, "model": r.name, **row} for t, runs in (("text", text_runs), ("parity", parity_runs))
            for r in runs for row in r.rows]  # fmt: skip
    write_jsonl(directory / "metrics.jsonl", rows)
    path = directory / "report.html"
    write_text(path, _report(text, text_runs, parity["HQLT"], parity_runs, sample))
    _say(f"4. Report: {path.resolve()}")
    return path


def text_task(corpus: ByteCorpus, recipe: TextRecipe) -> Task:
    """Next-byte prediction; measures bits per byte on held-out files."""
    held_out = corpus.validation_windows(VALIDATION_WINDOWS, recipe.length + 1)

    def batch(seed: int, step: int) -> tuple[Tensor, Tensor]:
        window = corpus.batch(recipe.batch_size, recipe.length + 1, seed, step)
        return window[:, :-1], window[:, 1:]

    def evaluate(model: LanguageModel) -> Metrics:
        hidden, _ = model.hidden_states(held_out[:, :-1])
        return {"bits_per_byte": float(model.target_loss(hidden, held_out[:, 1:])) / NATS_PER_BIT}

    digest = hashlib.sha256(corpus.train.numpy().tobytes()).hexdigest()[:16]
    return Task(batch, evaluate, {"text": digest, "batch_size": recipe.batch_size, "length": recipe.length})


def stream_text(model: LanguageModel, prompt: str, count: int, seed: int) -> bytes:
    """Print a continuation byte by byte as it is sampled; returns prompt and continuation."""
    _say(f"   {count} bytes after {prompt!r}:\n")
    written = bytearray(prompt.encode())
    print(prompt, end="", flush=True)
    started = time.monotonic()
    for byte in generate(model, torch.tensor(list(written)), count, temperature=0.7, top_p=0.95, seed=seed):
        written.append(byte)
        # A byte may be part of a longer character or stand for none; the report shows the decoded whole.
        print(chr(byte) if 32 <= byte < 127 or byte == 10 else "·", end="", flush=True)
    print(f"\n   ({count / (time.monotonic() - started):,.0f} bytes/s)", flush=True)
    return bytes(written)


def _train(task: str, name: str, directory: Path, seed: int, position: int) -> None:
    """Train one model: the job of a worker process."""
    corpus = ByteCorpus.from_documents(python_documents()) if task == "text" else None
    run = _finished(task, name, directory, seed, corpus, position)
    if task == "text":
        result = f"{run.final['bits_per_byte']:.3f} bits per byte"
    else:
        longest = quickstart_parity(seed)[name].trained[1]  # shown: this length and its multiples
        shown = {n: value for n, value in run.final["accuracy"].items() if int(n) % longest == 0}
        result = ", ".join(f"{value:.1f} % at length {n}" for n, value in shown.items())
    tqdm.write(f"   {task:6} {name:22} {result} ({run.final['seconds']:.0f} s)")


def _finished(task: str, name: str, directory: Path, seed: int, corpus: ByteCorpus | None, position: int = 0) -> Run:
    """The trained model of a run, which is trained now as far as it is not yet."""
    if task == "text" and corpus is not None:
        text = quickstart_text(seed)
        torch.manual_seed(seed)
        model, work, training = LanguageModel(text.models[name]), text_task(corpus, text), text.training
    else:
        recipe = quickstart_parity(seed)[name]
        model, work, training = recipe.build(), synthetic_task(recipe), recipe.training
    folder = directory / task / name.lower().replace("+", "p").replace(" ", "-")
    rows = train(model, work, training, folder, f"   {task:6} {name:22}", position)
    return Run(name, model.eval(), rows)


def _report(
    text: TextRecipe, text_runs: list[Run], parity: SyntheticRecipe, parity_runs: list[Run], sample: bytes
) -> str:
    """The report as one HTML page."""
    from hqlt.analysis.report import Curve, Section, figure_svg, plot_curves, plot_gates, render

    longest = parity.trained[1]
    curves: dict[str, Curve] = {
        run.name: [(row["tokens"], row["bits_per_byte"]) for row in run.rows] for run in text_runs
    }
    by_length: dict[str, Curve] = {
        run.name: [(int(length), value) for length, value in run.final["accuracy"].items()] for run in parity_runs
    }
    decoded = sample.decode(errors="replace").replace("\0", "␀")
    excerpt = torch.tensor(list(sample[:160]))
    best = min(run.final["bits_per_byte"] for run in text_runs)
    return render(
        "HQLT quick start",
        [
            Section(
                "Language modelling, equal tokens",
                f"Bytes of this interpreter's documentation and standard library; {text_runs[0].final['tokens']:,} "
                f"tokens each; bits per byte on held-out files (lower is better). One seed ({text.training.seed}).",
                table=[
                    {
                        "model": run.name,
                        "parameters": f"{_parameters(run.model):,}",
                        "bits per byte": f"{run.final['bits_per_byte']:.3f}",
                        "over the best": f"{100 * (run.final['bits_per_byte'] / best - 1):.1f} %",
                        "training tokens/s": f"{run.final['tokens_per_second']:,}",
                        "seconds": f"{run.final['seconds']:.0f}",
                    }
                    for run in text_runs
                ],
                figure=figure_svg(plot_curves(curves, "training tokens", "held-out bits per byte")),
            ),
            Section(
                "State tracking: parity",
                f"Trained on lengths {parity.trained[0]}–{longest}, tested beyond; chance is 50 %. One seed "
                f"({parity.training.seed}), {parity.validation_samples} sequences a length. A memory that writes each "
                "token as it arrives can flip a state with every bit; attention of fixed depth cannot, and neither "
                "can a fast weight that is written only when a token leaves the window.",
                table=[
                    {"model": run.name, "parameters": f"{_parameters(run.model):,}", **{
                        f"length {n}": f"{run.final['accuracy'][str(n)]:.1f} %"
                        for n in (longest, 2 * longest, parity.bands[-1][1])
                    }}
                    for run in parity_runs
                ],
                figure=figure_svg(plot_curves(by_length, "sequence length", "accuracy (%)", marker=longest,
                                              marker_label="longest in training", chance=50.0)),
            ),
            Section(
                "Which memory answers: the gate γ",
                "Weight of FW memory per layer and byte of the sample below, averaged over heads and channels: 1 is "
                "FW memory alone, 0 is KV memory alone.",
                figure=figure_svg(plot_gates(memory_gates(text_runs[0].model, excerpt), excerpt.tolist())),
            ),
            Section("Text sampled from the HQLT model", "Temperature 0.7, top-p 0.95.", code=decoded),
        ],
        f"Python {platform.python_version()}, torch {torch.__version__}, {available_cores()} cores, "
        f"{platform.machine()}. Command: hqlt quickstart --seed {text.training.seed}",
    )  # fmt: skip


def _parameters(model: LanguageModel) -> int:
    return sum(p.numel() for p in model.parameters())


def _say(line: str) -> None:
    print(line, flush=True)
