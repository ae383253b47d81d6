"""`hqlt generate` and `hqlt chat`: text from a model, streamed to a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hqlt.layers.state import MemoryState, ModelState
from hqlt.models.decoding import Decoder, no_compiler
from hqlt.models.files import load_model
from hqlt.models.generation import Continuation
from hqlt.models.state_files import load_state, save_state
from hqlt.models.tokenizer import load_tokenizer

HELP = """Type a text, and the model goes on from it. It keeps what was said in both memories.
  /undo        take back the last turn
  /reset       forget everything
  /save FILE   write the memories to a file; /load FILE reads them
  /stats       size of the memories, speed of the last answer
  /help, /quit"""

MOST_TURNS = 100  # that can be taken back
SMALL = 5_000_000  # weights
NO_START = (
    ", and this model has no token that begins a text; pass some text (to a model of bytes that `hqlt data prepare` "
    "began with byte 0, that byte: printf '\\0' | hqlt generate --model …)"
)


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens: at most ``count``, and none after the text has ``stop`` in it."""

    count: int
    temperature: float
    top_p: float
    seed: int
    stop: str | None = None


class Speaker:
    """A model with its tokenizer that reads and writes one text."""

    def __init__(self, folder: Path, compiled: bool, state: Path | None = None, threads: int | None = None) -> None:
        """Load a model and, if given, the state of the text so far.

        Args:
            folder: of the model.
            compiled: whether to compile the step for single tokens: 10–30 s at the start, then several times faster.
            state: a file that :func:`hqlt.save_state` wrote.
            threads: of torch. None: one where the model is so small that a step is over before a second thread has
                begun; if another program uses the core, waiting for it makes the step many times slower.
        """
        self.model = load_model(folder)
        weights = sum(p.numel() for p in self.model.parameters())
        if threads is not None or weights < SMALL:
            torch.set_num_threads(threads or 1)
        self.tokenizer = load_tokenizer(folder, self.model.config.vocab_size)
        self.decoder = Decoder(self.model) if compiled else None
        if self.decoder is not None:
            print("compiling the step …", end="", flush=True, file=sys.stderr)
            begin = time.perf_counter()
            self.decoder.load(self.model.empty_state(1))
            try:
                self.decoder(torch.zeros(1, dtype=torch.long))
            except RuntimeError as error:
                print(file=sys.stderr)
                if not no_compiler(error.__cause__):
                    raise
                message = "compiling needs a C++ compiler: install g++ or clang, or leave out --compile"
                raise RuntimeError(message) from error
            print(f" {time.perf_counter() - begin:.0f} s", file=sys.stderr)
        self.text = Continuation(self.model, None, self.decoder)
        self._said: list[int] = []
        self.read_tokens, self.read_seconds, self.wrote_tokens, self.wrote_seconds = 0, 0.0, 0, 0.0
        if state is not None:
            self.go_on_from(load_state(state, self.model))

    def go_on_from(self, state: ModelState | None) -> None:
        """Continue another text.

        Raises:
            ValueError: the state is that of several texts.
        """
        if state is not None and state.batch_size != 1:
            raise ValueError(f"the state is that of {state.batch_size} texts; select one")
        self._said = []
        self.text = Continuation(self.model, state, self.decoder)

    def read(self, text: str) -> None:
        """Read a text; an empty one begins a text where the tokenizer has a token for that.

        Raises:
            ValueError: an empty one, and it has none or the text has begun.
        """
        begins = self.text.state is None
        new = self.tokenizer.start * begins + self.tokenizer.encode(text)
        if not new:
            raise ValueError("the prompt is empty" + (NO_START if begins else "; pass some text"))
        self._said, ids = new, torch.tensor(new, dtype=torch.long)
        begin = time.perf_counter()
        self.text.read(ids)
        self.read_tokens, self.read_seconds = len(ids), time.perf_counter() - begin

    def write(self, sampling: Sampling) -> Iterator[str]:
        """Yield pieces of the continuation as they become complete."""
        step, said = self.tokenizer.stream(self._said), ""
        generator = torch.Generator().manual_seed(sampling.seed)
        begin, self.wrote_tokens = time.perf_counter(), 0
        for token in self.text.sample(
            sampling.count, temperature=sampling.temperature, top_p=sampling.top_p, generator=generator
        ):
            self.wrote_tokens += 1
            self.wrote_seconds = time.perf_counter() - begin
            piece = step(token)
            said += piece
            if piece:
                yield piece
            if sampling.stop and sampling.stop in said:
                return

    def statistics(self) -> str:
        """Speed and sizes, a line each."""
        lines = [
            f"read {_rate(self.read_tokens, self.read_seconds)}",
            f"wrote {_rate(self.wrote_tokens, self.wrote_seconds)}",
            f"weights: {_size(sum(p.numel() * p.element_size() for p in self.model.parameters()))}",
        ]
        state = self.text.state
        if state is None:
            return "\n".join([*lines, "memories: empty"])
        parts = {"KV memory": ("key", "value", "beta", "log_decay"), "FW memory": ("fast_weight",)}
        sizes = ", ".join(
            f"{name} {_size(sum(_bytes(layer, own) for layer in state.layers))}" for name, own in parts.items()
        )
        return "\n".join([*lines, f"memories after {int(state.position):,} tokens: {_size(state.num_bytes)} ({sizes})"])


def _bytes(layer: MemoryState, parts: tuple[str, ...]) -> int:
    return sum(x.numel() * x.element_size() for name, x in layer.tensors().items() if name in parts)


def _rate(tokens: int, seconds: float) -> str:
    speed = f" ({tokens / seconds:,.0f} tokens/s)" if seconds else ""
    return f"{tokens:,} tokens in {seconds:.2f} s{speed}"


def _size(count: int) -> str:
    return (
        f"{count:,} B"
        if count < 10_000
        else f"{count / 1024:,.0f} KiB"
        if count < 10_000_000
        else f"{count / 2**20:,.0f} MiB"
    )


def _say(piece: str) -> None:
    print(piece, end="", flush=True)


def generate_text(speaker: Speaker, prompt: str, sampling: Sampling, save: Path | None, statistics: bool) -> None:
    """Print a prompt and its continuation; statistics go to standard error."""
    speaker.read(prompt)
    try:
        _say(prompt)
        for piece in speaker.write(sampling):
            _say(piece)
        _say("\n")
    finally:
        if save is not None and speaker.text.state is not None:
            save_state(speaker.text.state, save)
    if statistics:
        print(speaker.statistics(), file=sys.stderr)


def chat(speaker: Speaker, sampling: Sampling, ask: Callable[[], str]) -> None:
    """Turn by turn until the input ends; states are values, so a turn is taken back by going on from an older one."""
    print(HELP)
    turns: list[ModelState | None] = [speaker.text.state]
    while True:
        try:
            line = ask()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit or the end of the input ends the chat")
            continue
        except UnicodeDecodeError as error:
            print(f"hqlt: that was no text: {error}", file=sys.stderr)
            continue
        command, _, argument = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return
        try:
            if command.startswith("/"):
                turns = _obey(speaker, command, argument.strip(), turns)
            elif line:
                turns = [*turns[-MOST_TURNS:], _turn(speaker, line, sampling, turns[-1])]
        except (ValueError, OSError, RuntimeError) as error:
            print(f"hqlt: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print()


def _turn(speaker: Speaker, line: str, sampling: Sampling, before: ModelState | None) -> ModelState | None:
    """The state after a line and its answer; Ctrl-C ends the answer, and an error takes the turn back."""
    try:
        speaker.read(line + "\n")
        try:
            for piece in speaker.write(sampling):
                _say(piece)
        except KeyboardInterrupt:
            _say(" …")
        _say("\n")
        return speaker.text.state
    except Exception:
        speaker.go_on_from(before)
        raise


def _obey(speaker: Speaker, command: str, argument: str, turns: list[ModelState | None]) -> list[ModelState | None]:
    """Do what a command says; the states at the end of the turns so far."""
    if command in ("/save", "/load") and not argument:
        raise ValueError(f"{command} needs the name of a file")
    if command == "/undo":
        if len(turns) == 1:
            raise ValueError("there is no turn to take back")
        turns = turns[:-1]
        speaker.go_on_from(turns[-1])
    elif command == "/reset":
        turns = [None]
        speaker.go_on_from(None)
    elif command == "/save":
        state = speaker.text.state
        if state is None:
            raise ValueError("nothing was said yet")
        save_state(state, Path(argument).expanduser())
    elif command == "/load":
        state = load_state(Path(argument).expanduser(), speaker.model)
        speaker.go_on_from(state)
        turns = [state]
    elif command == "/stats":
        print(speaker.statistics())
    else:
        print(HELP)
    return turns
