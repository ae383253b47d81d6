"""Which implementation of an op runs, and why.

Every op has two forms of its own that run anywhere: the recurrence, which defines it, and the chunk-parallel form.
Before them come kernels in order of preference, each with the reasons for which it may not run: what the machine
lacks, and what the kernel was not made for.

``auto`` takes the first kernel without an obstacle. An explicit ``backend`` is an error where the machine lacks all
that it names; a call for which that backend has no kernel runs in a form of our own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from hqlt.config import BACKENDS

HALF = (torch.bfloat16, torch.float16)


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # somebody's empty stand-in, which has no origin
        return False


# Looked up once, without importing any of them: a choice is made at every call.
INSTALLED = {package: _is_installed(package) for package in ("fla", "flash_attn", "triton")}


Result = TypeVar("Result")


class Call(NamedTuple):
    """What the choice depends on.

    Attributes:
        device: its type. dtype: of query, key and value.
        length: queries T. key_dim, value_dim: of a head.
        period: of chunk reads. window, anchored, dropout: of attention.
        packed: whether documents share a row. past: whether there are more keys than queries.
    """

    device: str
    dtype: torch.dtype
    length: int
    key_dim: int
    value_dim: int
    period: int | None = None
    window: int | None = None
    anchored: bool = False
    packed: bool = False
    past: bool = False
    dropout: float = 0.0


Obstacle = Callable[[Call], str | None]
"""Why an implementation does not run a call, and what helps; None: it does."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """An implementation beside an op's own forms.

    Attributes:
        name: what it is called in reports.
        backend: the value of ``backend`` that asks for it.
        run: takes the arguments of the op's recurrence.
        automatic: whether ``auto`` takes it.
        missing: what the machine lacks. unfit: why there is no kernel for such a call. slower: why ``auto`` takes
            something else all the same.
    """

    name: str
    backend: str
    run: Callable[..., Any]
    missing: Obstacle
    unfit: Obstacle
    slower: Obstacle = lambda call: None
    automatic: bool = True

    def obstacle(self, call: Call) -> str | None:
        """Why it does not run this call."""
        return self.missing(call) or self.unfit(call)

    def preferred(self, call: Call) -> bool:
        """Whether ``auto`` takes it where nothing is in the way."""
        return self.automatic and self.slower(call) is None


@dataclass(frozen=True, kw_only=True)
class Op(Generic[Result]):
    """The implementations of an op.

    Attributes:
        name: in messages. reference: the recurrence. chunked: takes ``chunk_size`` as one more argument.
        kernels: in order of preference.
        recurs: for a single token the recurrence is the least work.
    """

    name: str
    reference: Callable[..., Result]
    chunked: Callable[..., Result]
    kernels: tuple[Kernel, ...]
    recurs: bool = True

    def run(self, backend: str, arguments: tuple[Any, ...], chunk_size: int | None, **facts: Any) -> Result:
        """The op on the arguments of its recurrence, the first three query, key and value.

        Args:
            facts: of :class:`Call`, beyond device, dtype and shape.
        """
        query, _, value = arguments[:3]
        if backend == "auto" and query.device.type == "cpu" and query.shape[1] == 1:
            chosen: str | Kernel = self.own_form(1)  # models of microseconds do not wait for a choice
        else:
            shape = (query.shape[1], query.shape[-1], value.shape[-1])
            chosen = self.choose(backend, Call(query.device.type, query.dtype, *shape, **facts))
        if isinstance(chosen, Kernel):
            found: Result = chosen.run(*arguments)
            return found
        return self.reference(*arguments) if chosen == "reference" else self.chunked(*arguments, chunk_size)

    def own_form(self, length: int) -> str:
        """The form of our own for so many tokens. The two agree to rounding."""
        return "reference" if self.recurs and length == 1 else "chunked"

    def choose(self, backend: str, call: Call) -> str | Kernel:
        """The kernel that runs a call, or the name of the form of our own.

        Raises:
            ValueError: the backend is unknown, or lacks something on this machine.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        if backend in ("reference", "chunked"):
            return backend
        if backend != "auto":
            self._check_present(backend, call)
        for kernel in self.kernels:
            asked = kernel.preferred(call) if backend == "auto" else backend == kernel.backend
            # In this order: what a machine lacks may take seconds to find out.
            if asked and kernel.unfit(call) is None and kernel.missing(call) is None:
                return kernel
        return self.own_form(call.length)

    def _check_present(self, backend: str, call: Call) -> None:
        missing = {kernel.name: kernel.missing(call) for kernel in self.kernels if kernel.backend == backend}
        if missing and all(missing.values()):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            raise ValueError(f"backend={backend!r} cannot run the {self.name} here; choose 'auto'. {reasons}")


def deferred(module: str, function: str) -> Callable[..., Any]:
    """A function whose module is imported when it first runs: kernels import what few machines have."""

    def run(*arguments: Any) -> Any:
        return getattr(import_module(module), function)(*arguments)

    return run


def joined(*obstacles: str | None) -> str | None:
    """All of them that there are."""
    return ", and ".join(found for found in obstacles if found) or None


def uninstalled(package: str, hint: str) -> str | None:
    """A package cannot be imported; ``hint`` says how to get it."""
    return None if INSTALLED[package] else hint


def no_cuda(call: Call) -> str | None:
    """The tensors are not on a CUDA device."""
    return None if call.device == "cuda" else f"it needs a CUDA device, not {call.device}"


def not_half(call: Call) -> str | None:
    """The kernels multiply in half precision."""
    name = str(call.dtype).removeprefix("torch.")
    return None if call.dtype in HALF else f"it is for bfloat16 and float16, not {name}"
