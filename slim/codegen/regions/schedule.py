"""Regions: what a Program becomes before any language is chosen. An emitter turns each into one kernel.

A region is an anchor (a matrix product, attention, a norm, a reduction, or nothing but pointwise work) with what was
fused into it: what its input rows are computed from, and what is done to its results before they are stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from slim.codegen.regions.scalars import Op, Scalar, views, walk
from slim.codegen.regions.views import Buffer, Size, View
from slim.compiler.patterns import Pattern


class Region(ABC):
    """One kernel call.

    Attributes:
        node: the node of the Program that it was made for, for messages.
    """

    node: fx.Node

    @abstractmethod
    def reads(self) -> Iterator[Buffer]: ...

    @abstractmethod
    def writes(self) -> Iterator[Buffer]: ...

    def bodies(self) -> Iterator[Scalar]:
        """What is computed element by element."""
        yield from ()

    def anchors(self) -> Iterator[fx.Node]:
        """The nodes that it is about, beside those that ``bodies`` compute."""
        yield self.node


def given(*bodies: Scalar | None) -> Iterator[Scalar]:
    return (body for body in bodies if body is not None)


def buffers(*bodies: Scalar | None) -> Iterator[Buffer]:
    for body in bodies:
        if body is not None:
            yield from (view.buffer for view in views(body))


@dataclass(eq=False)
class Pointwise(Region):
    """out[i] = body(i) for every index of ``out``."""

    node: fx.Node
    out: View
    body: Scalar

    def reads(self) -> Iterator[Buffer]:
        return buffers(self.body)

    def writes(self) -> Iterator[Buffer]:
        yield self.out.buffer

    def bodies(self) -> Iterator[Scalar]:
        yield self.body

    def anchors(self) -> Iterator[fx.Node]:
        """None where the body says what it computes: ``node`` may be the first that reads it."""
        if not any(isinstance(scalar, Op) for scalar in walk(self.body)):
            yield self.node


@dataclass(eq=False)
class Norm(Region):
    """Rows of ``x`` normalised over the last dimension; ``body`` is what is stored, over ``Lane(self)``.

    Attributes:
        kind: "rms", "layer" or "softmax".
        x: what is normalised, over the shape of ``out``.
        gain, bias: [n], or None. The gain that applies is ``gain + offset``.
    """

    node: fx.Node
    kind: Literal["rms", "layer", "softmax"]
    x: Scalar
    shape: tuple[Size, ...]
    gain: View | None = None
    bias: View | None = None
    eps: float = 0.0
    offset: float = 0.0
    body: Scalar | None = None
    out: View | None = None

    def reads(self) -> Iterator[Buffer]:
        yield from buffers(self.x, self.body)
        yield from (view.buffer for view in (self.gain, self.bias) if view is not None)

    def writes(self) -> Iterator[Buffer]:
        if self.out is not None:
            yield self.out.buffer

    def bodies(self) -> Iterator[Scalar]:
        return given(self.x, self.body)


@dataclass(eq=False)
class Reduce(Region):
    """``kind`` of ``x`` over its last ``depth`` dimensions; ``body`` over ``Lane(self)`` goes to ``out``."""

    node: fx.Node
    kind: Literal["sum", "prod", "max", "min", "any", "all", "argmax", "argmin"]
    x: Scalar
    shape: tuple[Size, ...]  # of x
    depth: int
    body: Scalar | None = None
    out: View | None = None

    def reads(self) -> Iterator[Buffer]:
        return buffers(self.x, self.body)

    def writes(self) -> Iterator[Buffer]:
        if self.out is not None:
            yield self.out.buffer

    def bodies(self) -> Iterator[Scalar]:
        return given(self.x, self.body)


@dataclass(eq=False)
class Scan(Region):
    """Running sums of ``x`` along its last dimension."""

    node: fx.Node
    x: Scalar
    out: View

    def reads(self) -> Iterator[Buffer]:
        return buffers(self.x)

    def writes(self) -> Iterator[Buffer]:
        yield self.out.buffer

    def bodies(self) -> Iterator[Scalar]:
        yield self.x


@dataclass(eq=False)
class TopK(Region):
    """The k largest of each row of ``x`` (its last dimension), in falling order, and where they were."""

    node: fx.Node
    x: View
    values: View
    indices: View

    def reads(self) -> Iterator[Buffer]:
        yield self.x.buffer

    def writes(self) -> Iterator[Buffer]:
        yield self.values.buffer
        yield self.indices.buffer


@dataclass(eq=False)
class Attention(Region):
    """softmax(scale q k^T) v with rotation of q and k before, and the cache's update; see the dialect.

    Attributes:
        rope: (cos, sin, interleaved) by which q and new k are still to be rotated; None where they are.
        start: how many tokens the cache holds; None without a cache. It is 0, and the cache is memory of the run's own,
            where the program rounds keys and values that no cache keeps.
        k_scale, v_scale: of an int8 cache, or one with two four-bit numbers a byte (each plus 8): [B, G, C], the scale
            of each token in each head; None where the cache holds floats.
        k_offset: float32 [G, 1, D], taken off rotated keys before they are held; only where there is a cache.
        pages: int32 [B, most]: where the tokens of page j lie; the caches, and their scales, are then
            [pages, G, page_size, D]. None where they are contiguous.
        lengths: int64 [B], beside ``pages``: how many tokens each row holds, in place of ``start``.
        fixed: columns of ``pages`` that stay; the others take turns where there are more blocks than columns.
        q_first, first: rotated queries with which the so many first keys of each row are looked at.
        pattern: what each head keeps; None for everything.
        skip: the share of a row's attention that may be left out; 0 for none.
        k_bounds: float32 [B or pages, G, blocks, 2, D], for a pattern with ``top``: the lowest and the highest number
            of each channel in each block of keys.
        mass, votes: float32 [B, G, C], to which is added what keys get of the last ``votes`` queries, 0 for all.
    """

    node: fx.Node
    q: View
    k: View
    v: View
    out: View
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    rope: tuple[View, View, bool] | None = None
    k_cache: View | None = None
    v_cache: View | None = None
    start: Size | None = None
    key_mask: View | None = None
    bias: View | None = None
    sinks: View | None = None
    slopes: View | None = None
    k_scale: View | None = None
    v_scale: View | None = None
    k_offset: View | None = None
    pages: View | None = None
    lengths: View | None = None
    fixed: int = 0
    q_first: View | None = None
    first: int = 0
    pattern: Pattern | None = None
    skip: float = 0.0
    k_bounds: View | None = None
    mass: View | None = None
    votes: int = 0

    def reads(self) -> Iterator[Buffer]:
        rope = self.rope[:2] if self.rope else ()
        optional = (self.pages, self.lengths, self.k_offset, self.q_first, self.key_mask, self.bias)
        for view in (self.q, self.k, self.v, *rope, *self._cache, *optional, self.sinks, self.slopes):
            if view is not None:
                yield view.buffer

    def writes(self) -> Iterator[Buffer]:
        yield self.out.buffer
        yield from (view.buffer for view in self._cache if view is not None)

    @property
    def _cache(self) -> tuple[View | None, ...]:
        return self.k_cache, self.v_cache, self.k_scale, self.v_scale, self.k_bounds, self.mass


@dataclass(eq=False)
class Foreign(Region):
    """A node without a kernel: PyTorch runs it between two segments.

    Attributes:
        args, kwargs: of the node, with views and sizes in place of nodes.
        dtypes: what PyTorch is to see where floats are held wider than the Program says.
        outs: its results; None for what is no tensor.
        reason: why it has no kernel.
    """

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtypes: dict[View, torch.dtype]
    outs: tuple[Buffer | None, ...]
    reason: str

    def reads(self) -> Iterator[Buffer]:
        return iter([view.buffer for view in self.dtypes])

    def writes(self) -> Iterator[Buffer]:
        return (out for out in self.outs if out is not None)


@dataclass
class Schedule:
    """The regions of a Program in the order they run, and the buffers between them.

    Attributes:
        dims: name of each symbolic dimension -> (input, dimension) where a call finds it.
        pitches: name of a distance between rows -> the input that has it; see ``Wants.pitched``.
        inputs, outputs: in the Program's order.
    """

    regions: list[Region] = field(default_factory=list)
    inputs: list[Buffer] = field(default_factory=list)
    outputs: list[Buffer] = field(default_factory=list)
    weights: list[Buffer] = field(default_factory=list)
    dims: dict[str, tuple[int, int]] = field(default_factory=dict)
    pitches: dict[str, int] = field(default_factory=dict)

    @property
    def foreign(self) -> list[Foreign]:
        return [region for region in self.regions if isinstance(region, Foreign)]

    @property
    def segments(self) -> int:
        """How many stretches of generated code there are, with PyTorch between them."""
        kinds = [isinstance(region, Foreign) for region in self.regions]
        return sum(not kind and (i == 0 or kinds[i - 1]) for i, kind in enumerate(kinds))
