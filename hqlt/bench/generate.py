"""One token of a small and of a large model: the model's own step, the compiled step, that of another checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqlt.bench.record import Record
from hqlt.bench.timing import Contender, contest, relative_error
from hqlt.config import MemoryConfig, ModelConfig
from hqlt.models.decoding import Decoder, no_compiler
from hqlt.models.language_model import LanguageModel

CONFIG = ModelConfig(
    vocab_size=256, num_hidden_layers=4, memory=MemoryConfig(hidden_size=256, num_heads=4, window=64)
)  # fmt: skip
# Where reading the weights is nearly all the work.
LARGE = ModelConfig(
    vocab_size=256, num_hidden_layers=8, memory=MemoryConfig(hidden_size=1024, num_heads=8, window=64)
)  # fmt: skip
PROMPT = 200
CHECKED = 16
SECONDS = 120.0
# Tokens in a turn: threads of another process still spin for a moment after its turn.
BLOCK = 20
EAGER, COMPILED, OTHER = "model(token, state)", "Decoder (compiled)", "model(token, state), other checkout"

# Steps in another checkout, which knows the model's first public face only: weights and prompt from a file, then a line
# for every token read; it answers when the step is done.
WORKER = """
import sys, torch
from hqlt import LanguageModel, MemoryConfig, ModelConfig
content = torch.load(sys.argv[1])
torch.set_num_threads(content["threads"])
memory = MemoryConfig(**content["memory"])
model = LanguageModel(ModelConfig(memory=memory, **content["model"])).eval()
model.load_state_dict(content["weights"])
with torch.no_grad():
    _, first = model(content["prompt"])
    state, logits = first, []
    for token in content["checked"]:
        y, state = model(token.view(1, 1), state)
        logits.append(y[0, 0])
    torch.save(torch.stack(logits), sys.argv[2])
    print("ready", flush=True)
    token = content["prompt"][:, -1:]
    for _ in sys.stdin:
        for _ in range(content["block"]):
            _, state = model(token, state)
        print("done", flush=True)
"""


class _OtherCheckout:
    """A process that runs the same steps with the package in another directory."""

    def __init__(self, directory: Path, content: dict[str, Any]) -> None:
        if not (directory / "hqlt" / "__init__.py").exists():
            raise ValueError(f"{directory} is not a checkout of hqlt: it has no hqlt/__init__.py")
        self._folder = tempfile.TemporaryDirectory()
        given, self.answer = Path(self._folder.name) / "given.pt", Path(self._folder.name) / "logits.pt"
        torch.save(content, given)
        environment = {**os.environ, "PYTHONPATH": str(directory.resolve())}
        command = [sys.executable, "-P", "-c", WORKER, str(given), str(self.answer)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._expect("ready")

    def step(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._expect("done")

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != word:
            raise RuntimeError("the other checkout failed; its message is above")

    def close(self) -> None:
        self._process.communicate("")
        self._folder.cleanup()


def bench_generate(repeats: int, other: Path | None) -> Iterator[list[Record]]:
    """Tokens after a prompt of 200, one at a time, against the time it takes to read the weights as often.

    Args:
        repeats: rounds at most.
        other: directory of another checkout, whose step is measured in the same rounds (in a process of its own, since
            two versions of a package do not fit into one).
    """
    yield _steps(CONFIG, repeats, other)
    yield _steps(LARGE, repeats, None)


@torch.no_grad()
def _steps(config: ModelConfig, repeats: int, other: Path | None) -> list[Record]:
    torch.manual_seed(0)
    model = LanguageModel(config).eval()
    prompt = torch.randint(config.vocab_size, (1, PROMPT))
    checked = torch.randint(config.vocab_size, (CHECKED,))
    _, start = model(prompt)
    expected = model(torch.cat([prompt, checked[None]], 1))[0][0, PROMPT:]
    stepper, decoder = _Stepper(model, prompt), Decoder(model)

    def eager_error() -> float:
        state, logits = start, []
        for token in checked:
            y, state = model(token.view(1, 1), state)
            logits.append(y[0, 0])
        return relative_error(torch.stack(logits), expected)

    def compiled_error() -> float:
        decoder.load(start)
        return relative_error(torch.stack([decoder(token.view(1))[0] for token in checked]), expected)

    token, (memory, *_) = prompt[0, -1:], config.memories
    contenders = [Contender(EAGER, stepper.step, eager_error)]
    try:
        decoder.load(start)
        decoder(token)
        contenders.append(Contender(COMPILED, lambda: [decoder(token) for _ in range(BLOCK)], compiled_error))
    except RuntimeError as error:
        if not no_compiler(error.__cause__):
            raise
        print(f"the compiled step is left out: {error.__cause__}", file=sys.stderr)
    content = {
        "threads": torch.get_num_threads(),
        "block": BLOCK,
        "memory": {"hidden_size": memory.hidden_size, "num_heads": memory.num_heads, "window": memory.window},
        "model": {"vocab_size": config.vocab_size, "num_hidden_layers": config.num_hidden_layers},
        "weights": model.state_dict(),
        "prompt": prompt,
        "checked": checked,
    }
    checkout = None if other is None else _OtherCheckout(other, content)
    if checkout is not None:
        answer = checkout.answer
        contenders.append(Contender(OTHER, checkout.step, lambda: relative_error(torch.load(answer), expected)))
    weights = torch.cat([p.flatten() for p in model.parameters()])
    try:
        return contest(
            f"{BLOCK} tokens, {weights.numel() / 1e6:.1f} M weights",
            contenders,
            baseline=EAGER if checkout is None else OTHER,
            floor=lambda: [weights.sum() for _ in range(BLOCK)],
            tokens=BLOCK,
            repeats=repeats,
            seconds=SECONDS,
        )
    finally:
        if checkout is not None:
            checkout.close()


class _Stepper:
    """The model's own step, its state carried along."""

    def __init__(self, model: LanguageModel, prompt: Tensor) -> None:
        self.model, self.token = model, prompt[:, -1:]
        _, self.state = model(prompt)

    def step(self) -> None:
        for _ in range(BLOCK):
            _, self.state = self.model(self.token, self.state)
