"""Views, and what joins tensors: no numbers are computed, and few are moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import methodcaller
from typing import Any

import torch
from torch import fx

from slim.codegen.regions.lower import Lowering, handles
from slim.codegen.regions.products import Pair, Product
from slim.codegen.regions.scalars import Load, Value, cast, computed, expand, lanes, remap
from slim.codegen.regions.views import Size, same
from slim.compiler.rules import argument

aten = torch.ops.aten


@handles(aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints,
         aten.unflatten.int)  # fmt: skip
def reshape(lowering: Lowering, node: fx.Node) -> Value:
    """The same numbers in the same order."""
    shape, dtype = lowering.type(node)
    value = lowering.value(node.args[0])
    anchors = lanes(value.body)
    if anchors and all(isinstance(a, (Product, Pair)) for a in anchors) and shape and same(value.shape[-1], shape[-1]):
        body = remap(value.body, lambda leaf: leaf.reshape(shape), rows=True)  # rows stay rows, whatever their number
        if body is not None:
            return Value(body, shape, dtype)
    return flattened(lowering, lowering.plain(value), shape)


@handles(aten.transpose.int, aten.permute.default, aten.t.default, aten.numpy_T.default, aten.mT.default)
def permute(lowering: Lowering, node: fx.Node) -> Value:
    """Dimensions in another order."""
    shape, _ = lowering.type(node)
    rank = len(shape)
    order = list(range(rank))
    if node.target is aten.transpose.int:
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    elif node.target is aten.permute.default:
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    elif node.target is aten.numpy_T.default:
        order.reverse()
    elif rank > 1:
        order[-2:] = [rank - 1, rank - 2]
    return lowering.remapped(lowering.value(node.args[0]), shape, lambda leaf: leaf.permute(order))


@handles(aten.unsqueeze.default)
def unsqueeze(lowering: Lowering, node: fx.Node) -> Value:
    """A new dimension of size 1."""
    shape, _ = lowering.type(node)
    dim = int(node.args[1]) % len(shape)  # type: ignore[arg-type]
    return lowering.remapped(lowering.value(node.args[0]), shape, lambda leaf: leaf.unsqueeze(dim))


@handles(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(lowering: Lowering, node: fx.Node) -> Value:
    """Without a dimension of size 1."""
    shape, _ = lowering.type(node)
    value = lowering.value(node.args[0])
    return lowering.remapped(value, shape, lambda leaf: leaf.reshape(shape))


@handles(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def broadcast(lowering: Lowering, node: fx.Node) -> Value:
    """Repeated without being copied."""
    shape, dtype = lowering.type(node)
    return Value(expand(lowering.plain(lowering.value(node.args[0])), shape), shape, dtype)


@handles(aten.repeat.default)
def repeat(lowering: Lowering, node: fx.Node) -> Value:
    """Copies side by side; a dimension of size 1 is repeated without being copied."""
    shape, dtype = lowering.type(node)
    value = lowering.plain(lowering.value(node.args[0]))
    old = (1,) * (len(shape) - len(value.shape)) + tuple(value.shape)
    counts = [lowering.size(count) for count in node.args[1]]  # type: ignore[union-attr]
    mixed: list[Size] = []
    spread: list[Size] = []
    for count, size in zip(counts, old, strict=True):
        mixed += [1, size]
        spread += [count, size]
    parted = lowering.remapped(value, mixed, lambda leaf: leaf.reshape(mixed))
    return flattened(lowering, Value(expand(parted, spread), tuple(spread), dtype), shape)


@handles(aten.repeat_interleave.self_int)
def repeat_interleave(lowering: Lowering, node: fx.Node) -> Value:
    """Each index of one dimension several times in a row."""
    shape, dtype = lowering.type(node)
    value = lowering.plain(lowering.value(node.args[0]))
    dim, count = argument(node, "dim"), lowering.size(node.args[1])
    if dim is None:
        value = lowering.remapped(value, (math.prod(value.shape),), lambda leaf: leaf.reshape((math.prod(leaf.shape),)))
        dim = 0
    dim = int(dim) % len(value.shape)
    parted = lowering.remapped(
        value, (*value.shape[: dim + 1], 1, *value.shape[dim + 1 :]), lambda leaf: leaf.unsqueeze(dim + 1)
    )
    spread = (*value.shape[: dim + 1], count, *value.shape[dim + 1 :])
    return flattened(lowering, Value(expand(parted, spread), spread, dtype), shape)


def flattened(lowering: Lowering, value: Value, shape: Sequence[Size]) -> Value:
    """``value`` under another shape: computed into memory where its maps cannot express it."""
    body = remap(value.body, lambda leaf: leaf.reshape(shape))
    if body is None:
        held = lowering.store(value, fresh=True).reshape(shape)
        assert held is not None, "a new buffer is contiguous"
        body = Load(held)
    return Value(body, tuple(shape), value.dtype)


@handles(aten.slice.Tensor)
def slice_(lowering: Lowering, node: fx.Node) -> Value:
    """Every step-th index of one dimension, from start on."""
    shape, _ = lowering.type(node)
    value = lowering.value(node.args[0])
    dim = int(argument(node, "dim")) % len(shape)
    start, step = argument(node, "start"), int(argument(node, "step"))
    first = _index(lowering, start or 0, value.shape[dim])
    return lowering.remapped(value, shape, lambda leaf: leaf.slice(dim, first, shape[dim], step))


def _index(lowering: Lowering, index: Any, size: Size) -> Size:
    """An index from the front, also where it was counted from the end."""
    known = lowering.size(index)
    if isinstance(known, int) and known < 0:
        return size + known
    return known


@handles(aten.select.int)
def select(lowering: Lowering, node: fx.Node) -> Value:
    """One index of one dimension."""
    shape, _ = lowering.type(node)
    value = lowering.value(node.args[0])
    dim = int(node.args[1]) % len(value.shape)  # type: ignore[arg-type]
    index = _index(lowering, node.args[2], value.shape[dim])
    return lowering.remapped(value, shape, lambda leaf: leaf.select(dim, index))


@handles(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def split(lowering: Lowering, node: fx.Node) -> tuple[Value, ...]:
    """Neighbouring parts along one dimension."""
    value = lowering.plain(lowering.value(node.args[0]))
    held = Value(Load(lowering.store(value)), value.shape, value.dtype)
    dim = int(argument(node, "dim")) % len(value.shape)
    parts: list[Value] = []
    start: Size = 0
    for part in node.meta["val"]:
        shape = tuple(lowering.size(size) for size in part.shape)
        if node.target is aten.unbind.int:
            parts.append(lowering.remapped(held, shape, methodcaller("select", dim, start)))
            start += 1
        else:
            length = shape[dim]
            parts.append(lowering.remapped(held, shape, methodcaller("slice", dim, start, length)))
            start = start + length
    return tuple(parts)


@handles(aten.cat.default, aten.concat.default, aten.stack.default)
def join(lowering: Lowering, node: fx.Node) -> Value:
    """Tensors side by side: each is computed into its place."""
    shape, dtype = lowering.type(node)
    dim = int(argument(node, "dim")) % len(shape)
    stacked = node.target is aten.stack.default
    out = lowering.temp(shape, dtype).view()
    start: Size = 0
    for part in node.args[0]:  # type: ignore[union-attr]
        value = lowering.value(part)
        if len(value.shape) != len(shape) - stacked:
            continue  # the empty tensor [0], which cat allows anywhere
        place = out.select(dim, start) if stacked else out.slice(dim, start, value.shape[dim])
        lowering.store(Value(cast(value.body, computed(dtype)), value.shape, dtype), place)
        start = start + (1 if stacked else value.shape[dim])
    return Value(Load(out), shape, dtype)


@handles(aten.flip.default)
def flip(lowering: Lowering, node: fx.Node) -> Value:
    """Some dimensions backwards."""
    shape, _ = lowering.type(node)
    dims = [int(d) % len(shape) for d in node.args[1]]  # type: ignore[union-attr, arg-type]

    def move(leaf: Any) -> Any:
        for dim in dims:
            leaf = leaf.slice(dim, shape[dim] - 1, shape[dim], -1)
        return leaf

    return lowering.remapped(lowering.value(node.args[0]), shape, move)
