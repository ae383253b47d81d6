"""Linear attention."""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.ops.backend import Call, Kernel, Op, deferred
from hqlt.ops.fast_weight import check_fast_weight
from hqlt.ops.fla import missing, unfit
from hqlt.ops.linear.chunked import linear_attention_chunked
from hqlt.ops.linear.reference import linear_attention_reference


def _unfit(call: Call) -> str | None:
    if call.dtype == torch.float16:
        return "its sums before they are normalised overflow float16"
    return unfit(call)


LINEAR_ATTENTION = Op(
    name="linear attention",
    reference=linear_attention_reference,
    chunked=linear_attention_chunked,
    kernels=(
        Kernel(
            name="fla",
            backend="fla",
            run=deferred("hqlt.ops.linear.fla", "linear_attention_fla"),
            missing=missing,
            unfit=_unfit,
        ),
    ),
)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reads: str = "token",
    period: int | None = None,
    normalise: bool = True,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Linear attention with φ = elu + 1, normalised over the tokens written so far.

    .. math:: G_t = G_{t-1} + \beta_t\,\phi(k_t)\,v_t^\top, \quad z_t = z_{t-1} + \beta_t\,\phi(k_t), \quad
              o_t = \frac{s\,G_t^\top \phi(q_t)}{s\,z_t^\top \phi(q_t) + 10^{-10}} .

    Args:
        query, key: raw [B, T, H, K]; the feature map is applied here.
        value: [B, T, H, V].
        beta: optional write strength [B, T, H], 1 if absent; 0 writes nothing (φ(0) = 1 would).
        initial_state: [N, H, K, V + 1]: G with z as the last column.
        normalise: False returns the numerator alone.
        scale, cu_seqlens, reads, period, backend, chunk_size: as in :func:`hqlt.ops.delta_rule`.

    Returns:
        read [B, T, H, V] in the input dtype (0 before the first write), and the final state [N, H, K, V + 1].

    Raises:
        TypeError, ValueError: as :func:`hqlt.ops.delta_rule`.

    Source: Katharopoulos et al. (2020); the paper's ablation "w. Linear Attn.".
    """
    gates = {} if beta is None else {"beta": beta}
    borders, period = check_fast_weight(
        query, key, value, gates, initial_state, cu_seqlens, reads, period, chunk_size, extra_columns=1
    )
    beta = torch.ones_like(query[..., 0]) if beta is None else beta
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    arguments = (query, key, value, beta, scale, initial_state, borders, period, normalise)
    return LINEAR_ATTENTION.run(backend, arguments, chunk_size, period=period, packed=borders is not None)
