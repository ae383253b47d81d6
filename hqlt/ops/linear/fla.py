"""Linear attention on flash-linear-attention's chunk kernel.

The kernel has neither a write strength nor the normaliser's carried state, so values are weighted before it and carry
their strength as one more column, as in the other forms; zeros fill the columns up to a multiple of 16.
"""

from __future__ import annotations

import torch.nn.functional as F
from fla.ops.linear_attn import chunk_linear_attn
from torch import Tensor

from hqlt.ops.fla import run_kernel
from hqlt.ops.linear.reference import feature_map, normalised, with_counter
from hqlt.ops.precision import full_precision


@full_precision
def linear_attention_fla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    borders: list[int] | None,
    period: int | None,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    """Read [B, T, H, V] and final state [N, H, K, V + 1]."""
    phi_query, phi_key = (feature_map(x.float()).to(value.dtype) for x in (query, key))
    columns = value.shape[-1] + 1
    fill = -columns % 16
    weighted = F.pad((with_counter(value) * beta.unsqueeze(-1)).to(value.dtype), (0, fill))
    state = None if initial_state is None else F.pad(initial_state, (0, fill))

    def kernel(**arguments: object) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = chunk_linear_attn(normalize=False, **arguments)
        return found

    read, state = run_kernel(kernel, phi_query, phi_key, weighted, {}, scale, state, borders, period)
    read = read[..., :columns].float()
    return (normalised(read) if normalise else read[..., :-1]).to(value.dtype), state[..., :columns].contiguous()
