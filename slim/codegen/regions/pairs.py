"""Linears of low rank in pivot storage: rows of the weight, and coefficients that make the other results of theirs.

The Program writes one as ``index_select(cat([h, rest]), order)`` with ``h = linear(x, pivots)`` and
``rest = linear(h, coefficients)``. Nothing of that is moved: both products store each result at its final column, and
what reads the whole (a bias, a residual, an activation) is done there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from slim.codegen.regions import linears
from slim.codegen.regions.pointwise import const, op
from slim.codegen.regions.products import Linear, Pair, Part, Placed, Product
from slim.codegen.regions.rounded import readers, rounding
from slim.codegen.regions.scalars import BOOL, I64, Gather, Lane, Load, Scalar, Value, lanes, rebuild, views
from slim.codegen.regions.schedule import Pointwise
from slim.codegen.regions.views import Size, View, same
from slim.compiler.program import Program
from slim.compiler.rules import argument
from slim.compiler.uses import LINEAR

if TYPE_CHECKING:
    from slim.codegen.regions.lower import Lowering

aten = torch.ops.aten

INVERSE = "inverse"  # the packing of an order as kernels read it: where each result goes, not whence each column comes


class Pivoted(NamedTuple):
    """The nodes of one, and the name of its order."""

    pivots: fx.Node
    rest: fx.Node
    both: fx.Node
    order: str


def pivoted(program: Program) -> dict[fx.Node, Pivoted]:
    """What is stored by pivots, by the node that puts its results in order."""
    found = {node: _pivoted(program, node) for node in program.nodes(aten.index_select.default)}
    return {node: nodes for node, nodes in found.items() if nodes is not None}


def _pivoted(program: Program, node: fx.Node) -> Pivoted | None:
    both, order, last = cast(Any, node.args[0]), cast(Any, node.args[2]), node.meta["val"].dim() - 1
    if both.target is not aten.cat.default or readers(both) != [node] or order.op != "get_attr":
        return None
    if len(both.args[0]) != 2 or any(argument(each, "dim") % (last + 1) != last for each in (both, node)):
        return None
    pivots, rest = both.args[0]
    if pivots.target is not LINEAR or rest.target is not LINEAR or readers(rest) != [both]:
        return None
    rows = rounding(rest.args[0])
    if pivots is not (rest.args[0] if rows is None else rows.x):
        return None
    name = str(order.target)
    return Pivoted(pivots, rest, both, name) if is_permutation(program.weights[name], both) else None


def is_permutation(order: Tensor, both: fx.Node) -> bool:
    """Whether each column of ``both`` goes to one place."""
    count = int(both.meta["val"].shape[-1])
    return order.dtype == I64 and bool(torch.equal(order.sort().values.cpu(), torch.arange(count)))


def inverse(order: Tensor) -> Tensor:
    """The place of each result, for an order that says which result is at each place."""
    return torch.argsort(order)


def pair(lowering: Lowering, node: fx.Node) -> Value | None:
    """The whole of a linear in pivot storage, still to be stored; None where its products are not the run's own."""
    nodes = lowering.pivoted[node]
    shape, dtype = lowering.type(node)
    rest, pivots = lowering.value(nodes.rest), lowering.value(nodes.pivots)
    products = lanes(rest.body)
    if len(products) != 1 or not isinstance(products[0], Product) or not isinstance(pivots.body, Load):
        return None
    held = pivots.body.view
    if _inner(lowering, held) is None:
        return None
    return Value(Lane(Pair(node, shape, held, products[0], rest.body, nodes.order)), shape, dtype)


def _inner(lowering: Lowering, pivots: View) -> tuple[int, Part] | None:
    """(the sweep, its part) that stores the pivots."""
    index = lowering.writer.get(pivots.buffer, -1)
    region = lowering.schedule.regions[index] if index >= 0 else None
    parts = region.parts if isinstance(region, Linear) else []
    return next(((index, part) for part in parts if part.out is not None and part.out.buffer is pivots.buffer), None)


def emit(lowering: Lowering, pair: Pair, body: Scalar, out: View) -> None:
    """Has both products store ``body`` at its columns; gathers where the first comes too early for what it reads."""
    found = _inner(lowering, pair.pivots)
    assert found is not None
    index, part = found
    needed = max((lowering.writer.get(view.buffer, -1) for view in views(body)), default=-1)
    if part.placed is not None or needed >= index:
        _gather(lowering, pair, body, out)
        return
    places = lowering.weight(pair.order, packing=INVERSE).view()
    rank = pair.pivots.shape[-1]
    part.placed = Placed(places.slice(0, 0, rank), pair, body, out)
    others = Placed(places.slice(0, rank, pair.shape[-1] - rank), pair, body, out)
    linears.emit(lowering, Part((pair.product,), pair.rest, None, others))


def _gather(lowering: Lowering, pair: Pair, body: Scalar, out: View) -> None:
    """One region reads each column of ``out`` from where its product left it."""
    rest = lowering.store(Value(pair.rest, pair.product.shape), fresh=True)
    rank, shape = pair.pivots.shape[-1], out.shape
    order = Load(lowering.weight(pair.order).view().expand(shape))
    first, last = const(0, I64), const(rank - 1, I64)
    chosen = _picked(pair.pivots, op("min", order, last), shape)
    other = _picked(rest, op("max", op("sub", order, const(rank, I64)), first), shape)
    whole = op("where", op("le", order, last, dtype=BOOL), chosen, other, dtype=chosen.dtype)
    done = rebuild(body, lambda scalar: whole if isinstance(scalar, Lane) and scalar.anchor is pair else None)
    lowering.emit(Pointwise(lowering.node, out, done))


def _picked(view: View, column: Scalar, shape: tuple[Size, ...]) -> Gather:
    """Column ``column`` of the rows of ``view``, over ``shape``."""
    rows = view.reshape((*shape[:-1], view.shape[-1]))
    assert rows is not None, "rows stay rows"
    assert same(rows.strides[-1], 1)
    return Gather(View(view.buffer, shape, (*rows.strides[:-1], 0), rows.offset), ((column, 1, None),))


__all__ = ["INVERSE", "Pivoted", "emit", "inverse", "pair", "pivoted"]
