"""Keys and values that are rounded before attention reads them: how a graph says so, and how that is found again.

A rounded k is ``slim.dequantize(slim.quantize(x, s, axis=2), s, axis=2)`` with ``s = slim.token_scale(x)``: one step
for each token of each head. What a KV cache holds is then the numbers and the steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from slim.compiler.dialect.kv import LEVELS
from slim.compiler.program import Program
from slim.compiler.rules import argument
from slim.compiler.uses import ATTENTION, DEQUANTIZE

aten, slim = torch.ops.aten, torch.ops.slim

_SCALE, _QUANTIZE = slim.token_scale.default, slim.quantize.default
SCALE_BYTES = 4


class Rounded(NamedTuple):
    """Keys or values [B, G, S, n]: what they are rounded from, in how many bits, and the nodes that say so."""

    x: fx.Node
    bits: int
    nodes: tuple[fx.Node, ...]


def rounded(value: Any) -> Rounded | None:
    """How ``value``, read by attention as k or v, is rounded; None where it is not."""
    if not isinstance(value, fx.Node) or value.target is not DEQUANTIZE:
        return None
    numbers, scale = value.args[:2]
    if not isinstance(numbers, fx.Node) or numbers.target is not _QUANTIZE or numbers.args[1] is not scale:
        return None
    x = numbers.args[0]
    if not isinstance(x, fx.Node) or not isinstance(scale, fx.Node) or scale.target is not _SCALE:
        return None
    if scale.args[0] is not x:
        return None
    bits = argument(scale, "bits")
    grain = [argument(node, name) for node in (numbers, value) for name in ("zero_point", "axis", "group_size")]
    levels = (argument(numbers, "low"), argument(numbers, "high"))
    if grain != [None, 2, None] * 2 or levels != LEVELS[bits] or argument(value, "dtype") != x.meta["val"].dtype:
        return None
    return Rounded(x, bits, (scale, numbers, value))


def round_before(program: Program, reader: fx.Node, x: fx.Node, bits: int) -> fx.Node:
    """``x`` [B, G, S, n] rounded to ``bits``, as nodes before ``reader``."""
    low, high = LEVELS[bits]
    scale = program.insert(reader, _SCALE, x, like=reader, bits=bits)
    numbers = program.insert(reader, _QUANTIZE, x, scale, like=reader, axis=2, low=low, high=high)
    return program.insert(reader, DEQUANTIZE, numbers, scale, like=reader, axis=2, dtype=x.meta["val"].dtype)


def pair_bits(attention: fx.Node) -> tuple[int, int]:
    """(bits of the keys, bits of the values) that attention reads; zeros unless both are rounded."""
    k, v = (rounded(argument(attention, name)) for name in ("k", "v"))
    return (k.bits, v.bits) if k is not None and v is not None else (0, 0)


def held_bytes(width: int, bits: int, dtype: torch.dtype) -> int:
    """Bytes that a cache takes for one token in one head; ``bits`` 0 are floats of ``dtype``."""
    return width * bits // 8 + SCALE_BYTES if bits else width * dtype.itemsize


def shifted(value: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """(x, offset) where ``value`` is x [B, G, S, n] less a weight [G, 1, n]; (value, None) elsewhere."""
    if value.target is not aten.sub.Tensor or value.kwargs:
        return value, None
    x, offset = value.args
    if not isinstance(x, fx.Node) or not isinstance(offset, fx.Node) or offset.op != "get_attr":
        return value, None
    shape = x.meta["val"].shape
    if x.op == "get_attr" or tuple(offset.meta["val"].shape) != (shape[1], 1, shape[3]):
        return value, None
    return x, offset


def done_by_attention(program: Program) -> set[fx.Node]:
    """The nodes whose work attention does itself: rounding keys and values as a cache would."""
    found: set[fx.Node] = set()
    for node in program.attention_nodes():
        if not rounds_itself(node):
            continue
        for name in ("k", "v"):
            part = rounded(argument(node, name))
            assert part is not None
            found |= set(part.nodes)
            if name == "k" and shifted(part.x)[1] is not None:
                found.add(part.x)
    return found


def rounds_itself(attention: fx.Node) -> bool:
    """Whether nobody but this attention reads its rounded keys and values, which are of its own tokens."""
    if attention.target is not slim.attention.default or not all(pair_bits(attention)):
        return False
    if argument(attention, "q").meta["val"].shape[2] != argument(attention, "k").meta["val"].shape[2]:
        return False
    parts = [rounded(argument(attention, name)) for name in ("k", "v")]
    inside = {attention, *(node for part in parts if part for node in part.nodes)}
    outer = [node for part in parts if part for node in part.nodes]
    if parts[0] is not None and shifted(parts[0].x)[1] is not None:
        outer.append(parts[0].x)
    return all(user in inside for node in outer for user in node.users)


def readers_of(value: fx.Node) -> list[fx.Node]:
    """The attention nodes that read ``value`` as k or v."""
    return [user for user in value.users if user.target in ATTENTION]
