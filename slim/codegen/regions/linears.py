"""Matrix products: which weight formats have a kernel, what is fused around a product, what shares a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from slim.codegen.regions.pointwise import op
from slim.codegen.regions.scalars import F32, Gather, Lane, Load, Scalar, Value, cast, expand, views
from slim.codegen.regions.schedule import Linear, Matrix, Norm, Part, Product, Source
from slim.codegen.regions.views import Size, View, same
from slim.compiler.rules import argument
from slim.compiler.uses import UNPACKS

if TYPE_CHECKING:
    from slim.codegen.regions.lower import Lowering

aten, slim = torch.ops.aten, torch.ops.slim

LANES = 2  # products whose results one store may combine: gate and up
FLOAT_FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def linear(lowering: Lowering, node: fx.Node) -> Value:
    """aten.linear: x [..., n] by W [m, n]."""
    source = _source(lowering, node.args[0])
    return _product(lowering, node, source, (*node.args, None)[2])


def expert_linear(lowering: Lowering, node: fx.Node) -> Value:
    """slim.expert_linear: row t of x [T, n] by W[expert[t]] of W [E, m, n]."""
    x, _, bias, expert = node.args
    plain = _source(lowering, x)
    source = Source(plain.view, plain.norm, lowering.rows(expert), plain.scale)
    return _product(lowering, node, source, bias)


def _product(lowering: Lowering, node: fx.Node, source: Source, bias: Any) -> Value:
    shape, dtype = lowering.type(node)
    product = Product(matrix(lowering, node.args[1]), source, shape, node)
    body: Scalar = Lane(product)
    if bias is not None:
        body = op("add", body, _bias(lowering, bias, source, shape))
    return Value(body, shape, dtype)


def _bias(lowering: Lowering, bias: Any, source: Source, shape: tuple[Size, ...]) -> Scalar:
    if source.expert is None:
        return cast(expand(lowering.plain(lowering.value(bias)), shape), F32)
    held = lowering.view(bias)
    chosen = Load(source.expert.unsqueeze(1).expand(shape))
    row = View(held.buffer, shape, (0,) * (len(shape) - 1) + (held.strides[1],), held.offset)
    return cast(Gather(row, ((chosen, held.strides[0], None),)), F32)


def _source(lowering: Lowering, x: Any) -> Source:
    """The rows that ``x`` holds, with the norm that makes them, or their rounding to int8, still to be done."""
    if x.op != "get_attr" and x.target is slim.dequantize.default and lowering.wants.int8_rows:
        rounded = _int8_rows(lowering, x)
        if rounded is not None:
            return rounded
    value = lowering.value(x)
    if isinstance(value.body, Lane) and isinstance(value.body.anchor, Norm):
        norm = value.body.anchor
        if norm.kind != "softmax":
            if not isinstance(norm.x, Load) or not same(norm.x.view.strides[-1], 1):
                norm.x = Load(lowering.store(Value(norm.x, norm.shape), fresh=True))
            return Source(norm.x.view, norm)
    return Source(lowering.rows(x))


def _int8_rows(lowering: Lowering, node: fx.Node) -> Source | None:
    """The rows of x where ``node`` is x rounded to int8 and back, with one scale a row or one for all."""
    q, scale = node.args[:2]
    if q.target is not slim.quantize.default or q.args[1] is not scale:  # type: ignore[union-attr]
        return None
    options = [(argument(each, "zero_point"), argument(each, "group_size")) for each in (q, node)]  # type: ignore[arg-type]
    whole = (argument(q, "low"), argument(q, "high")) == (-128, 127)  # type: ignore[arg-type]
    if options != [(None, None)] * 2 or not whole or argument(q, "axis") != argument(node, "axis"):  # type: ignore[arg-type]
        return None
    lead = lowering.shape(node)[:-1]
    steps = lowering.shape(scale)  # type: ignore[arg-type]
    if argument(node, "axis") is not None and not (len(steps) == len(lead) and all(map(same, steps, lead))):
        return None
    plain = _source(lowering, q.args[0])  # type: ignore[union-attr]
    if argument(node, "axis") is not None:
        view = lowering.view(scale)
    else:
        held = lowering.view(scale)
        view = View(held.buffer, lead, (0,) * len(lead), held.offset)
    return Source(plain.view, plain.norm, plain.expert, view)


# -- weights -----------------------------------------------------------------------------------------------------------


def matrix(lowering: Lowering, weight: Any) -> Matrix:
    """The weight that ``weight`` reads, in the format that it is stored in where there is a kernel for that."""
    shape = lowering.shape(weight)
    m, n = int(shape[-2]), int(shape[-1])
    if weight.op == "get_attr":
        name = str(weight.target)
        kind = FLOAT_FORMATS.get(lowering.program.weights.dtype(name))
        if kind in lowering.wants.formats:
            return Matrix(kind, lowering.weight(name), None, m, n)
    quantized = _quantized(lowering, weight, m, n) if weight.target is slim.dequantize.default else None
    if quantized is not None:
        return quantized
    view = lowering.view(weight)
    if not view.is_contiguous or not same(view.offset, 0) or view.buffer.dtype not in FLOAT_FORMATS:
        view = lowering.store(lowering.value(weight), fresh=True)
    return Matrix(FLOAT_FORMATS[view.buffer.dtype], view.buffer, None, m, n)


def _quantized(lowering: Lowering, node: fx.Node, m: int, n: int) -> Matrix | None:
    """A quantised weight with one scale a row, or by groups of a row; with zero points a row is a group too."""
    zero: Any = argument(node, "zero_point")
    (kind, stored), (zero_kind, points) = _numbers(node.args[0]), ("", None) if zero is None else _numbers(zero)
    scale: Any = node.args[1]
    plain = all(weight is None or weight.op == "get_attr" for weight in (stored, scale, points))
    if not plain or kind not in lowering.wants.formats:
        return None
    if points is not None and (lowering.wants.packed or kind not in ("int4", "int3")):
        return None
    rank = len(lowering.shape(node))
    axis, group = argument(node, "axis"), argument(node, "group_size")
    rows = lowering.shape(scale)
    by_row = group is None and axis == rank - 2 and rows == lowering.shape(node)[:-1]
    if by_row and points is not None:
        by_row, axis, group = False, rank - 1, n
    step = 32 if kind == "int3" else 16
    by_group = group is not None and axis == rank - 1 and n % group == 0 and group % step == 0
    if not lowering.wants.packed and (by_row or by_group):
        data, held = (lowering.weight(str(weight.target)) for weight in (stored, scale))
        zeros = None if points is None else lowering.weight(str(points.target))
        return Matrix(kind, data, held, m, n, int(group or 0), zeros, zero_kind)
    if by_row:
        held = lowering.weight(str(scale.target), packing="f32")
        return Matrix(kind, lowering.weight(str(stored.target), (kind, 0, None)), held, m, n)
    if by_group:
        packing = (kind, int(group), str(scale.target))
        return Matrix(kind, lowering.weight(str(stored.target), packing), None, m, n, int(group))
    return None


def _numbers(value: Any) -> tuple[str, Any]:
    """(the format of numbers, the weight that holds them)."""
    for packed, unpack in UNPACKS.items():
        if value.target is unpack:
            return packed, value.args[0]
    return "fp8" if value.meta["val"].dtype == torch.float8_e4m3fn else "int8", value


# -- regions -----------------------------------------------------------------------------------------------------------


def together(anchors: list[Any]) -> list[Any]:
    """Those of ``anchors`` that one region computes: the last, and with a product another that one store can join."""
    if not anchors:
        return []
    last = anchors[-1]
    if not isinstance(last, Product):
        return [last]
    kept = [a for a in anchors if isinstance(a, Product) and _joinable(a, last)]
    return kept[-LANES:]


def _joinable(a: Product, b: Product) -> bool:
    same_kind = (a.matrix.format, a.matrix.m, a.matrix.n, a.matrix.group, a.matrix.zero_format) == (
        b.matrix.format,
        b.matrix.m,
        b.matrix.n,
        b.matrix.group,
        b.matrix.zero_format,
    )
    return a.source == b.source and same_kind and (a.matrix.scale is None) == (b.matrix.scale is None)


def emit(lowering: Lowering, products: tuple[Product, ...], body: Scalar, out: View) -> None:
    """Adds the product to a sweep over the same rows that is there already, or begins one."""
    part = Part(products, body, out)
    source = products[0].source
    index = _sweep(lowering, source, body)
    if index is None:
        lowering.emit(Linear(lowering.node, source, [part]))
        return
    sweep = lowering.schedule.regions[index]
    assert isinstance(sweep, Linear)
    sweep.parts.append(part)
    lowering.writer[out.buffer] = index


def _sweep(lowering: Lowering, source: Source, body: Scalar) -> int | None:
    """The linear over ``source`` at whose place all that ``body`` reads is known."""
    if source.expert is not None:
        return None
    needed = max((lowering.writer.get(view.buffer, -1) for view in views(body)), default=-1)
    regions = lowering.schedule.regions
    for index in range(len(regions) - 1, needed, -1):
        region = regions[index]
        if isinstance(region, Linear) and region.source == source:
            return index
    return None


__all__ = ["emit", "expert_linear", "linear", "matrix", "together"]
