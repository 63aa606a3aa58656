"""Optimal brain surgeon for columns that go in units: which to take out, and what it costs, from E[x x^T] alone.

Of a linear W whose input has the second moments C, leaving out the columns S costs, once the others are fitted anew,
tr(W_S (H_SS)^-1 W_S^T) with H = C^-1. Units are taken out greedily, the cheapest first; W and H then become what
they are without it, so that the next is chosen knowing what it would have had to make up for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal of C
_STEPS = 64  # rounds in which many units go: those of one round are taken to be independent


@dataclass(frozen=True)
class Order:
    """Units in the order in which they are best taken out.

    Attributes:
        units: int64 [count]. costs: float64 [count], what all up to and with each cost together: E|W x - W' x_left|^2.
    """

    units: Tensor
    costs: Tensor


def removal_order(weight: Tensor, moments: Tensor, columns: Tensor, count: int) -> Order:
    """The ``count`` units whose loss costs least.

    Args:
        weight: [m, n]. moments: [n, n], symmetric. columns: int64 [n], the unit of each column.

    Source: Hassibi & Stork, Optimal Brain Surgeon, 1993; for columns: Frantar & Alistarh, 2022, and ZipLM, 2023.
    """
    moments = moments.double()
    damped = moments + DAMPING * moments.diagonal().mean().clamp_min(1e-12) * torch.eye(len(moments)).double()
    state = _State(weight.double(), torch.cholesky_inverse(torch.linalg.cholesky(damped)), columns)
    step = -(-count // _STEPS) if state.width == 1 else 1
    while len(state.gone) < count:
        state.take(min(step, count - len(state.gone)))
    return Order(torch.tensor(state.gone), torch.tensor(state.costs, dtype=torch.float64))


class _State:
    """What is left: only W^T W matters of the weight, which is as small as H."""

    def __init__(self, weight: Tensor, inverse: Tensor, columns: Tensor) -> None:
        self.weight, self.inverse = weight, inverse
        units = int(columns.max()) + 1
        self.places = torch.argsort(columns, stable=True).view(units, -1)  # [units, width]
        self.width = self.places.shape[1]
        self.alive = torch.ones(units, dtype=torch.bool)
        self.gone: list[int] = []
        self.costs: list[float] = []

    def take(self, count: int) -> None:
        left = self.alive.nonzero()[:, 0]
        costs = self._costs(left)
        order = costs.argsort(stable=True)[:count]
        total = self.costs[-1] if self.costs else 0.0
        for cost, unit in zip(costs[order].tolist(), left[order].tolist(), strict=True):
            total += max(cost, 0.0)
            self.costs.append(total)
            self.gone.append(unit)
        self.alive[left[order]] = False
        self._forget(self.places[left[order]].reshape(-1))

    def _costs(self, units: Tensor) -> Tensor:
        places = self.places[units]
        if self.width == 1:
            flat = places[:, 0]
            return self.weight[:, flat].square().sum(0) / self.inverse.diagonal()[flat]
        blocks = self.inverse[places[:, :, None], places[:, None, :]]
        parts = self.weight[:, places].permute(1, 2, 0)  # [units, width, m]
        return (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))

    def _forget(self, places: Tensor) -> None:
        factor = torch.linalg.solve(self.inverse[places][:, places], self.inverse[places])
        self.weight = self.weight - self.weight[:, places] @ factor
        self.inverse = self.inverse - self.inverse[:, places] @ factor
        self.weight[:, places] = 0.0
        self.inverse[places], self.inverse[:, places] = 0.0, 0.0
        self.inverse[places, places] = 1.0
