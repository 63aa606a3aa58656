"""Attention, with the rotation of queries and keys and the cache's update that belong to it; masks."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from slim.codegen.regions.lower import Lowering, Unsupported, handles
from slim.codegen.regions.pointwise import const, op
from slim.codegen.regions.scalars import BOOL, F32, Iota, Lane, Load, Scalar, Value, cast, expand
from slim.codegen.regions.schedule import Attention, Pointwise
from slim.codegen.regions.views import Strided, View, same
from slim.compiler.patterns import Pattern, read_pattern
from slim.compiler.rounded_kv import rounded, rounds_itself, shifted
from slim.compiler.rules import argument

aten, slim = torch.ops.aten, torch.ops.slim

_ATTENTION = (slim.attention.default, slim.cached_attention.default, slim.paged_attention.default)
_ON_THE_WAY = frozenset({
    slim.rope.default, aten.sub.Tensor, slim.token_scale.default, slim.quantize.default, slim.dequantize.default
})  # fmt: skip


class Rotation:
    """A rope that its attention will do: an anchor that no other region computes."""

    def __init__(self, x: View, cos: View, sin: View, interleaved: bool) -> None:
        self.x = x
        self.angles = (cos, sin, interleaved)


@handles(*_ATTENTION)
def attention(lowering: Lowering, node: fx.Node) -> Value:
    """slim.attention, slim.cached_attention and slim.paged_attention."""
    if not _has_kernel(node):
        raise Unsupported("no target has a kernel for attention by a pattern that counts what each key gets of it")
    shape, dtype = lowering.type(node)
    batch, heads, queries, width = shape
    keys, offset, values, bits = _sources(node)
    q, rope = _rotated(lowering, argument(node, "q"))
    k, _ = _rotated(lowering, keys)
    # [B, S, H, E] in memory, as the projection that follows reads it
    out = lowering.temp((batch, queries, heads, width), dtype).view().permute((0, 2, 1, 3))
    region = Attention(
        node, q, k, lowering.rows(values, lowering.floats), out, argument(node, "scale"),
        argument(node, "causal"), argument(node, "window"), argument(node, "softcap"), rope,
        key_mask=_rows(lowering, node, "key_mask"), pattern=_pattern(node), skip=argument(node, "skip") or 0.0,
        sinks=_floats(lowering, node, "sinks"), slopes=_floats(lowering, node, "slopes"),
    )  # fmt: skip
    region.k_offset = None if offset is None else _as_floats(lowering, offset)
    if node.target is slim.attention.default:
        region.bias = _bias(lowering, node, (batch, heads, queries, region.k.shape[2]))
        if bits is not None:
            _round_into_memory(lowering, region, bits)
    else:
        region.k_cache, region.v_cache = (lowering.view(argument(node, name)) for name in ("k_cache", "v_cache"))
        region.k_scale, region.v_scale = (_given(lowering, node, name) for name in ("k_scale", "v_scale"))
        region.k_bounds = _given(lowering, node, "k_bounds")
        if node.target is slim.paged_attention.default:
            region.pages, region.lengths = (lowering.view(argument(node, name)) for name in ("table", "lengths"))
            region.fixed, region.first = argument(node, "fixed"), argument(node, "first")
            first = argument(node, "q_first")
            region.q_first = None if first is None else lowering.rows(first, lowering.floats)
        else:
            region.start = lowering.size(argument(node, "start"))
            region.mass, region.votes = _given(lowering, node, "mass"), argument(node, "votes")
    if region.k_bounds is None and region.pattern is not None and region.pattern.top is not None:
        region.k_bounds = _bounds_of_the_run(lowering, region, region.pattern.top.size)
    lowering.emit(region)
    return Value(Load(out), shape, dtype)


def _has_kernel(node: fx.Node) -> bool:
    return argument(node, "mass") is None or argument(node, "pattern") is None


def _sources(node: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node, tuple[int, int] | None]:
    """(keys before an offset is taken off them, that offset, values, bits where attention is to round both)."""
    keys, values = argument(node, "k"), argument(node, "v")
    bits = None
    if rounds_itself(node):
        rounded_keys, rounded_values = rounded(keys), rounded(values)
        assert rounded_keys is not None
        assert rounded_values is not None
        keys, values, bits = rounded_keys.x, rounded_values.x, (rounded_keys.bits, rounded_values.bits)
    elif node.target is slim.attention.default or argument(node, "k_scale") is None:
        return keys, None, values, None
    return *shifted(keys), values, bits


def _round_into_memory(lowering: Lowering, region: Attention, bits: tuple[int, int]) -> None:
    """Has ``region`` round its keys and values as if into a cache, in memory of the run's own."""
    region.start = 0
    for name, view, each in (("k", region.k, bits[0]), ("v", region.v, bits[1])):
        *lead, width = view.shape
        kind, held = (torch.uint8, width // 2) if each == 4 else (torch.int8, width)
        setattr(region, f"{name}_cache", lowering.temp((*lead, held), kind, f"{region.node.name}_{name}").view())
        setattr(region, f"{name}_scale", lowering.temp(lead, F32, f"{region.node.name}_{name}_scale").view())


def _pattern(node: fx.Node) -> Pattern | None:
    text = argument(node, "pattern")
    pattern = None if text is None else read_pattern(text)
    return None if pattern is None or pattern.is_dense else pattern


def _bounds_of_the_run(lowering: Lowering, region: Attention, size: int) -> View:
    """Memory of the run's own for the bounds of blocks of keys that no cache keeps."""
    batch, groups, _, width = region.k.shape
    keys = region.k.shape[2] if region.start is None else region.start + region.q.shape[2]
    blocks = (keys + size - 1) // size
    return lowering.temp((batch, groups, blocks, 2, width), F32, f"{region.node.name}_k_bounds").view()


def _given(lowering: Lowering, node: fx.Node, name: str) -> View | None:
    value = argument(node, name)
    return None if value is None else lowering.view(value)


def _rotated(lowering: Lowering, node: Any) -> tuple[View, tuple[View, View, bool] | None]:
    """(the tensor in memory, the rotation still to be done)."""
    value = lowering.value(node)
    if isinstance(value.body, Lane) and isinstance(value.body.anchor, Rotation):
        return value.body.anchor.x, value.body.anchor.angles
    return lowering.rows(node, lowering.floats), None


def _rows(lowering: Lowering, node: fx.Node, name: str) -> View | None:
    value = argument(node, name)
    return None if value is None else lowering.rows(value)


def _floats(lowering: Lowering, node: fx.Node, name: str) -> View | None:
    """A small operand that the kernel reads as float32."""
    operand = argument(node, name)
    return None if operand is None else _as_floats(lowering, operand)


def _as_floats(lowering: Lowering, operand: fx.Node) -> View:
    """``operand`` as contiguous float32."""
    value = lowering.plain(lowering.value(operand))
    view = lowering.store(value)
    if view.buffer.dtype == F32 and view.is_contiguous:
        return view
    return lowering.store(Value(cast(value.body, F32), value.shape, F32), fresh=True)


def _bias(lowering: Lowering, node: fx.Node, shape: tuple[Any, ...]) -> View | None:
    bias = argument(node, "bias")
    if bias is None:
        return None
    value = lowering.value(bias)
    if value.dtype == torch.bool:
        value = lowering.plain(value)
        value = Value(op("where", value.body, const(0, F32), const(float("-inf"), F32), dtype=F32), value.shape, F32)
    view = lowering.store(value)
    if view.buffer.dtype != F32:
        view = lowering.store(Value(Load(view), value.shape, F32), fresh=True)
    return view.expand(shape)


@handles(slim.rope.default)
def rope(lowering: Lowering, node: fx.Node) -> Value:
    """slim.rope: left to the attention that reads it, or two pointwise regions over halves of the channels."""
    shape, dtype = lowering.type(node)
    x = lowering.rows(node.args[0], lowering.floats)
    cos, sin = (_angles(lowering.rows(angle, lowering.floats), shape) for angle in node.args[1:3])
    interleaved = bool(argument(node, "interleaved"))
    if _attention_rotates(lowering, node):
        return Value(Lane(Rotation(x, cos, sin, interleaved)), shape, dtype)
    out = lowering.temp(shape, dtype).view()
    half = cos.shape[-1]
    pairs = [_channels(view, half, interleaved) for view in (x, out)]
    (a, b), (out_a, out_b) = pairs
    angles = [Load(angle.unsqueeze(1).expand(a.shape)) for angle in (cos, sin)]
    for target, first, second, name in ((out_a, a, b, "sub"), (out_b, b, a, "add")):
        products = op("mul", Load(first), angles[0]), op("mul", Load(second), angles[1])
        lowering.emit(Pointwise(node, target, op(name, *products)))
    rest = shape[-1] - 2 * half
    if not same(rest, 0):
        kept = [view.slice(3, 2 * half, rest) for view in (x, out)]
        lowering.emit(Pointwise(node, kept[1], Load(kept[0])))
    return Value(Load(out), shape, dtype)


def _angles(table: View, shape: tuple[Any, ...]) -> View:
    """cos or sin as [B, S, R/2]; all rows of a batch may have one table in common."""
    whole: View = table.expand((shape[0], shape[2], table.shape[-1]))
    return whole


def _channels(view: View, half: Any, interleaved: bool) -> tuple[View, View]:
    """The first and the second channels of the pairs."""
    if interleaved:
        return view.slice(3, 0, half, 2), view.slice(3, 1, half, 2)
    return view.slice(3, 0, half), view.slice(3, half, half)


def _attention_rotates(lowering: Lowering, node: fx.Node) -> bool:
    """Whether the one reader is attention whose queries and keys are both turned by the same angles."""
    reader = _attention_of(node)
    if reader is None or not _has_kernel(reader):
        return False
    q, (k, _, v, _) = argument(reader, "q"), _sources(reader)
    if node not in (q, k) or q.target is not slim.rope.default or k.target is not slim.rope.default:
        return False
    if v in (q, k) or not all(_goes_only_to(reader, rotated) for rotated in (q, k)):
        return False
    if reader.target is slim.attention.default and q.meta["val"].shape[2] != k.meta["val"].shape[2]:
        return False
    return bool(q.args[1:3] == k.args[1:3] and q.kwargs == k.kwargs)


def _attention_of(node: fx.Node) -> fx.Node | None:
    """The attention that ``node`` goes to as query or key, perhaps shifted and rounded on the way."""
    while node.target in _ON_THE_WAY and node.users:
        node = next(iter(node.users))
    return node if node.target in _ATTENTION else None


def _goes_only_to(reader: fx.Node, node: fx.Node) -> bool:
    """Whether nothing but ``reader`` needs ``node``."""
    return all(user is reader or (user.target in _ON_THE_WAY and _goes_only_to(reader, user)) for user in node.users)


@handles(slim.rope_table.default)
def rope_table(lowering: Lowering, node: fx.Node) -> tuple[Value, ...]:
    """slim.rope_table: cos and sin of positions [B, S] times frequencies [R/2]."""
    shape = tuple(lowering.size(size) for size in node.meta["val"][0].shape)
    positions, frequencies = (lowering.plain(lowering.value(arg)) for arg in node.args[:2])
    move = lowering.remapped(positions, (*positions.shape, 1), lambda leaf: leaf.unsqueeze(len(positions.shape)))
    angle = op("mul", cast(expand(move, shape), F32), cast(expand(frequencies, shape), F32))
    scale = argument(node, "scale")
    results = []
    for name in ("cos", "sin"):
        body: Scalar = op(name, angle)
        body = body if scale == 1 else op("mul", body, const(scale, F32))
        value = Value(body, shape, node.meta["val"][0].dtype)
        results.append(Value(Load(lowering.store(value)), shape, value.dtype))
    return tuple(results)


@handles(slim.visibility.default)
def visibility(lowering: Lowering, node: fx.Node) -> Value:
    """slim.visibility: which keys each query sees, [B, 1, S, T], as bool or as what is added to scores."""
    shape, dtype = lowering.type(node)
    row, column = (Iota(_axis(shape, dim)) for dim in (2, 3))
    distance = op("sub", row, column)
    seen: Scalar | None = None

    def also(condition: Scalar) -> None:
        nonlocal seen
        seen = condition if seen is None else op("land", seen, condition, dtype=BOOL)

    causal, window, mask = (argument(node, name) for name in ("causal", "window", "key_mask"))
    zero = const(0, torch.int64)
    if causal:
        also(op("ge", distance, zero, dtype=BOOL))
    if window is not None:
        bounds = [distance] if causal else [distance, op("neg", distance)]
        for bound in bounds:
            also(op("lt", bound, const(window, torch.int64), dtype=BOOL))
    if mask is not None:
        value = lowering.plain(lowering.value(mask))
        keys = lowering.remapped(value, (shape[0], 1, 1, shape[3]), lambda leaf: leaf.unsqueeze(1).unsqueeze(1))
        also(expand(keys, shape))
    seen = seen or const(True, BOOL)
    if dtype == torch.bool:
        return Value(seen, shape, dtype)
    lowest = const(torch.finfo(dtype).min, F32)
    return Value(op("where", seen, const(0, F32), lowest, dtype=F32), shape, dtype)


def _axis(shape: tuple[Any, ...], dim: int) -> Strided:
    return Strided(shape, tuple(int(d == dim) for d in range(len(shape))))


@handles(operator.getitem)
def getitem(lowering: Lowering, node: fx.Node) -> Any:
    """One result of several."""
    return lowering.values[node.args[0]][node.args[1]]  # type: ignore[index]
