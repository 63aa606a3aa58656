"""Matrix products: what is fused around a product, and what shares a sweep."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx

from slim.codegen.regions.matrices import matrix, step_of_groups
from slim.codegen.regions.pointwise import op
from slim.codegen.regions.products import Linear, Part, Product, Source
from slim.codegen.regions.rounded import Rounding, rounding
from slim.codegen.regions.scalars import F32, Gather, Lane, Load, Scalar, Value, cast, expand, lanes
from slim.codegen.regions.schedule import Norm
from slim.codegen.regions.views import Size, View, same

if TYPE_CHECKING:
    from slim.codegen.regions.lower import Lowering

LANES = 2  # products whose results one store may combine: gate and up


def linear(lowering: Lowering, node: fx.Node) -> Value:
    """aten.linear: x [..., n] by W [m, n]."""
    source = _source(lowering, node.args[0])
    return _product(lowering, node, source, (*node.args, None)[2])


def expert_linear(lowering: Lowering, node: fx.Node) -> Value:
    """slim.expert_linear: row t of x [T, n] by W[expert[t]] of W [E, m, n]."""
    x, _, bias, expert = node.args
    plain = _source(lowering, x)
    source = replace(plain, expert=lowering.rows(expert))
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
    rounded = rounding(x) if lowering.wants.int8_rows else None
    return _rows(lowering, x) if rounded is None else _rounded_rows(lowering, rounded, x.args[0])


def _rows(lowering: Lowering, x: Any) -> Source:
    value = lowering.value(x)
    if isinstance(value.body, Lane) and isinstance(value.body.anchor, Norm):
        norm = value.body.anchor
        if norm.kind != "softmax":
            if not isinstance(norm.x, Load) or not same(norm.x.view.strides[-1], 1):
                norm.x = Load(lowering.store(Value(norm.x, norm.shape), fresh=True))
            return Source(norm.x.view, norm)
    return Source(lowering.rows(x))


def _rounded_rows(lowering: Lowering, rounded: Rounding, q: fx.Node) -> Source:
    if lowering.wants.requantises and not rounded.by_row and _is_product(lowering.value(rounded.x)):
        plain = Source(lowering.rows(lowering.once(q)))
    else:
        plain = _rows(lowering, rounded.x)
    if rounded.is_own and lowering.wants.own_steps:
        return replace(plain, own_step=True)
    held = lowering.view(rounded.step)
    if rounded.by_row:
        return replace(plain, scale=held)
    lead = lowering.shape(rounded.x)[:-1]
    return replace(plain, scale=View(held.buffer, lead, (0,) * len(lead), held.offset))


def _is_product(value: Value) -> bool:
    """Whether a linear is still to store it."""
    return any(isinstance(anchor, Product) for anchor in lanes(value.body))


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
    same_kind = (a.matrix.format, a.matrix.m, a.matrix.n, a.matrix.group) == (
        b.matrix.format,
        b.matrix.m,
        b.matrix.n,
        b.matrix.group,
    )
    return a.source == b.source and same_kind and (a.matrix.scale is None) == (b.matrix.scale is None)


def emit(lowering: Lowering, part: Part) -> None:
    """Adds the part to a sweep over the same rows that is there already, or begins one."""
    source = part.products[0].source
    index = _sweep(lowering, part)
    if index is None:
        lowering.emit(Linear(lowering.node, source, [part]))
        return
    sweep = lowering.schedule.regions[index]
    assert isinstance(sweep, Linear)
    sweep.parts.append(part)
    for out in part.outs():
        lowering.writer[out.buffer] = index


def _sweep(lowering: Lowering, part: Part) -> int | None:
    """The linear over the same rows at whose place all that ``part`` reads beside them is known."""
    source = part.products[0].source
    if source.expert is not None:
        return None
    needed = max((lowering.writer.get(view.buffer, -1) for view in part.views()), default=-1)
    regions = lowering.schedule.regions
    for index in range(len(regions) - 1, needed, -1):
        region = regions[index]
        if isinstance(region, Linear) and region.source == source:
            held = [product for each in (*region.parts, part) for product in each.products]
            return index if _groups_agree(held) else None
    return None


def _groups_agree(products: list[Product]) -> bool:
    """Whether kernels can read these weights side by side: rows are cut where the groups of any of them end."""
    step = max(step_of_groups(product.matrix.format) for product in products)
    return all(product.matrix.group % step == 0 for product in products)


__all__ = ["emit", "expert_linear", "linear", "together"]
