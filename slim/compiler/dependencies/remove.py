"""Takes slots out: of weights, and of the sizes and numbers that operations name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from slim import errors
from slim.compiler.dependencies.flow import Axes, Flow
from slim.compiler.program import Program, where
from slim.compiler.rules import argument

aten = torch.ops.aten


def remove(program: Program, flow: Flow, nodes: Iterable[fx.Node], alive: Tensor) -> list[str]:
    """Takes what is not ``alive``, bool [slots], out of ``nodes``, in their order; ``flow`` then says what is left.

    Returns:
        The weights that were changed.
    """
    before = {node: flow.axes[node] for node in nodes}
    changed = []
    for node, axes in before.items():
        flow.axes[node] = _left(axes, alive)
        if node.op == "get_attr":
            changed.append(str(node.target))
            _cut(program, node, axes, alive)  # type: ignore[arg-type]
            _renumber(program, flow, node, alive)
        elif node.target in _SIZES:
            _SIZES[node.target](node, flow, alive, before)
    for node, numbers in flow.numbers.items():
        flow.numbers[node] = numbers[alive[numbers]]
    for node in before:
        node.meta["val"] = _typed(program, node.meta["val"], flow.axes[node])
    return changed


def _typed(program: Program, value: Any, axes: Any) -> Any:
    """The type of a value whose dimensions have become as long as ``axes`` are."""
    if not isinstance(value, Tensor):
        return tuple(_typed(program, part, each) for part, each in zip(value, axes, strict=True))
    shape = [size if axis is None else len(axis) for size, axis in zip(value.shape, axes, strict=True)]
    with program.typer.mode:
        return torch.empty(shape, dtype=value.dtype)


def _left(axes: Any, alive: Tensor) -> Any:
    if axes is None:
        return None
    return axes[alive[axes]] if isinstance(axes, Tensor) else tuple(_left(part, alive) for part in axes)


def _cut(program: Program, node: fx.Node, axes: Axes, alive: Tensor) -> None:
    name = str(node.target)
    value = program.weights[name]
    for dim, axis in enumerate(axes):
        if axis is not None and not bool(alive[axis].all()):
            value = value.index_select(dim, alive[axis].nonzero()[:, 0].to(value.device))
    program.weights[name] = value.contiguous()


def _renumber(program: Program, flow: Flow, node: fx.Node, alive: Tensor) -> None:
    """Numbers that pick from a dimension that has lost some: counted anew."""
    if node not in flow.numbers:
        return
    value = program.weights[str(node.target)]
    place = alive[flow.numbers[node]].cumsum(0) - 1
    program.weights[str(node.target)] = place[value.cpu().long()].to(value.dtype).to(value.device)


def _sizes_of(axes: Any, alive: Tensor) -> list[int | None]:
    return [None if axis is None else int(alive[axis].sum()) for axis in axes]


Before = dict[fx.Node, Any]
Fix = Callable[[fx.Node, Flow, Tensor, Before], None]


def _reshape(node: fx.Node, flow: Flow, alive: Tensor, before: Before) -> None:
    wanted = [
        size if left is None or size == -1 else left
        for size, left in zip(node.args[1], _sizes_of(before[node], alive), strict=True)  # type: ignore[arg-type]
    ]
    node.args = (node.args[0], wanted, *node.args[2:])


def _split(node: fx.Node, flow: Flow, alive: Tensor, before: Before) -> None:
    dim = int(argument(node, "dim"))
    sizes = [_sizes_of(part, alive)[dim] for part in before[node]]
    if None not in sizes:
        node.target = aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], sizes, dim), {}


def _slice(node: fx.Node, flow: Flow, alive: Tensor, before: Before) -> None:
    source, dim = node.args[0], int(argument(node, "dim"))
    axis = before[source][dim] if source in before else None  # type: ignore[index]
    if axis is None or argument(node, "step") != 1:
        return  # where it steps, it goes from the first to the last
    start, end, _ = slice(argument(node, "start"), argument(node, "end")).indices(len(axis))
    left = alive[axis].cumsum(0).tolist()
    bounds = [left[bound - 1] if bound else 0 for bound in (start, max(start, end))]
    node.args, node.kwargs = (source, dim, *bounds), {}


def _topk(node: fx.Node, flow: Flow, alive: Tensor, before: Before) -> None:
    left, wanted = int(alive[flow.ids[node]].sum()), int(argument(node, "k"))
    if left < wanted:
        raise errors.BadInput(
            argument="units", reason=f"{where(node)} picks {wanted} experts, and {left} would be left"
        )


_SIZES: dict[Any, Fix] = {
    **dict.fromkeys(
        (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.expand.default), _reshape
    ),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default), _split),
    aten.slice.Tensor: _slice,
    aten.topk.default: _topk,
}
