"""Which heads to merge: a partition into groups of one size, of least cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_STARTS = 24
_SEED = 0

Groups = list[list[int]]


def contiguous(heads: int, groups: int) -> Groups:
    """Neighbours together: 0 1 | 2 3 | ..."""
    size = heads // groups
    return [list(range(start, start + size)) for start in range(0, heads, size)]


def cheapest(pairs: Tensor, groups: int, cost: Callable[[Sequence[int]], float]) -> Groups:
    """A partition whose pairs cost least, as far as swaps find it; never one that costs more than neighbours do.

    Args:
        pairs: [heads, heads], what merging two heads costs; symmetric.
        cost: what merging a whole group costs.
    """
    heads = len(pairs)
    neighbours = contiguous(heads, groups)
    if groups in (1, heads):
        return neighbours
    best = min((_swapped(start, pairs) for start in _starts(pairs, groups)), key=lambda found: _sum(found, pairs))
    best = sorted(sorted(group) for group in best)
    return best if sum(map(cost, best)) < sum(map(cost, neighbours)) else neighbours


def _starts(pairs: Tensor, groups: int) -> list[Groups]:
    heads, size = len(pairs), len(pairs) // groups
    generator = torch.Generator().manual_seed(_SEED)
    orders = [torch.randperm(heads, generator=generator).tolist() for _ in range(_STARTS)]
    return [contiguous(heads, groups), _greedy(pairs, size)] + [
        [order[start : start + size] for start in range(0, heads, size)] for order in orders
    ]


def _greedy(pairs: Tensor, size: int) -> Groups:
    """Each group begins with the cheapest pair left and takes the heads that cost least beside it."""
    left, found = set(range(len(pairs))), []
    while left:
        group = list(min(((i, j) for i in left for j in left if i < j), key=lambda ij: float(pairs[ij]), default=left))
        left -= set(group)
        while len(group) < size:
            nearest = min(left, key=lambda i: float(pairs[i, group].sum()))
            group.append(nearest)
            left.remove(nearest)
        found.append(group)
    return found


def _sum(groups: Groups, pairs: Tensor) -> float:
    return sum(float(pairs[group][:, group].sum()) for group in groups)


def _swapped(groups: Groups, pairs: Tensor) -> Groups:
    """Swaps two heads of different groups, the best two each time, until no swap helps."""
    heads = len(pairs)
    owner = torch.empty(heads, dtype=torch.long)
    for index, group in enumerate(groups):
        owner[group] = index
    apart = pairs.clone().fill_diagonal_(0.0)
    for _ in range(heads * heads):
        member = torch.nn.functional.one_hot(owner, len(groups)).to(apart.dtype)
        to_group = apart @ member  # what a head costs in each group
        own = to_group.gather(1, owner[:, None]).squeeze(1)
        there = to_group[:, owner]  # [i, j]: i in the group of j
        gain = own[:, None] + own[None, :] - there - there.T + 2 * apart
        gain[owner[:, None] == owner[None, :]] = 0.0
        at = int(gain.argmax())
        i, j = divmod(at, heads)
        if float(gain[i, j]) <= 1e-12 * float(apart.abs().sum()):
            break
        owner[i], owner[j] = owner[j].item(), owner[i].item()
    return [[h for h in range(heads) if owner[h] == index] for index in range(len(groups))]
