"""One decoding step of both memories, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.ops.backend import INSTALLED
from hqlt.ops.launch import interpreted
from hqlt.ops.rotary import Angles
from hqlt.ops.step.checks import check_step
from hqlt.ops.step.reference import hybrid_step_reference
from hqlt.ops.step.ring import Ring

__all__ = ["BACKENDS", "Ring", "hybrid_step"]

BACKENDS = ("reference", "triton")


@torch.no_grad()
def hybrid_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    *,
    gates: tuple[Tensor, Tensor | None] | None = None,
    fast_weight: Tensor | None = None,
    ring: Ring | None = None,
    window: int | None = None,
    delay: int = 0,
    anchored: bool = False,
    angles: Angles | None = None,
    mixer: str = "sum",
    mixer_input: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "reference",
) -> Tensor:
    r"""Write one token of each document into both memories, read both with its query, mix and normalise.

    With p the document's ``position``, δ the delay, φ = :func:`hqlt.ops.unit_silu` and R(d) the rotation by d
    positions (the identity without ``angles``), per document and head:

    .. math::
        \text{kv} &= \sum_{d<n} \mathrm{softmax}_d\big(K^{-1/2} q^\top R(-d) k_{p-d}\big) \, v_{p-d}, \qquad
            n = \min(p + 1, S) \text{, or } p \bmod S + 1 \text{ if anchored} \\
        M' &= e^{g_p} M, \qquad
        M \leftarrow M' + \varphi(k_{p-\delta}) \, \beta \, (v_{p-\delta} - M'^\top \varphi(k_{p-\delta}))^\top,
            \qquad \beta = \beta_p \text{ if } p \ge \delta \text{ else } 0 \\
        \text{fw} &= K^{-1/2} M^\top \varphi(q), \qquad
        y = \mathrm{RMSNorm}(a \odot \text{fw} + b \odot \text{kv}) .

    Token t lies in slot t mod L of the ring, whatever its document's position: nothing is shifted. ``fast_weight`` and
    the ring are changed in place and nothing is read on the host, so that a CUDA graph can replay the step. The ring's
    other slots are neither read nor changed. An anchored step leaves the fast weight as it is: its owner writes a chunk
    when it is complete, from the ring, which then holds the chunk in order.

    Args:
        query, key: raw, [N, H, K]; value: [N, H, V]; one token of N documents.
        position: tokens before this one of each document, int64 [N], on the device of the query.
        gates: β [N, H], and the log-decay g [N, H] or None; None without FW memory.
        fast_weight: M, [N, H, K, V], float32 (float64 for float64 inputs); None: no FW memory, and no fw.
        ring: slots of KV memory; None: no KV memory, and no kv.
        window: S, tokens that KV memory holds. L is at least S and at least δ + 1.
        delay: δ. anchored: the read counts from the last multiple of S (Delayed-Chunk), and δ is 0.
        angles: cosine and sine of :func:`hqlt.ops.rotary_table` for positions 0 … at least S − 1, [≥ S, K / 2] each.
        mixer: a and b by the names of :class:`hqlt.layers.mixers.Mixer`.
        mixer_input: nothing for ``sum``; a and b as [2] for ``static_scalar``; logits [N, 2, H] for
            ``dynamic_scalar``, [N, H, V] for ``dynamic_vector`` and [N, H, 2·V] for ``dynamic_vector_separate``.
        norm_weight: [V]; None leaves out the RMSNorm, whose ε is ``eps``.
        backend: ``reference`` (the definition, in PyTorch); ``triton`` (one kernel launch, a program for each document
            and head).

    Returns:
        y [N, H, V] in the dtype of ``value``; without gradients.

    Raises:
        TypeError: a dtype that is not floating, or differs where it must not.
        ValueError: shapes or options that do not fit; memory changed in place that is not contiguous.
        RuntimeError: ``backend="triton"`` where the kernel cannot run.

    Source: the paper's Eq. 11 to 13 and its dynamic vector mixing, for one token.
    """
    check_step(
        query, key, value, position, gates, fast_weight, ring, window, delay, anchored, angles, mixer, mixer_input,
        norm_weight,
    )  # fmt: skip
    arguments = (
        query, key, value, position, gates, fast_weight, ring, window, delay, anchored, angles, mixer, mixer_input,
        norm_weight, eps,
    )  # fmt: skip
    if _choose(backend, query.device) == "reference":
        return hybrid_step_reference(*arguments)
    from hqlt.ops.step.triton import hybrid_step_triton

    return hybrid_step_triton(*arguments)


def _choose(backend: str, device: torch.device) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "triton" and not (INSTALLED["triton"] and (device.type == "cuda" or interpreted())):
        raise RuntimeError(
            f"backend='triton' cannot run on {device}: it needs CUDA and `pip install 'hqlt[cuda]'`, or on a CPU "
            "TRITON_INTERPRET=1 in the environment before Triton is imported; choose backend='reference' otherwise"
        )
    return backend
