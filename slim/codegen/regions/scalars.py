"""What is computed for one element: a tree of scalar operations over loads, free of any language."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from slim.codegen.regions.views import Size, Strided, View, same

F32, I64, BOOL = torch.float32, torch.int64, torch.bool


def computed(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers stored as ``dtype`` are computed: float32, int64 or bool."""
    if dtype == BOOL:
        return BOOL
    return F32 if dtype.is_floating_point else I64


class Scalar:
    """A number for each index of a shape. Identity is equality: trees share what is computed once."""

    dtype: torch.dtype

    @property
    def children(self) -> tuple[Scalar, ...]:
        return ()


@dataclass(eq=False)
class Const(Scalar):
    value: float | int | bool
    dtype: torch.dtype


@dataclass(eq=False)
class SizeOf(Scalar):
    """A size, which is known when a call begins."""

    size: Size
    dtype: torch.dtype = I64


@dataclass(eq=False)
class Iota(Scalar):
    """The index itself, through an affine map."""

    map: Strided
    dtype: torch.dtype = I64


@dataclass(eq=False)
class Load(Scalar):
    view: View

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return computed(self.view.buffer.dtype)


@dataclass(eq=False)
class Gather(Scalar):
    """A load whose address also depends on computed indices: (index, stride in elements, how many there are).

    An index that is not below its number is a fault of the caller's; where that is None it cannot be.
    """

    view: View
    terms: tuple[tuple[Scalar, Size, Size | None], ...]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return computed(self.view.buffer.dtype)

    @property
    def children(self) -> tuple[Scalar, ...]:
        return tuple(index for index, _, _ in self.terms)


@dataclass(eq=False)
class Op(Scalar):
    """An operation by name; what each means is said in ``pointwise.py`` and by the emitters.

    ``node`` names the node of the Program that it computes, for people; the lowering fills it in.
    """

    name: str
    args: tuple[Scalar, ...]
    dtype: torch.dtype
    node: str = ""

    @property
    def children(self) -> tuple[Scalar, ...]:
        return self.args


@dataclass(eq=False)
class Lane(Scalar):
    """The result of an anchor (a linear, a norm, a reduction) at this element, before it is stored."""

    anchor: Any
    dtype: torch.dtype = F32


@dataclass
class Value:
    """A tensor that is not computed yet: a scalar for each index of ``shape``."""

    body: Scalar
    shape: tuple[Size, ...]
    dtype: torch.dtype = field(default=F32)


def walk(body: Scalar) -> Iterator[Scalar]:
    """Every scalar of the tree once, operands first."""
    seen: set[int] = set()

    def visit(scalar: Scalar) -> Iterator[Scalar]:
        if id(scalar) in seen:
            return
        seen.add(id(scalar))
        for child in scalar.children:
            yield from visit(child)
        yield scalar

    return visit(body)


def mark(body: Scalar, node: str) -> None:
    """Says of every operation that no node has claimed yet that ``node`` does it."""
    for scalar in walk(body):
        if isinstance(scalar, Op) and not scalar.node:
            scalar.node = node


def views(body: Scalar) -> list[View]:
    return [scalar.view for scalar in walk(body) if isinstance(scalar, (Load, Gather))]


def lanes(body: Scalar) -> list[Any]:
    """The anchors that the tree reads, in order, each once."""
    return list(dict.fromkeys(scalar.anchor for scalar in walk(body) if isinstance(scalar, Lane)))


def rebuild(body: Scalar, change: Callable[[Scalar], Scalar | None]) -> Scalar:
    """The tree with each scalar for which ``change`` returns another replaced by that."""
    done: dict[int, Scalar] = {}

    def visit(scalar: Scalar) -> Scalar:
        if id(scalar) not in done:
            new = change(scalar)
            if new is None:
                new = scalar
                args = tuple(visit(child) for child in scalar.children)
                if any(a is not b for a, b in zip(args, scalar.children, strict=True)):
                    new = _with_children(scalar, args)
            done[id(scalar)] = new
        return done[id(scalar)]

    return visit(body)


def _with_children(scalar: Scalar, children: tuple[Scalar, ...]) -> Scalar:
    if isinstance(scalar, Op):
        return Op(scalar.name, children, scalar.dtype, scalar.node)
    assert isinstance(scalar, Gather)
    terms = tuple((index, *rest) for index, (_, *rest) in zip(children, scalar.terms, strict=True))
    return Gather(scalar.view, terms)


def remap(body: Scalar, move: Callable[[Any], Any | None], *, rows: bool = False) -> Scalar | None:
    """The tree over another index space: ``move`` maps the affine map of each leaf; None where one cannot be.

    ``rows`` says that ``move`` keeps rows of the last dimension whole and in order, so that anchors may stay.
    """
    failed = False

    def change(scalar: Scalar) -> Scalar | None:
        nonlocal failed
        if isinstance(scalar, Lane):
            failed = failed or not rows
            return None
        moved = None
        if isinstance(scalar, (Load, Gather)):
            moved = move(scalar.view)
        elif isinstance(scalar, Iota):
            moved = move(scalar.map)
        else:
            return None
        if moved is None:
            failed = True
            return scalar
        if isinstance(scalar, Load):
            return Load(moved)
        if isinstance(scalar, Gather):
            terms = tuple((rebuild(index, change), *rest) for index, *rest in scalar.terms)
            return Gather(moved, terms)
        return Iota(moved)

    new = rebuild(body, change)
    return None if failed else new


def cast(scalar: Scalar, dtype: torch.dtype) -> Scalar:
    """As ``dtype``, one of the types numbers are computed in."""
    if scalar.dtype == dtype:
        return scalar
    if isinstance(scalar, Const):
        kinds: dict[torch.dtype, Callable[[Any], Any]] = {F32: float, I64: int, BOOL: bool}
        return Const(kinds[dtype](scalar.value), dtype)
    return Op("cast", (scalar,), dtype)


def expand(value: Value, shape: Sequence[Size]) -> Scalar:
    """The body of ``value`` broadcast to ``shape``."""
    if len(value.shape) == len(shape) and all(same(a, b) for a, b in zip(value.shape, shape, strict=True)):
        return value.body
    new = remap(value.body, lambda leaf: leaf.expand(shape))
    assert new is not None, "anchors are stored before they are broadcast"
    return new
