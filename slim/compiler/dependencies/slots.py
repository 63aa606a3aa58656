"""Slots: one for every index of every dimension of every weight, and which of them must go together.

A rule that finds that index i of one value is index j of another ties their two slots. What is tied, directly or by
way of others, is a component: it can only be taken out as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Slots:
    """Numbers that are handed out, ties between them, and those that must stay, each with the reason."""

    def __init__(self) -> None:
        self.count = 0
        self._tied: list[Tensor] = []  # [2, n]
        self._fixed: list[tuple[Tensor, str]] = []

    def fresh(self, size: int) -> Tensor:
        """[size]: slots that nothing is known of."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """``a[i]`` and ``b[i]`` stay or go together."""
        if a is not b:
            self._tied.append(torch.stack([a.reshape(-1), b.reshape(-1)]))

    def fix(self, slots: Tensor, reason: str) -> None:
        """``slots`` stay, and all that is tied to them."""
        self._fixed.append((slots.reshape(-1), reason))

    def components(self) -> Tensor:
        """[count]: the least slot of the component that each slot is in."""
        root = torch.arange(self.count)
        if not self._tied:
            return root
        ties = torch.cat(self._tied, 1)
        while True:  # every round each component is hung under the least neighbour of its root, and paths are halved
            ends = root[ties]
            lower = ends.amin(0)
            after = root.scatter_reduce(0, ends.reshape(-1), lower.repeat(2), "amin")
            after = after[after]
            if torch.equal(after, root):
                return root
            root = after

    def fixed(self, root: Tensor) -> Fixed:
        """What must stay, given what ``components`` returned."""
        return Fixed(root, self._fixed)


class Fixed:
    """Which components must stay, and why."""

    def __init__(self, root: Tensor, reasons: Iterable[tuple[Tensor, str]]) -> None:
        self._reasons: list[str] = []
        self._which = torch.full((len(root),), -1)
        for slots, reason in reasons:
            roots = root[slots]
            new = roots[self._which[roots] < 0]
            self._which[new] = len(self._reasons)
            self._reasons.append(reason)

    def __getitem__(self, roots: Tensor) -> Tensor:
        """bool, True where a component stays."""
        return self._which[roots] >= 0

    def reason(self, root: int) -> str:
        return self._reasons[int(self._which[root])]
