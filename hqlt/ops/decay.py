"""The running decay of a gated fast weight inside tiles, and the gradient of the log-decay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Decay:
    """The running log-decay of a segment's tiles and the factors it gives, with the gradient of each."""

    def __init__(self, log_decay: Tensor, period: int | None, sees_own_tile: bool, causal: Tensor) -> None:
        self.running = log_decay.cumsum(-1)
        self.entering = self.running.exp().unsqueeze(-1)
        self.leaving = (self.running[:, -1:] - self.running).exp().unsqueeze(-1)
        self.whole = self.running[:, -1, None, None].exp()
        self.between = _between(self.running, self.running, causal)
        self._border: Tensor | None = None
        self.query: Tensor | None = self.entering
        self.seen = self.between
        if period is not None:
            self.query = None
            if sees_own_tile:
                # Running log-decay at the last border: that of the token before it, 0 at the start of the tile.
                block = torch.arange(causal.shape[0], device=causal.device) // period
                self._border = block * period
                at = F.pad(self.running, (1, 0))[:, self._border]
                self.query = at.exp().unsqueeze(-1)
                self.seen = _between(at, self.running, block[:, None] > block[None, :])
        self.grad = torch.zeros_like(self.running)
        self._grad_query = self.grad if self._border is None else torch.zeros_like(self.running)

    def add_weights(self, weighted: Tensor, query: bool = False) -> None:
        """Gradient · weight, [n, C, C], of weights e^{G_t − G_s}; ``query``: of those that reads use."""
        target = self._grad_query if query else self.grad
        target.add_(weighted.sum(-1))
        self.grad.sub_(weighted.sum(-2))

    def add_entering(self, weighted: Tensor, query: bool = False) -> None:
        """Gradient · value, [n, C], of what e^G multiplies."""
        (self._grad_query if query else self.grad).add_(weighted)

    def add_leaving(self, weighted: Tensor, states: Tensor) -> None:
        """Gradient · value of what e^{G_C − G} multiplies, [n, C], and of the decayed states, [n]."""
        self.grad.sub_(weighted)
        self.grad[:, -1].add_(weighted.sum(-1)).add_(states)

    def result(self) -> Tensor:
        """Gradient of the log-decay, [n, C]."""
        if self._border is not None:
            padded = F.pad(self.grad, (1, 0))
            self.grad = padded.index_add_(1, self._border, self._grad_query)[:, 1:]
        return self.grad.flip(-1).cumsum(-1).flip(-1)


def _between(at: Tensor, since: Tensor, visible: Tensor) -> Tensor:
    """e^{G_t − G_s} where s is visible from t, else 0; masked before the exponential so that nothing overflows."""
    return (at.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill_(~visible, float("-inf")).exp_()
