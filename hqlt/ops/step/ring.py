"""KV memory as a ring of slots."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Ring(NamedTuple):
    """The last L tokens of each document: token t in slot t mod L.

    Attributes:
        key, value: unrotated, [N, L, H, K] and [N, L, H, V].
        beta, log_decay: gates of the same tokens, [N, L, H], where they are written later with their own gates.
    """

    key: Tensor
    value: Tensor
    beta: Tensor | None = None
    log_decay: Tensor | None = None
