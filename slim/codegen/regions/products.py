"""Matrix products as regions: weights and how they are stored, the rows that they read, and where results go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from slim.codegen.regions.scalars import Scalar, views
from slim.codegen.regions.schedule import Norm, Region, given
from slim.codegen.regions.views import Buffer, Size, View


@dataclass(frozen=True)
class Matrix:
    """A weight [m, n], or a stack of them [E, m, n].

    Attributes:
        format: "f32", "bf16", "f16", "int8", "int4", "int3", "nf4" or "fp8" (e4m3).
        data: of a quantised format the packed buffer, or what PyTorch keeps: two int4 numbers a byte.
        scale: one scale a row [.., m], or one a group [.., m, n / group]; None where the packed data holds them.
        group: numbers of a row that share a scale; 0 for one scale a row.
        zero: the zero points, of the shape of the scales, for w = (q - zero) scale; None where there are none, or the
            packed data holds them.
        zero_format: "int8", or "int4" or "int3" for zero points packed as such numbers are; "" where there are none.
    """

    format: str
    data: Buffer
    scale: Buffer | None
    m: int
    n: int
    group: int = 0
    zero: Buffer | None = None
    zero_format: str = ""

    @property
    def is_quantized(self) -> bool:
        return self.format in ("int8", "int4", "int3", "nf4", "fp8")


@dataclass(eq=False)
class Product:
    """One matrix product, as an anchor: its results are ``Lane(self)`` in the body of its part."""

    matrix: Matrix
    source: Source
    shape: tuple[Size, ...]
    node: fx.Node


@dataclass(frozen=True)
class Source:
    """The input rows of a linear: the rows of ``view``, normalised first where ``norm`` says so.

    With ``expert`` [rows], row r is multiplied by matrix ``expert[r]`` of a stack. With ``scale``, of the shape of the
    rows, they are rounded to int8 in its steps: clamp(round(x / scale), -128, 127). With ``own_step`` the step of a row
    is what slim.token_scale says of it, and whoever loads the row finds it.
    """

    view: View
    norm: Norm | None = None
    expert: View | None = None
    scale: View | None = None
    own_step: bool = False

    @property
    def is_rounded(self) -> bool:
        return self.own_step or self.scale is not None

    def buffers(self) -> Iterator[Buffer]:
        yield self.view.buffer
        yield from (view.buffer for view in (self.expert, self.scale) if view is not None)
        if self.norm is not None:
            yield from self.norm.reads()


@dataclass(eq=False)
class Pair:
    """A linear of low rank in pivot storage, as an anchor: [pivots, rest] with its columns in another order.

    Attributes:
        pivots: the results that are rows of the whole weight, in memory.
        product: what makes the others of them.
        rest: those others, over ``Lane(product)``.
        order: name of the weight int64 [m] that says which of [pivots, rest] stands at each column.
    """

    node: fx.Node
    shape: tuple[Size, ...]
    pivots: View
    product: Product
    rest: Scalar
    order: str


@dataclass(eq=False)
class Placed:
    """Results that go to columns of their own in a wider whole, and what is made of them there.

    Attributes:
        columns: int64: result c goes to column ``columns[c]``, no two to one.
        pair: the anchor that a result is, in ``body``.
        body: over the shape of ``out``.
    """

    columns: View
    pair: Pair
    body: Scalar
    out: View


@dataclass(eq=False)
class Part:
    """Products whose results are needed together, what is made of them, and where that goes.

    Attributes:
        out: the results side by side; None where nobody reads them so.
        placed: where they go as well.
    """

    products: tuple[Product, ...]
    body: Scalar
    out: View | None
    placed: Placed | None = None

    @property
    def shape(self) -> tuple[Size, ...]:
        """What ``body`` is over."""
        return self.products[0].shape if self.out is None else self.out.shape

    def views(self) -> list[View]:
        """What is read after the products."""
        placed = [self.placed.columns, *views(self.placed.body)] if self.placed is not None else []
        return [*views(self.body), *placed]

    def outs(self) -> list[View]:
        """Where results are stored."""
        placed = [self.placed.out] if self.placed is not None else []
        return [*([self.out] if self.out is not None else []), *placed]


@dataclass(eq=False)
class Linear(Region):
    """One sweep over weights that share their input rows."""

    node: fx.Node
    source: Source
    parts: list[Part]

    def reads(self) -> Iterator[Buffer]:
        yield from self.source.buffers()
        for part in self.parts:
            yield from (view.buffer for view in part.views())
            for product in part.products:
                yield product.matrix.data
                held = (product.matrix.scale, product.matrix.zero)
                yield from (buffer for buffer in held if buffer is not None)

    def writes(self) -> Iterator[Buffer]:
        yield from (view.buffer for part in self.parts for view in part.outs())

    def bodies(self) -> Iterator[Scalar]:
        for part in self.parts:
            yield from given(part.body, part.placed.body if part.placed is not None else None)

    def anchors(self) -> Iterator[fx.Node]:
        if self.source.norm is not None:
            yield self.source.norm.node
        yield from (product.node for part in self.parts for product in part.products)
