"""Operations that pick from a dimension, sum over one, or normalise along one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.dependencies.flow import Axes, Flow, Rule, nothing, shape_of
from slim.compiler.dependencies.moving import met
from slim.compiler.program import where
from slim.compiler.rules import argument

aten, slim = torch.ops.aten, torch.ops.slim

AVERAGED = "a norm averages over it"

# -- picking -----------------------------------------------------------------------------------------------------------


def _index_select(node: fx.Node, flow: Flow) -> Axes:
    axes, dim = list(flow.of(node.args[0])), int(argument(node, "dim"))
    axes[dim] = _picked(node, flow, axes[dim], argument(node, "index"))
    return tuple(axes)


def _index(node: fx.Node, flow: Flow) -> Axes:
    axes, picks = list(flow.of(node.args[0])), list(node.args[1])  # type: ignore[arg-type]
    places = [dim for dim, pick in enumerate(picks) if pick is not None]
    if len(places) == 1 and len(shape_of(picks[places[0]])) == 1:
        axes[places[0]] = _picked(node, flow, axes[places[0]], picks[places[0]])
        return tuple(axes)
    for dim in places:
        flow.fix(axes[dim], f"it goes to {node.target}, which picks by number")
    for pick in picks:
        flow.fix_all(pick, f"it goes to {node.target}")
    if None in picks:
        flow.fix_all(node.args[0], f"it goes to {node.target}")
        return nothing(node.meta["val"])
    return (*[None] * (len(shape_of(node)) - len(axes) + len(picks)), *axes[len(picks) :])


def _picked(node: fx.Node, flow: Flow, axis: Tensor | None, index: fx.Node) -> Tensor | None:
    """What a list of numbers picks of ``axis``; where the numbers are a weight, that loses what the result loses."""
    name = flow.program.weight_of(index)
    if axis is None or name is None:
        flow.fix(axis, f"it goes to {node.target}, which picks by computed numbers")
        flow.fix_all(index, f"it goes to {node.target}")
        return None
    found = axis[flow.program.weights[name].cpu().long()]
    flow.numbers[index] = axis
    flow.tie(flow.of(index)[0], found, "an index picks from it by numbers that stay")
    return found


def _embedding(node: fx.Node, flow: Flow) -> Axes:
    rows, width = flow.of(node.args[0])
    flow.fix(rows, "rows of a table are picked by the model's inputs")
    flow.fix_all(node.args[1], f"it goes to {node.target}")
    return (*[None] * len(shape_of(node.args[1])), width)


def _topk(node: fx.Node, flow: Flow) -> tuple[Axes, ...]:
    axes, dim = list(flow.of(node.args[0])), int(argument(node, "dim"))
    axis, axes[dim] = axes[dim], None
    if axis is not None:
        flow.ids[node] = axis
        flow.experts.append(axis)
    return tuple(axes), tuple(axes)


def _gather(node: fx.Node, flow: Flow) -> Axes:
    axes, dim = list(flow.of(node.args[0])), int(argument(node, "dim"))
    axis, ids = axes[dim], flow.ids.get(argument(node, "index"))
    flow.tie(axis, ids, f"it goes to {node.target}, by other numbers")
    for other, kept in enumerate(axes):
        if other != dim % len(axes):
            flow.fix(kept, f"it goes to {node.target}")
    return nothing(node.meta["val"])


# -- products ----------------------------------------------------------------------------------------------------------


def _linear(node: fx.Node, flow: Flow) -> Axes:
    x, (rows, columns) = flow.of(node.args[0]), flow.of(node.args[1])
    flow.tie(x[-1], columns, f"what enters {where(node)} cannot lose it")
    bias = argument(node, "bias")
    if bias is not None:
        flow.tie(flow.of(bias)[0], rows, "its bias cannot lose it")
    return (*x[:-1], rows)


def _expert_linear(node: fx.Node, flow: Flow) -> Axes:
    x, (experts, rows, columns) = flow.of(node.args[0]), flow.of(node.args[1])
    flow.tie(x[-1], columns, f"what enters {where(node)} cannot lose it")
    flow.fix(x[0], f"it goes to {node.target}, as a row")
    bias = argument(node, "bias")
    if bias is not None:
        flow.tie(flow.of(bias)[0], experts, "its bias cannot lose it")
        flow.tie(flow.of(bias)[1], rows, "its bias cannot lose it")
    flow.tie(flow.ids.get(argument(node, "expert")), experts, "no choice among all experts picks it")
    return (None, rows)


def _matmul(node: fx.Node, flow: Flow) -> Axes:
    a, b = flow.of(node.args[0]), flow.of(node.args[1])
    if min(len(a), len(b)) < 2:
        for value in node.args[:2]:
            flow.fix_all(value, f"it goes to {node.target}")
        return nothing(node.meta["val"])
    flow.tie(a[-1], b[-2], f"it meets values in {node.target} that cannot lose it")
    lead = [_batch(node, flow, dim) for dim in range(len(shape_of(node)) - 2)]
    return (*lead, a[-2], b[-1])


def _batch(node: fx.Node, flow: Flow, dim: int) -> Tensor | None:
    place = dim - len(shape_of(node))
    sides: list[fx.Node] = [value for value in node.args[:2] if -place <= len(shape_of(value))]  # type: ignore[misc]
    return met(node, flow, sides, place)


def _attention(node: fx.Node, flow: Flow) -> Axes:
    """q [B,H,S,D], k [B,G,T,D], v [B,G,T,E] to [B,H,S,E]: query head h reads kv head h // (H / G)."""
    q, k, v = (flow.of(value) for value in node.args[:3])
    flow.tie(q[3], k[3], "queries and keys must have the same channels")
    heads = q[1]
    groups, share = int(shape_of(node.args[1])[1]), int(shape_of(node.args[0])[1]) // int(shape_of(node.args[1])[1])
    if flow.by == "kv":
        flow.tie(k[1], v[1], "keys and values must have the same heads")
        flow.tie(heads, None if k[1] is None else k[1].repeat_interleave(share), "queries must divide over kv heads")
    else:
        for axis in (k[1], v[1]):
            flow.fix(axis, "kv heads stay where query heads are taken out of each")
        if heads is not None and share > 1:
            flow.slots.tie(heads.view(groups, share), heads[:share].expand(groups, share))
        else:
            flow.fix(heads, "each kv head has one query head")
    if heads is not None:
        flow.heads.append(heads)
    for name in ("sinks", "slopes"):
        flow.tie(*_by_head(flow, argument(node, name), 0, heads), f"{name} cannot lose it")
    flow.tie(*_by_head(flow, argument(node, "bias"), 1, heads), "what is added to the scores cannot lose it")
    flow.fix_all(argument(node, "key_mask"), f"it goes to {node.target}")
    return (None, heads, None, v[3])


def _by_head(flow: Flow, value: Any, dim: int, heads: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The heads' dimension of what attention takes beside queries, keys and values, if it has one."""
    if value is None or heads is None or shape_of(value)[dim] == 1:
        return None, None
    return flow.of(value)[dim], heads


def _rope(node: fx.Node, flow: Flow) -> Axes:
    axes = flow.of(node.args[0])
    flow.fix(axes[-1], "a rotation turns it with another")
    for value in node.args[1:3]:
        flow.fix_all(value, f"it goes to {node.target}")
    return (*axes[:-1], None)


def _norm(node: fx.Node, flow: Flow) -> Axes:
    (*lead, last), reason = flow.of(node.args[0]), AVERAGED
    for name in ("weight", "bias"):
        flow.fix_all(argument(node, name), reason)
    last = flow.slots.fresh(int(shape_of(node)[-1])) if last is None else last
    flow.fix(last, reason)
    return (*lead, last)


def _softmax(node: fx.Node, flow: Flow) -> Axes:
    axes = flow.of(node.args[0])
    flow.compete(axes[int(argument(node, "dim"))])
    return axes


def _reduced(node: fx.Node, flow: Flow) -> Axes:
    axes, dims = flow.of(node.args[0]), argument(node, "dim")
    gone = {dim % len(axes) for dim in ([dims] if isinstance(dims, int) else dims or range(len(axes)))}
    for dim in gone:
        flow.fix(axes[dim], f"{node.target} goes over it")
    keep = bool(argument(node, "keepdim"))
    return tuple(None if dim in gone else axis for dim, axis in enumerate(axes) if keep or dim not in gone)


# -- quantised weights -------------------------------------------------------------------------------------------------


def _dequantize(node: fx.Node, flow: Flow) -> Axes:
    """Scales lose what the numbers lose; of a group that shares a scale none goes without the others."""
    axes, axis, size = flow.of(node.args[0]), argument(node, "axis"), argument(node, "group_size")
    for name in ("scale", "zero_point"):
        grid = flow.of(argument(node, name))
        for dim, slots in enumerate(grid):
            along = axis if len(grid) == 1 and size is None else dim
            held = axes[along]
            if slots is not None and held is not None and size is not None and dim == axis % len(axes):
                flow.slots.tie(held, slots.repeat_interleave(size))
            elif slots is None and held is not None and size is not None:
                flow.slots.tie(held, held[:1].expand(len(held)))
            else:
                flow.tie(slots, held, "its scale cannot lose it")
    return axes


def _unpack_pairs(node: fx.Node, flow: Flow) -> Axes:
    """Two numbers lie in one byte."""
    (*lead, last) = flow.of(node.args[0])
    return (*lead, None if last is None else last.repeat_interleave(2))


def _unpack_eights(node: fx.Node, flow: Flow) -> Axes:
    """Eight numbers lie in three bytes."""
    (*lead, last) = flow.of(node.args[0])
    if last is None:
        return (*lead, None)
    threes = last.view(-1, 3)
    flow.slots.tie(threes, threes[:, :1].expand_as(threes))
    return (*lead, threes[:, 0].repeat_interleave(8))


MIXING: dict[Any, Rule] = {
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default), _reduced),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default), _softmax),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default, aten.mm.default), _matmul),
    **dict.fromkeys((slim.rms_norm.default, slim.layer_norm.default), _norm),
    **dict.fromkeys((slim.unpack_int4.default, slim.unpack_nf4.default), _unpack_pairs),
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.embedding.default: _embedding,
    aten.topk.default: _topk,
    aten.gather.default: _gather,
    aten.linear.default: _linear,
    slim.expert_linear.default: _expert_linear,
    slim.attention.default: _attention,
    slim.rope.default: _rope,
    slim.dequantize.default: _dequantize,
    slim.unpack_int3.default: _unpack_eights,
}
