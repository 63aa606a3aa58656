"""Tensors made from indices, and reads at computed indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from slim.codegen.regions import pairs
from slim.codegen.regions.lower import Lowering, Unsupported, handles
from slim.codegen.regions.pointwise import const, op
from slim.codegen.regions.scalars import (
    F32,
    I64,
    Gather,
    Iota,
    Load,
    Scalar,
    SizeOf,
    Value,
    cast,
    computed,
    expand,
    rebuild,
)
from slim.codegen.regions.views import Size, Strided, View, same
from slim.compiler.dialect.quant import NF4
from slim.compiler.rules import argument

aten, slim = torch.ops.aten, torch.ops.slim


@handles(aten.embedding.default)
def embedding(lowering: Lowering, node: fx.Node) -> Value:
    """Rows of a table, also of a quantised one: only the rows asked for are restored."""
    shape, dtype = lowering.type(node)
    table = lowering.value(node.args[0])
    tokens = lowering.plain(lowering.value(node.args[1]))
    index = expand(lowering.remapped(tokens, (*tokens.shape, 1), lambda leaf: leaf.unsqueeze(len(leaf.shape))), shape)
    body = pick(table.body, shape, {0: index}, {1: len(shape) - 1})
    return Value(body, shape, dtype)


def pick(body: Scalar, shape: Sequence[Size], indexed: dict[int, Scalar], passed: dict[int, int]) -> Scalar:
    """``body`` over ``shape``: its dimension d is at ``indexed[d]``, or walks with dimension ``passed[d]``."""

    def change(scalar: Scalar) -> Scalar | None:
        if isinstance(scalar, (Load, Gather)):
            view = scalar.view
            strides = [0] * len(shape)
            for source, target in passed.items():
                strides[target] = view.strides[source]
            terms = [
                (index, view.strides[d], view.shape[d]) for d, index in indexed.items() if not same(view.strides[d], 0)
            ]
            if isinstance(scalar, Gather):
                terms += [(rebuild(index, change), *rest) for index, *rest in scalar.terms]
            return Gather(View(view.buffer, shape, strides, view.offset), tuple(terms))
        if isinstance(scalar, Iota):
            strides = [0] * len(shape)
            for source, target in passed.items():
                strides[target] = scalar.map.strides[source]
            total: Scalar = Iota(Strided(tuple(shape), tuple(strides), scalar.map.offset))
            for d, index in indexed.items():
                if not same(scalar.map.strides[d], 0):
                    total = op("add", total, op("mul", index, cast(SizeOf(scalar.map.strides[d]), I64)))
            return total
        return None

    return rebuild(body, change)


@handles(aten.index_select.default)
def index_select(lowering: Lowering, node: fx.Node) -> Value:
    """Chosen indices of one dimension; or the end of a linear in pivot storage."""
    if node in lowering.pivoted:
        whole = pairs.pair(lowering, node)
        if whole is not None:
            return whole
        lowering.once(lowering.pivoted[node].both)
    shape, dtype = lowering.type(node)
    value = lowering.plain(lowering.value(node.args[0]))
    dim = int(node.args[1]) % len(shape)  # type: ignore[arg-type]
    index = lowering.plain(lowering.value(node.args[2]))
    spread = lowering.remapped(
        index, [index.shape[0] if d == dim else 1 for d in range(len(shape))], lambda leaf: _lifted(leaf, dim, shape)
    )
    passed = {d: d for d in range(len(shape)) if d != dim}
    return Value(pick(value.body, shape, {dim: expand(spread, shape)}, passed), shape, dtype)


def _lifted(leaf: Any, dim: int, shape: Sequence[Size]) -> Any:
    """A map of one dimension as one of all, that dimension at ``dim``."""
    for d in range(len(shape)):
        if d < dim:
            leaf = leaf.unsqueeze(0)
        elif d > dim:
            leaf = leaf.unsqueeze(d)
    return leaf


@handles(aten.gather.default)
def gather(lowering: Lowering, node: fx.Node) -> Value:
    """An index of one dimension for every element."""
    shape, dtype = lowering.type(node)
    value = lowering.plain(lowering.value(node.args[0]))
    dim = int(node.args[1]) % len(shape)  # type: ignore[arg-type]
    index = lowering.plain(lowering.value(node.args[2]))
    passed = {d: d for d in range(len(shape)) if d != dim}
    return Value(pick(value.body, shape, {dim: index.body}, passed), shape, dtype)


@handles(aten.index.Tensor)
def index(lowering: Lowering, node: fx.Node) -> Value:
    """x[i, j, ...] with tensors of integers for neighbouring dimensions."""
    shape, dtype = lowering.type(node)
    value = lowering.plain(lowering.value(node.args[0]))
    given = list(node.args[1])  # type: ignore[arg-type]
    dims = [d for d, i in enumerate(given) if i is not None]
    if dims != list(range(dims[0], dims[-1] + 1)):
        raise Unsupported(f"{node.target} has a kernel for neighbouring dimensions")
    indices = [lowering.plain(lowering.value(given[d])) for d in dims]
    if any(i.dtype == torch.bool for i in indices):
        raise Unsupported(f"{node.target} by a mask has no kernel: the size of its result is not known")
    rank = len(shape) - (len(value.shape) - len(dims))  # of the indices, broadcast against each other
    passed = {d: d if d < dims[0] else d - len(dims) + rank for d in range(len(value.shape)) if d not in dims}
    front, back = dims[0], len(shape) - dims[0] - rank
    indexed: dict[int, Scalar] = {}
    for d, i in zip(dims, indices, strict=True):
        wide = lowering.remapped(i, (*i.shape, *[1] * back), lambda leaf: _trailing(leaf, back))
        inner = expand(wide, (*shape[front:],))
        whole = lowering.remapped(
            Value(inner, tuple(shape[front:])), (*[1] * front, *shape[front:]), lambda leaf: _leading(leaf, front)
        )
        size = value.shape[d]
        at = cast(expand(whole, shape), I64)
        wrapped = op("add", at, cast(SizeOf(size), I64))
        indexed[d] = op("where", op("lt", at, const(0, I64), dtype=torch.bool), wrapped, at, dtype=I64)
    return Value(pick(value.body, shape, indexed, passed), shape, dtype)


def _trailing(leaf: Any, count: int) -> Any:
    for _ in range(count):
        leaf = leaf.unsqueeze(len(leaf.shape))
    return leaf


def _leading(leaf: Any, count: int) -> Any:
    for _ in range(count):
        leaf = leaf.unsqueeze(0)
    return leaf


# -- tensors from nothing ----------------------------------------------------------------------------------------------


@handles(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(lowering: Lowering, node: fx.Node) -> Value:
    """start, start + step, ..."""
    shape, dtype = lowering.type(node)
    start: Any = 0 if node.target is aten.arange.default else node.args[0]
    step: Any = argument(node, "step") if node.target is aten.arange.start_step else 1
    if computed(dtype) != I64 or isinstance(step, fx.Node):
        whole = op("mul", cast(Iota(Strided(shape, (1,))), F32), const(float(step), F32))
        return Value(op("add", whole, const(float(start), F32)), shape, dtype)
    return Value(Iota(Strided(shape, (int(step),), lowering.size(start))), shape, dtype)


@handles(aten.full.default, aten.full_like.default, aten.zeros.default, aten.ones.default, aten.zeros_like.default,
         aten.ones_like.default, aten.scalar_tensor.default, aten.new_zeros.default, aten.new_ones.default,
         aten.new_full.default)  # fmt: skip
def full(lowering: Lowering, node: fx.Node) -> Value:
    """One number everywhere."""
    shape, dtype = lowering.type(node)
    name = node.target._schema.name  # type: ignore[union-attr]
    fill: Any = 0 if "zeros" in name else 1
    if "full" in name:
        fill = argument(node, "fill_value")
    elif "scalar_tensor" in name:
        fill = node.args[0]
    body = (
        cast(SizeOf(lowering.size(fill)), computed(dtype))
        if isinstance(fill, fx.Node)
        else const(fill, computed(dtype))
    )
    return Value(body, shape, dtype)


@handles(aten.tril.default, aten.triu.default)
def triangle(lowering: Lowering, node: fx.Node) -> Value:
    """The lower or upper triangle; zeros elsewhere."""
    shape, dtype = lowering.type(node)
    value = lowering.plain(lowering.value(node.args[0]))
    rank = len(shape)
    row, column = (Iota(Strided(shape, tuple(int(d == axis) for d in range(rank)))) for axis in (rank - 2, rank - 1))
    bound = op("add", row, const(argument(node, "diagonal"), I64))
    name = "le" if node.target is aten.tril.default else "ge"
    kept = op(name, column, bound, dtype=torch.bool)
    body = op("where", kept, value.body, const(0, value.body.dtype), dtype=value.body.dtype)
    return Value(body, shape, dtype)


# -- quantised weights that no product reads ---------------------------------------------------------------------------


@handles(slim.quantize.default)
def quantize(lowering: Lowering, node: fx.Node) -> Value:
    """slim.quantize as pointwise work."""
    shape, dtype = lowering.type(node)
    x = lowering.value(node.args[0])
    axis, group = argument(node, "axis"), argument(node, "group_size")
    body = op("round", op("div", cast(x.body, F32), _spread(lowering, node.args[1], shape, axis, group)))
    zero_point = argument(node, "zero_point")
    if zero_point is not None:
        body = op("add", body, _spread(lowering, zero_point, shape, axis, group))
    low, high = (const(argument(node, name), F32) for name in ("low", "high"))
    return Value(cast(op("min", op("max", body, low), high), I64), shape, dtype)


@handles(slim.dequantize.default)
def dequantize(lowering: Lowering, node: fx.Node) -> Value:
    """slim.dequantize as pointwise work: for tables, of which rows are picked."""
    shape, dtype = lowering.type(node)
    q = lowering.plain(lowering.value(node.args[0]))
    axis, group = argument(node, "axis"), argument(node, "group_size")
    body: Scalar = cast(q.body, F32)
    zero_point = argument(node, "zero_point")
    if zero_point is not None:
        body = op("sub", body, _spread(lowering, zero_point, shape, axis, group))
    return Value(op("mul", body, _spread(lowering, node.args[1], shape, axis, group)), shape, dtype)


def _spread(lowering: Lowering, grid: Any, shape: Sequence[Size], axis: int | None, group: int | None) -> Scalar:
    """A scale or zero point for each element of ``shape``."""
    value = lowering.plain(lowering.value(grid))
    rank = len(shape)
    if axis is None or not value.shape:
        return cast(expand(value, shape), F32)
    if group is not None:
        dims: dict[int, Scalar] = {
            axis: op("floordiv", Iota(Strided(tuple(shape), tuple(int(d == axis) for d in range(rank)))),
                     const(group, I64))
        }  # fmt: skip
        return cast(pick(value.body, shape, dims, {d: d for d in range(rank) if d != axis}), F32)
    first = 0 if len(value.shape) > 1 else axis
    placed = [1] * first + list(value.shape) + [1] * (rank - first - len(value.shape))
    return cast(expand(lowering.remapped(value, placed, lambda leaf: leaf.reshape(placed)), shape), F32)


@handles(slim.unpack_int4.default)
def unpack_int4(lowering: Lowering, node: fx.Node) -> Value:
    """slim.unpack_int4: column 2j is the low nibble of byte j, 2j + 1 the high one, each as value + 8."""
    shape, dtype = lowering.type(node)
    return Value(op("sub", _nibble(lowering, node, shape), const(8, I64)), shape, dtype)


@handles(slim.unpack_nf4.default)
def unpack_nf4(lowering: Lowering, node: fx.Node) -> Value:
    """slim.unpack_nf4: the nibbles, each as its level, which its four bits choose by halves."""
    shape, dtype = lowering.type(node)
    code = _nibble(lowering, node, shape)
    levels: list[Scalar] = [const(level, I64) for level in NF4]
    for bit in range(4):
        is_set = op("ne", op("and", code, const(1 << bit, I64)), const(0, I64), dtype=torch.bool)
        levels = [
            op("where", is_set, high, low, dtype=I64) for low, high in zip(levels[::2], levels[1::2], strict=True)
        ]
    return Value(levels[0], shape, dtype)


def _nibble(lowering: Lowering, node: fx.Node, shape: Sequence[Size]) -> Scalar:
    """Half of a byte, 0..15."""
    column = _column(shape)
    byte = _byte(lowering, node, shape, op("floordiv", column, const(2, I64)))
    shift = op("mul", op("mod", column, const(2, I64)), const(4, I64))
    return op("and", op("shr", byte, shift), const(15, I64))


@handles(slim.unpack_int3.default)
def unpack_int3(lowering: Lowering, node: fx.Node) -> Value:
    """slim.unpack_int3: eight columns in the 24 bits of three bytes, each as value + 4."""
    shape, dtype = lowering.type(node)
    eight, one = const(8, I64), const(1, I64)
    column = _column(shape)
    bit = op("mul", op("mod", column, eight), const(3, I64))
    place = op("floordiv", bit, eight)  # of the three, where the number begins; it may end in the next
    first = op("mul", op("floordiv", column, eight), const(3, I64))
    after = op("min", op("add", place, one), const(2, I64))
    low, high = (_byte(lowering, node, shape, op("add", first, each)) for each in (place, after))
    both = op("or", low, op("shl", high, eight))
    code = op("and", op("shr", both, op("mod", bit, eight)), const(7, I64))
    return Value(op("sub", code, const(4, I64)), shape, dtype)


def _column(shape: Sequence[Size]) -> Scalar:
    last = len(shape) - 1
    return Iota(Strided(tuple(shape), tuple(int(d == last) for d in range(len(shape)))))


def _byte(lowering: Lowering, node: fx.Node, shape: Sequence[Size], index: Scalar) -> Scalar:
    """Byte ``index`` of each row of what ``node`` unpacks."""
    packed = lowering.plain(lowering.value(node.args[0]))
    last = len(shape) - 1
    return cast(pick(packed.body, shape, {last: index}, {d: d for d in range(last)}), I64)
