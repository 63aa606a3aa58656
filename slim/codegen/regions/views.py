"""Where numbers lie: buffers, and strided views of them with symbolic sizes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import sympy
import torch

Size = Any  # an int, or a sympy expression in the Program's dimensions


@dataclass(eq=False)
class Buffer:
    """Memory that a region reads or writes.

    Attributes:
        kind: who owns it: the caller (inputs, outputs), the Program (weights), PyTorch between two segments
            ("foreign"), or the plan of the run ("temp").
        name: the input or weight it is; for the others the node it was made for.
        dtype: how a number is stored. A "temp" of any float type holds float32.
        shape: as it is contiguous.
        packing: of a weight, the layout that its kernel wants; None as PyTorch keeps it.
    """

    kind: Literal["input", "output", "weight", "foreign", "temp"]
    name: str
    dtype: torch.dtype
    shape: tuple[Size, ...]
    packing: Any = None

    def __repr__(self) -> str:
        return f"{self.kind}:{self.name}"

    @property
    def numel(self) -> Size:
        return math.prod(self.shape)

    def view(self) -> View:
        """All of it."""
        return View(self, self.shape, contiguous_strides(self.shape))


@dataclass(frozen=True)
class Strided:
    """An affine map of an index: ``offset + sum(index[d] * strides[d])``. A stride of 0 repeats."""

    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size = 0

    def permute(self, order: Sequence[int]) -> Any:
        return replace(self, shape=tuple(self.shape[d] for d in order), strides=tuple(self.strides[d] for d in order))

    def expand(self, shape: Sequence[Size]) -> Any:
        """Broadcast, aligned at the last dimension."""
        new = len(shape) - len(self.shape)
        strides = [0] * new + [
            0 if same(old, 1) and not same(size, 1) else stride
            for old, size, stride in zip(self.shape, shape[new:], self.strides, strict=True)
        ]
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def slice(self, dim: int, start: Size, length: Size, step: int = 1) -> Any:
        shape, strides = list(self.shape), list(self.strides)
        offset = self.offset + start * strides[dim]
        shape[dim], strides[dim] = length, strides[dim] * step
        return replace(self, shape=tuple(shape), strides=tuple(strides), offset=offset)

    def select(self, dim: int, index: Size) -> Any:
        keep = [d for d in range(len(self.shape)) if d != dim]
        return replace(self.permute(keep), offset=self.offset + index * self.strides[dim])

    def unsqueeze(self, dim: int) -> Any:
        shape, strides = list(self.shape), list(self.strides)
        shape.insert(dim, 1)
        strides.insert(dim, 0)
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def reshape(self, shape: Sequence[Size]) -> Any | None:
        """The same numbers in the same order under another shape; None where that needs a copy."""
        chunks = [chunk for chunk in _chunks(self.shape, self.strides) if not same(chunk[0], 1)]
        strides: list[Size] = []
        rest = list(shape)
        while rest:
            size = rest.pop()
            if same(size, 1):
                strides.append(0)
                continue
            if not chunks:
                return None
            whole, stride = chunks.pop()
            while True:  # fill the chunk with new dimensions, from the last
                strides.append(stride)
                if same(size, whole):
                    break
                left = divided(whole, size)
                if left is None or not rest:
                    return None
                whole, stride, size = left, stride * size, rest.pop()
                while same(size, 1) and rest:
                    strides.append(0)
                    size = rest.pop()
        if chunks:
            return None
        return replace(self, shape=tuple(shape), strides=tuple(reversed(strides)))


@dataclass(frozen=True)
class View(Strided):
    """A strided part of a buffer, in elements."""

    buffer: Buffer = None  # type: ignore[assignment]  # dataclass order: what has no default comes first

    def __init__(self, buffer: Buffer, shape: Sequence[Size], strides: Sequence[Size], offset: Size = 0) -> None:
        object.__setattr__(self, "buffer", buffer)
        object.__setattr__(self, "shape", tuple(shape))
        object.__setattr__(self, "strides", tuple(strides))
        object.__setattr__(self, "offset", offset)

    @property
    def is_contiguous(self) -> bool:
        wanted = contiguous_strides(self.shape)
        return all(same(size, 1) or same(a, b) for size, a, b in zip(self.shape, self.strides, wanted, strict=True))


def contiguous_strides(shape: Sequence[Size]) -> tuple[Size, ...]:
    strides: list[Size] = []
    step: Size = 1
    for size in reversed(shape):
        strides.append(step)
        step = step * size
    return tuple(reversed(strides))


def _chunks(shape: Sequence[Size], strides: Sequence[Size]) -> list[tuple[Size, Size]]:
    """Dimensions that follow each other in memory, as one (size, stride)."""
    chunks: list[tuple[Size, Size]] = []
    for size, stride in zip(shape, strides, strict=True):
        if same(size, 1):
            continue
        if chunks and same(chunks[-1][1], stride * size):
            chunks[-1] = (chunks[-1][0] * size, stride)
        else:
            chunks.append((size, stride))
    return chunks


def coalesce(shape: Sequence[Size], maps: Sequence[Sequence[Size]], keep_last: bool = False) -> list[list[int]]:
    """Which neighbouring dimensions can be walked as one by all of ``maps`` (strides): groups of dimensions.

    ``keep_last`` leaves the last dimension alone. Dimensions of size 1 join their neighbour.
    """
    groups: list[list[int]] = []
    last = len(shape) - 1
    for d in range(len(shape)):
        fits = bool(groups) and not (keep_last and d == last)
        if fits:
            before = groups[-1][-1]
            fits = all(same(m[before], m[d] * shape[d]) for m in maps) or all(same(shape[e], 1) for e in groups[-1])
        if fits:
            groups[-1].append(d)
        else:
            groups.append([d])
    return groups


# -- arithmetic of sizes -----------------------------------------------------------------------------------------------


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for all values of the dimensions, as far as can be seen."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return _same(sympy.sympify(a), sympy.sympify(b))


@functools.lru_cache(maxsize=65536)
def _same(a: sympy.Expr, b: sympy.Expr) -> bool:
    return a == b or sympy.expand(a - b) == 0


def divided(a: Size, b: Size) -> Size | None:
    """a / b where it is whole for all values of the dimensions."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return _divided(sympy.sympify(a), sympy.sympify(b))


@functools.lru_cache(maxsize=65536)
def _divided(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    quotient = sympy.cancel(sympy.expand(a) / b)
    if quotient.as_numer_denom()[1] != 1:
        return None
    return int(quotient) if quotient.is_Integer else quotient
