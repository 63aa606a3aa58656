"""Norms, softmax, sums and the like: what looks at whole rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import methodcaller
from typing import Any

import torch
from torch import fx

from slim.codegen.regions import linears
from slim.codegen.regions.lower import Lowering, Unsupported, handles
from slim.codegen.regions.pointwise import const, op
from slim.codegen.regions.scalars import (
    BOOL,
    F32,
    I64,
    Iota,
    Lane,
    Load,
    Op,
    Scalar,
    SizeOf,
    Value,
    cast,
    computed,
    expand,
)
from slim.codegen.regions.schedule import Norm, Reduce, Scan, TopK
from slim.codegen.regions.views import Size, Strided, View
from slim.compiler.rules import argument

aten, slim = torch.ops.aten, torch.ops.slim

handles(aten.linear.default)(linears.linear)
handles(slim.expert_linear.default)(linears.expert_linear)


@handles(slim.rms_norm.default, slim.layer_norm.default)
def norm(lowering: Lowering, node: fx.Node) -> Value:
    """slim.rms_norm and slim.layer_norm."""
    shape, dtype = lowering.type(node)
    kind = "rms" if node.target is slim.rms_norm.default else "layer"
    x = lowering.plain(lowering.value(node.args[0]))
    gain = _vector(lowering, argument(node, "weight"))
    bias = _vector(lowering, argument(node, "bias")) if kind == "layer" else None
    region = Norm(node, kind, x.body, shape, gain, bias, argument(node, "eps"), argument(node, "offset"))  # type: ignore[arg-type]
    return Value(Lane(region), shape, dtype)


def _vector(lowering: Lowering, node: Any) -> View | None:
    return None if node is None else lowering.rows(node)


@handles(aten.softmax.int, aten._softmax.default)
def softmax(lowering: Lowering, node: fx.Node) -> Value:
    """Softmax over one dimension."""
    shape, dtype = lowering.type(node)
    dim = int(node.args[1]) % len(shape)  # type: ignore[arg-type]
    order = [d for d in range(len(shape)) if d != dim] + [dim]
    x = _permuted(lowering, lowering.value(node.args[0]), order)
    region = Norm(node, "softmax", cast(x.body, F32), x.shape)
    value = Value(Lane(region), x.shape, dtype)
    return value if dim == len(shape) - 1 else _permuted(lowering, value, _inverse(order))


def _permuted(lowering: Lowering, value: Value, order: Sequence[int]) -> Value:
    if list(order) == list(range(len(order))):
        return lowering.plain(value)
    return lowering.remapped(value, [value.shape[d] for d in order], lambda leaf: leaf.permute(order))


def _inverse(order: Sequence[int]) -> list[int]:
    return [list(order).index(d) for d in range(len(order))]


# -- reductions --------------------------------------------------------------------------------------------------------

_KINDS: dict[Any, str] = {
    aten.sum.dim_IntList: "sum", aten.sum.default: "sum", aten.mean.dim: "mean", aten.mean.default: "mean",
    aten.amax.default: "max", aten.amin.default: "min", aten.any.default: "any", aten.any.dim: "any",
    aten.any.dims: "any", aten.all.default: "all", aten.all.dim: "all", aten.prod.dim_int: "prod",
    aten.argmax.default: "argmax", aten.argmin.default: "argmin", aten.max.default: "max", aten.min.default: "min",
}  # fmt: skip


@handles(*_KINDS)
def reduce(lowering: Lowering, node: fx.Node) -> Value:
    """Sums, means, extremes and the like, over any dimensions."""
    kind = _KINDS[node.target]
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    dims = argument(node, "dim") if "dim" in names else None
    keep = bool(argument(node, "keepdim")) if "keepdim" in names else False
    x = lowering.value(node.args[0])
    if kind in ("argmax", "argmin") and dims is None:
        raise Unsupported(f"{node.target} over all dimensions has no kernel")
    return reduced(lowering, node, kind, x, dims, keep)


def reduced(lowering: Lowering, node: fx.Node, kind: str, x: Value, dims: Any, keep: bool) -> Value:
    """``x`` reduced over ``dims`` (None: all), of the type that ``node`` has."""
    dtype = (node.meta["val"][0] if isinstance(node.meta["val"], (tuple, list)) else node.meta["val"]).dtype
    rank = len(x.shape)
    chosen = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    away = sorted(int(d) % rank for d in chosen)
    kept = [d for d in range(rank) if d not in away]
    moved = _permuted(lowering, x, kept + away)
    shape = tuple(x.shape[d] for d in kept)
    whole = "sum" if kind == "mean" else kind
    inner = {"any": BOOL, "all": BOOL}.get(kind, computed(dtype) if kind not in ("argmax", "argmin") else None)
    body = moved.body if inner is None else cast(moved.body, inner)
    region = Reduce(node, whole, body, moved.shape, len(away))  # type: ignore[arg-type]
    result: Scalar = Lane(region, computed(dtype))
    if kind == "mean":
        count = math.prod(x.shape[d] for d in away)
        result = op("div", result, cast(SizeOf(count), F32))
    value = Value(Load(lowering.store(Value(result, shape, dtype))), shape, dtype)
    if not keep:
        return value
    for dim in away:
        shape = (*shape[:dim], 1, *shape[dim:])
        value = lowering.remapped(value, shape, methodcaller("unsqueeze", dim))
    return value


@handles(slim.token_scale.default)
def token_scale(lowering: Lowering, node: fx.Node) -> Value:
    """slim.token_scale: the largest magnitude of a row as 127 steps."""
    x = lowering.value(node.args[0])
    size = Value(op("abs", cast(x.body, F32)), x.shape, F32)
    largest = reduced(lowering, node, "max", size, -1, False)
    step = op("div", cast(largest.body, F32), const(127.0, F32))
    return Value(op("max", step, const(torch.finfo(F32).tiny, F32)), largest.shape, F32)


@handles(aten.var.correction, aten.std.correction, aten.std.dim, aten.var.dim)
def variance(lowering: Lowering, node: fx.Node) -> Value:
    """Variance and standard deviation, in two passes."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    dims, keep = argument(node, "dim"), bool(argument(node, "keepdim"))
    if "correction" in names:
        correction = argument(node, "correction")
        correction = 1 if correction is None else correction
    else:
        correction = 1 if argument(node, "unbiased") else 0
    x = lowering.plain(lowering.value(node.args[0]))
    mean = reduced(lowering, node, "mean", x, dims, True)
    distance = op("sub", cast(x.body, F32), expand(mean, x.shape))
    total = reduced(lowering, node, "sum", Value(op("mul", distance, distance), x.shape, x.dtype), dims, keep)
    rank = len(x.shape)
    chosen = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    count = math.prod(x.shape[int(d) % rank] for d in chosen) - correction
    body = op("div", cast(total.body, F32), cast(SizeOf(count), F32))
    root = "std" in node.target._schema.name  # type: ignore[union-attr]
    return Value(op("sqrt", body) if root else body, total.shape, total.dtype)


@handles(aten.cumsum.default)
def cumsum(lowering: Lowering, node: fx.Node) -> Value:
    """Running sums along one dimension."""
    shape, dtype = lowering.type(node)
    dim = int(node.args[1]) % len(shape)  # type: ignore[arg-type]
    order = [d for d in range(len(shape)) if d != dim] + [dim]
    x = _permuted(lowering, lowering.value(node.args[0]), order)
    out = lowering.temp(x.shape, dtype).view()
    lowering.emit(Scan(node, cast(x.body, computed(dtype)), out))
    return _permuted(lowering, Value(Load(out), x.shape, dtype), _inverse(order))


@handles(aten.scatter.value)
def scatter_value(lowering: Lowering, node: fx.Node) -> Value:
    """One number at chosen indices of the last dimension: an element changes if any index is its own."""
    shape, dtype = lowering.type(node)
    x, index = (lowering.plain(lowering.value(node.args[i])) for i in (0, 2))
    last = len(shape) - 1
    if int(node.args[1]) % len(shape) != last or index.shape[:-1] != x.shape[:-1]:  # type: ignore[arg-type]
        raise Unsupported(f"{node.target} has a kernel for whole rows of the last dimension")
    space = (*shape, index.shape[-1])
    own = Iota(Strided(space, tuple(int(d == last) for d in range(len(space)))))
    chosen = lowering.remapped(index, (*shape[:-1], 1, index.shape[-1]), methodcaller("unsqueeze", last))
    same_place = op("eq", own, cast(expand(chosen, space), I64), dtype=BOOL)
    hit = Load(lowering.store(Value(Lane(Reduce(node, "any", same_place, space, 1), BOOL), shape, torch.bool)))
    body = op("where", hit, const(argument(node, "value"), computed(dtype)), x.body, dtype=computed(dtype))
    return Value(body, shape, dtype)


@handles(aten.topk.default)
def topk(lowering: Lowering, node: fx.Node) -> tuple[Value, ...]:
    """The k largest of each row."""
    x, k = node.args[:2]
    dim, largest = argument(node, "dim"), argument(node, "largest")
    rank = len(lowering.shape(x))  # type: ignore[arg-type]
    if not largest or dim % rank != rank - 1 or not isinstance(k, int):
        raise Unsupported(f"{node.target} has a kernel for the largest of the last dimension")
    values, indices = node.meta["val"]
    shape: tuple[Size, ...] = tuple(lowering.size(size) for size in values.shape)
    out = lowering.temp(shape, values.dtype).view(), lowering.temp(shape, indices.dtype).view()
    lowering.emit(TopK(node, lowering.rows(x), *out))
    return Value(Load(out[0]), shape, values.dtype), Value(Load(out[1]), shape, indices.dtype)


@handles(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(lowering: Lowering, node: fx.Node) -> Value:
    """A product of two computed tensors: a sum over products. Correct at any shape, and not meant for large ones."""
    shape, dtype = lowering.type(node)
    a, b = (lowering.plain(lowering.value(arg)) for arg in node.args[:2])
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise Unsupported(f"{node.target} of a vector has no kernel")
    depth = a.shape[-1]
    space = (*shape, depth)
    left = lowering.remapped(a, (*a.shape[:-1], 1, depth), lambda leaf: leaf.unsqueeze(len(leaf.shape) - 1))
    order = [*range(len(b.shape) - 2), len(b.shape) - 1, len(b.shape) - 2]
    right = _permuted(lowering, b, order)
    right = lowering.remapped(
        right, (*right.shape[:-2], 1, *right.shape[-2:]), lambda leaf: leaf.unsqueeze(len(leaf.shape) - 2)
    )
    body = Op("mul", (cast(expand(left, space), F32), cast(expand(right, space), F32)), F32)
    region = Reduce(node, "sum", body, space, 1)
    return Value(Load(lowering.store(Value(Lane(region), shape, dtype))), shape, dtype)
