"""Which directions of the residual stream its readers need: those that what they make of it is fitted from best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DAMPING = 1e-4  # of the mean diagonal of C
_LENGTH = 0.1  # weight of the stream's own energy beside what readers make: norms divide by its length
_STEPS, _WIDE = 20, 512  # of L-BFGS, and up to which width: each costs the cube of it, and the first gain most


@dataclass(frozen=True)
class Seen:
    """What the readers of one value see: C = E[x x^T] and G, the sum of W^T W, each W by its result's energy.

    Attributes:
        moments: float64 [d, d]. wanted: C G C. total: tr(G C), what they make of all of x.
    """

    moments: Tensor
    wanted: Tensor
    total: float

    @classmethod
    def of(cls, moments: Tensor, weights: Sequence[Tensor]) -> Seen:
        """Of matrices [m, d] that read rows with these second moments."""
        wide = moments.double()
        wide = wide + _DAMPING * wide.diagonal().mean() * torch.eye(len(wide)).double()
        summed = torch.zeros_like(wide)
        for weight in weights:
            square = weight.double().T @ weight.double()
            summed += square / (square * wide).sum().clamp_min(torch.finfo(torch.float64).tiny)
        return cls(wide, wide @ summed @ wide, float((summed * wide).sum()))


def leading(every: Sequence[Seen], kept: int) -> Tensor:
    """[d, d]: an orthonormal basis whose first ``kept`` directions P are those that are to stay.

    They make the least of the sum, over all readers, of E|W x - W' P^T x|^2 with the best W', a share of E|W x|^2, and
    a tenth of what x loses itself. P begins as the leading eigenvectors of E[x x^T] (SliceGPT) and climbs from there:
    the sum of tr((P^T C P)^-1 P^T C G C P) depends on nothing but the space that P spans.

    Source: the start is Ashkboos et al., SliceGPT, 2024.
    """
    mean = torch.stack([one.moments / one.moments.trace() for one in every]).mean(0)
    eye = torch.eye(len(mean)).double()
    basis = torch.linalg.eigh(mean).eigenvectors.flip(1)
    terms = [*every, Seen(eye, mean * (_LENGTH * len(every)), _LENGTH * len(every))]
    if kept < len(mean):
        basis = torch.cat([_climbed(basis[:, :kept], terms), eye], 1)
    return torch.linalg.qr(basis).Q


def _climbed(start: Tensor, terms: Sequence[Seen]) -> Tensor:
    span = start.contiguous().clone()
    steps = min(_STEPS, max(4, _STEPS * _WIDE // len(span)))
    search = torch.optim.LBFGS([span], max_iter=steps, history_size=8, line_search_fn="strong_wolfe")

    def missed() -> Tensor:
        value, span.grad = lost(span.detach(), terms)
        return value

    search.step(missed)
    best = span.detach()
    return best if float(lost(best, terms)[0]) <= float(lost(start, terms)[0]) else start


def lost(span: Tensor, terms: Sequence[Seen]) -> tuple[Tensor, Tensor]:
    """What is lost where only ``span``, [d, k], is seen, a share of all; and its gradient by ``span``."""
    value, gradient = torch.ones((), dtype=torch.float64), torch.zeros_like(span)
    total = sum(one.total for one in terms)
    for one in terms:
        seen, wanted = one.moments @ span, one.wanted @ span
        inner = span.T @ seen
        fitted = torch.linalg.solve(inner, span.T @ wanted)  # A^-1 B
        value = value - fitted.trace() / total
        gradient -= 2 / total * torch.linalg.solve(inner, wanted - seen @ fitted, left=False)
    return value, gradient
