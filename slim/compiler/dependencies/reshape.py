"""What becomes of dimensions as they are joined and cut apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from slim.compiler.dependencies.slots import Slots

Axes = tuple[Tensor | None, ...]


def reshaped(axes: Axes, before: Sequence[Any], after: Sequence[Any], slots: Slots) -> Axes:
    """The axes of a value of shape ``before`` as a value of shape ``after``.

    Joined dimensions pass on what the first of them that can be cut has: heads [H, D] become rows [H * D] that go D
    at a time. A dimension that is cut apart becomes such a first one: what the others hold stays or goes with it.
    """
    out: list[Tensor | None] = [None] * len(after)
    for inner, outer in _stretches([_size(n) for n in before], [_size(n) for n in after]):
        if len(inner) == len(outer) == 1:
            out[outer[0]] = axes[inner[0]]
            continue
        whole = _joined([axes[i] for i in inner], [before[i] for i in inner], slots)
        if whole is not None:
            out[outer.start : outer.stop] = _cut_apart(whole, [int(after[i]) for i in outer], slots)
    return tuple(out)


def _size(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _stretches(before: Sequence[Any], after: Sequence[Any]) -> Iterator[tuple[range, range]]:
    """Pairs of runs of dimensions that hold the same elements, as short as can be, from the last ones on.

    Dimensions of unknown size that are joined or cut apart make one run with all that is in front of them.
    """
    i, j = len(before), len(after)
    while i and j:
        inner, outer = i - 1, j - 1
        held, wanted = before[inner], after[outer]
        while held != wanted and isinstance(held, int) and isinstance(wanted, int) and (inner, outer)[held > wanted]:
            if held < wanted:
                inner -= 1
                held *= before[inner]
            else:
                outer -= 1
                wanted *= after[outer]
        if held != wanted:
            break
        yield range(inner, i), range(outer, j)
        i, j = inner, outer
    if i or j:
        yield range(i), range(j)


def _joined(axes: Sequence[Tensor | None], sizes: Sequence[Any], slots: Slots) -> Tensor | None:
    held = [place for place, axis in enumerate(axes) if axis is not None]
    if not held:
        return None
    first, *others = held
    fixed = not all(isinstance(size, int) for size in sizes)
    for place in [*others, *([first] if fixed else [])]:
        slots.fix(axes[place], "it is joined with another dimension")  # type: ignore[arg-type]
    if fixed:
        return None
    view = [-1 if place == first else 1 for place in range(len(sizes))]
    return axes[first].view(view).expand(list(sizes)).reshape(-1)  # type: ignore[union-attr]


def _cut_apart(whole: Tensor, sizes: Sequence[int], slots: Slots) -> list[Tensor | None]:
    first = next((place for place, size in enumerate(sizes) if size > 1), 0)
    rows = whole.view(sizes[first], -1)
    slots.tie(rows, rows[:, :1].expand_as(rows))
    return [rows[:, 0] if place == first else None for place in range(len(sizes))]
