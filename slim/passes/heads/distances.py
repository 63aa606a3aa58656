"""Keys under RoPE, merged over all frequencies together: what the angles do on the average of all distances.

The rank-one form of each frequency (``merge.py``) is the best there is where the angles between tokens are spread
evenly. They are not: the slow frequencies hardly turn over the distances that attention spans, and nearby frequencies
turn alike, so that one shared pair can stand in for parts of another. With R_d the rotation over distance d, the loss

    sum_h E_d tr(E_h (R_d W_h - T_h R_d S) C (R_d W_h - T_h R_d S)^T),    E_h = E[q_h q_h^T]

with distances d as often as head h looks that far, is quadratic in the turns T_h [D, D] and in the shared map
S [D, n]. Each has a closed form given the other, with products of D x D matrices only; a few rounds from the rank-one
form on lower it, and never raise it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_ROUNDS = 10
_HELD = 1e-6  # of the mean diagonal: how strongly a step is held to the step before


@dataclass(frozen=True)
class Distances:
    """Averages over distances of what the rotation does to a head's channels.

    Attributes:
        partner: [D], the other channel of the pair (itself where a channel does not turn), and
        sign: [D], the sign it comes with: R x = cos * x + sin * sign * x[partner].
        cc, cs, ss: [heads, D, D], the averages of cos cos, cos sin and sin sin over what each head looks at.
    """

    partner: Tensor
    sign: Tensor
    cc: Tensor
    cs: Tensor
    ss: Tensor

    @classmethod
    def of(cls, inv_freq: Tensor, width: int, interleaved: bool, reach: Tensor, causal: bool) -> Distances:
        """For heads of ``width`` channels, of which the first 2 len(inv_freq) turn.

        Args:
            reach: [heads, distances], how much of a head's attention lies at each distance; rows sum to 1. Keys lie
                behind their query, and on both sides of it where attention is not causal.
        """
        pairs = len(inv_freq)
        first = torch.arange(pairs) * 2 if interleaved else torch.arange(pairs)
        second = first + 1 if interleaved else first + pairs
        partner, sign = torch.arange(width), torch.zeros(width, dtype=torch.float64)
        partner[first], partner[second], sign[first], sign[second] = second, first, -1.0, 1.0
        speed = torch.zeros(width, dtype=torch.float64)
        speed[first] = speed[second] = inv_freq.double()
        angle = -torch.arange(reach.shape[1], dtype=torch.float64)[:, None] * speed
        cos, sin = angle.cos(), angle.sin()
        cc, ss, cs = ((a * reach[..., None]).mT @ b for a, b in ((cos, cos), (sin, sin), (cos, sin)))
        return cls(partner, sign, cc, cs if causal else torch.zeros_like(cs), ss)

    def among(self, group: Sequence[int]) -> Distances:
        """For these heads only."""
        index = list(group)
        return replace(self, cc=self.cc[index], cs=self.cs[index], ss=self.ss[index])

    def turned(self, x: Tensor, back: bool = False) -> Tensor:
        """E_d[R x R^T] for each head, of x [heads, D, D] or [D, D]; with ``back`` E_d[R^T x R]."""
        rows = self.sign[:, None] * x[..., self.partner, :]
        columns = x[..., self.partner] * self.sign
        both = self.sign[:, None] * columns[..., self.partner, :]
        mixed = self.cs * columns + self.cs.mT * rows
        return self.cc * x + self.ss * both + (-mixed if back else mixed)


def share_keys(
    distances: Distances, maps: Tensor, energy: Tensor, moment: Tensor, shared: Tensor, turns: Tensor
) -> tuple[Tensor, Tensor, float]:
    """(shared map, turns, loss): better ones than those it starts from.

    Args:
        maps: [g, D, n], the keys' W_h. energy: [g, D, D], E_h. moment: [n, n], C.
        shared: [D, n] and turns: [g, D, D]: head h is about ``turns[h] @ shared``.
    """
    for _ in range(_ROUNDS):
        weighed = turns.mT @ energy
        left = distances.turned(weighed @ turns, back=True).sum(0)
        right = torch.einsum("gij,gjn->in", distances.turned(weighed, back=True), maps)
        hold = _held(left)
        shared = torch.linalg.solve(left + hold, right + hold @ shared)
        cross, own = _moments(distances, maps, moment, shared)
        hold = _held(own)
        turns = torch.linalg.solve(own + hold, cross + turns @ hold, left=False)
    cross, own = _moments(distances, maps, moment, shared)
    lost = distances.turned(maps @ moment @ maps.mT) - 2 * turns @ cross.mT + turns @ own @ turns.mT
    return shared, turns, max(float((energy * lost).sum()), 0.0)


def _moments(distances: Distances, maps: Tensor, moment: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """E_d of R W_h C S^T R^T, [g, D, D], and of R S C S^T R^T."""
    half = moment @ shared.T
    return distances.turned(maps @ half), distances.turned(shared @ half)


def _held(matrix: Tensor) -> Tensor:
    size = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    return _HELD * size[..., None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype)
