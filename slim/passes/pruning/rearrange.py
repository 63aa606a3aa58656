"""Which units of a layer go, where what one does to the loss depends on which others go with it."""

from __future__ import annotations

import torch
from torch import Tensor

_TRIED = 32  # units outside, the most promising, that are tried in the place of each inside
_GAIN = 1e-6  # of the whole: less is rounding
_DOUBT = 16  # rows a unit at which half of what lies beside the diagonal is believed


def rearranged(slopes: Tensor, start: Tensor) -> Tensor:
    """As many units as ``start``, one swapped for another as long as that lowers what all do together (``joint``).

    ``start`` was chosen by the diagonal of the Fisher information. A swap has to lower ``joint`` on every other row
    and on the others too, as what lies beside the diagonal is known from few tokens: units that cancel by chance are
    many.

    Args:
        slopes: G, [rows, units], a row a token. start: int64, units.

    Source: Kwon et al., A Fast Post-Training Pruning Framework for Transformers, 2022: mask rearrangement.
    """
    halves = [_Quadratic(slopes[half::2].double()) for half in range(min(2, len(slopes)))]
    inside = torch.zeros(slopes.shape[1], dtype=torch.bool)
    inside[start] = True
    least = _GAIN * sum(half.value(start) for half in halves)
    for _ in range(4 * len(start)):
        swap = _best_swap(halves, inside)
        if swap is None or swap[0] > -least:
            break
        _, back, gone = swap
        inside[back], inside[gone] = False, True
    return inside.nonzero()[:, 0]


def joint(slopes: Tensor, units: Tensor) -> float:
    """What ``units`` do to the loss together, to second order, but for a factor: 1^T F 1, its sum over pairs of them.

    F is G^T G, whose numbers beside the diagonal are made smaller the fewer rows there are for each unit.
    """
    return _Quadratic(slopes.double()).value(units)


class _Quadratic:
    def __init__(self, slopes: Tensor) -> None:
        self.slopes, self.alone = slopes, slopes.square().sum(0)
        self.trust = len(slopes) / (len(slopes) + _DOUBT * slopes.shape[1])

    def value(self, units: Tensor) -> float:
        together = self.slopes[:, units].sum(1).square().sum()
        return float(self.trust * together + (1 - self.trust) * self.alone[units].sum())

    def added(self, units: Tensor) -> Tensor:
        """[all units]: what each adds where ``units`` go already."""
        return self.alone + 2 * self.trust * self.slopes.T @ self.slopes[:, units].sum(1)

    def swapped(self, ours: Tensor, others: Tensor) -> Tensor:
        """[ours, others]: the change where one of ``ours``, which all go, is taken back and one of ``others`` goes."""
        mine, added = self.slopes[:, ours], self.added(ours)
        back = 2 * self.trust * self.alone[ours] - added[ours]
        return back[:, None] + added[others][None] - 2 * self.trust * mine.T @ self.slopes[:, others]


def _best_swap(halves: list[_Quadratic], inside: Tensor) -> tuple[float, int, int] | None:
    """(change, unit that is taken back, unit that goes instead); None where all swaps make one half worse."""
    ours, others = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
    if not len(ours) or not len(others):
        return None
    added = torch.stack([half.added(ours) for half in halves]).sum(0)
    others = others[added[others].argsort()[:_TRIED]]
    changes = torch.stack([half.swapped(ours, others) for half in halves])
    total = changes.sum(0).masked_fill((changes > 0).any(0), float("inf"))
    row, column = divmod(int(total.argmin()), len(others))
    change = float(total[row, column])
    return None if change == float("inf") else (change, int(ours[row]), int(others[column]))
