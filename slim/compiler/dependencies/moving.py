"""Operations that move what they are given, or work on it element by element."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.dependencies.flow import Axes, Flow, Rule, nothing, shape_of
from slim.compiler.dependencies.reshape import reshaped
from slim.compiler.program import where
from slim.compiler.rules import argument

aten = torch.ops.aten

# -- element by element ------------------------------------------------------------------------------------------------

COPIES = frozenset({
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten._to_copy.default, aten.detach.default,
    aten.dropout.default,
})  # fmt: skip
_LINEAR = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar,
    aten.neg.default, aten.multiply.Tensor,
})  # fmt: skip


def is_pointwise(target: Any) -> bool:
    return target in COPIES or torch.Tag.pointwise in getattr(target, "tags", ())


def pointwise(node: fx.Node, flow: Flow) -> Axes:
    values = [value for value in node.all_input_nodes if isinstance(value.meta["val"], Tensor)]
    axes = _broadcast(node, flow, values)
    several = sum(value.op != "get_attr" for value in values) > 1
    if node.target not in COPIES | _LINEAR or (several and node.target not in (aten.add.Tensor, aten.sub.Tensor)):
        flow.bent += [axis for axis in axes if axis is not None]
    for value in values:
        if value in flow.ids:
            flow.ids[node] = flow.ids[value]
    return axes


def _broadcast(node: fx.Node, flow: Flow, values: Sequence[fx.Node]) -> Axes:
    """The result's dimensions are those of the arguments, aligned at the last."""
    rank = len(shape_of(node))
    return tuple(met(node, flow, values, dim - rank) for dim in range(rank))


def met(node: fx.Node, flow: Flow, values: Sequence[fx.Node], dim: int) -> Tensor | None:
    """One dimension of the result, counted from the end: all arguments that have it lose the same indices."""
    size = shape_of(node)[dim]
    if not isinstance(size, int) or size == 1:
        return None
    held = [flow.of(value)[dim] for value in values if -dim <= len(shape_of(value)) and shape_of(value)[dim] == size]
    for other in held[1:]:
        flow.tie(held[0], other, f"it meets values in {node.target} that cannot lose it")
    return held[0] if held and all(axis is not None for axis in held) else None


# -- moving ------------------------------------------------------------------------------------------------------------


def _reshape(node: fx.Node, flow: Flow) -> Axes:
    source = node.args[0]
    if source in flow.ids:
        flow.ids[node] = flow.ids[source]  # type: ignore[index]
    return reshaped(flow.of(source), shape_of(source), shape_of(node), flow.slots)


def _permute(node: fx.Node, flow: Flow) -> Axes:
    axes = flow.of(node.args[0])
    if node.args[0] in flow.ids:
        flow.ids[node] = flow.ids[node.args[0]]  # type: ignore[index]
    if node.target is aten.permute.default:
        return tuple(axes[dim] for dim in node.args[1])  # type: ignore[union-attr, index]
    if node.target is aten.t.default:
        return axes[::-1]
    moved = list(axes)
    a, b = node.args[1:]
    moved[a], moved[b] = moved[b], moved[a]  # type: ignore[index]
    return tuple(moved)


def _unsqueeze(node: fx.Node, flow: Flow) -> Axes:
    axes, dim = list(flow.of(node.args[0])), int(node.args[1])  # type: ignore[arg-type]
    if node.args[0] in flow.ids:
        flow.ids[node] = flow.ids[node.args[0]]  # type: ignore[index]
    axes.insert(dim % (len(axes) + 1), None)
    return tuple(axes)


def _squeeze(node: fx.Node, flow: Flow) -> Axes:
    shape, axes = shape_of(node.args[0]), flow.of(node.args[0])
    dims = [node.args[1]] if isinstance(node.args[1], int) else list(node.args[1])  # type: ignore[arg-type]
    gone = {dim % len(shape) for dim in dims if shape[dim] == 1}
    return tuple(axis for dim, axis in enumerate(axes) if dim not in gone)


def _expand(node: fx.Node, flow: Flow) -> Axes:
    return _broadcast(node, flow, [node.args[0]])  # type: ignore[list-item]


def _slice(node: fx.Node, flow: Flow) -> Axes:
    axes, dim = list(flow.of(node.args[0])), int(argument(node, "dim"))
    if node.args[0] in flow.ids:
        flow.ids[node] = flow.ids[node.args[0]]  # type: ignore[index]
    axis, bounds = axes[dim], [argument(node, name) for name in ("start", "end", "step")]
    if axis is None:
        return tuple(axes)
    if any(isinstance(bound, fx.Node) for bound in bounds) or not _is_even(axis, *bounds):
        flow.fix(axis, f"it goes to {node.target}, which picks by a step or a size that is not fixed")
        axes[dim] = None
        return tuple(axes)
    if bounds[2] > 1:  # of what lies between two steps, all goes or none
        runs = axis.view(-1, bounds[2])
        flow.slots.tie(runs, runs[:, :1].expand_as(runs))
    axes[dim] = axis[bounds[0] : bounds[1] : bounds[2]]
    return tuple(axes)


def _is_even(axis: Tensor, start: int | None, end: int | None, step: int) -> bool:
    """Whether a slice takes one of every ``step`` from the first to the last."""
    whole = end is None or end >= len(axis)
    return step == 1 or (len(axis) % step == 0 and 0 <= (start or 0) < step and whole)


def _select(node: fx.Node, flow: Flow) -> Axes:
    axes, dim = list(flow.of(node.args[0])), int(argument(node, "dim"))
    flow.fix(axes.pop(dim), f"it goes to {node.target}, which picks by number")
    return tuple(axes)


def _split(node: fx.Node, flow: Flow) -> tuple[Axes, ...]:
    axes, dim = flow.of(node.args[0]), int(argument(node, "dim"))
    rank, axis = len(axes), axes[dim]
    if node.target is aten.unbind.int:
        flow.fix(axis, f"it goes to {node.target}, which picks by number")
        left = tuple(a for d, a in enumerate(axes) if d != dim % rank)
        return (left,) * len(node.meta["val"])
    sizes = [part.shape[dim] for part in node.meta["val"]]
    parts: Sequence[Tensor | None] = [None] * len(sizes) if axis is None else axis.split(sizes)
    return tuple(tuple(part if d == dim % rank else a for d, a in enumerate(axes)) for part in parts)


def _getitem(node: fx.Node, flow: Flow) -> Axes:
    source, place = node.args
    picked = flow.ids.get(source) if place == 1 else None  # type: ignore[arg-type]
    if picked is not None:
        flow.ids[node] = picked  # the second result of a topk
    found: Any = flow.axes[source][place]  # type: ignore[index]
    return found


def _cat(node: fx.Node, flow: Flow) -> Axes:
    values: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    rank, dim = len(shape_of(node)), int(argument(node, "dim") or 0) % len(shape_of(node))
    parts = [flow.of(value)[dim] for value in values]
    out: list[Tensor | None] = []
    for d in range(rank):
        if d != dim:
            out.append(met(node, flow, values, d - rank))
        elif all(part is None for part in parts):
            out.append(None)
        else:
            out.append(torch.cat([_known(flow, value, dim) for value in values]))
    return tuple(out)


def _known(flow: Flow, value: fx.Node, dim: int) -> Tensor:
    """The slots of a dimension; new ones that stay where it has none."""
    axis = flow.of(value)[dim]
    if axis is None:
        axis = flow.slots.fresh(int(shape_of(value)[dim]))
        flow.fix(axis, f"{where(value)} cannot lose it")
    return axis


def _repeat_interleave(node: fx.Node, flow: Flow) -> Axes:
    axes, dim, times = list(flow.of(node.args[0])), argument(node, "dim"), argument(node, "repeats")
    if dim is None or isinstance(times, fx.Node):
        flow.fix_all(node.args[0], f"it goes to {node.target}")
        return nothing(node.meta["val"])
    axis = axes[dim]
    axes[dim] = None if axis is None else axis.repeat_interleave(times)
    return tuple(axes)


MOVING: dict[Any, Rule] = {
    **dict.fromkeys((aten.reshape.default, aten.view.default, aten._unsafe_view.default), _reshape),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default), _permute),
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int), _split),
    aten.unsqueeze.default: _unsqueeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    operator.getitem: _getitem,
}
