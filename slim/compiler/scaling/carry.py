"""How a scale of channels passes through operations.

A value carries a scale when it is what it was, times ``t[label] ** power`` in every element, for positive numbers t
that may be any. An operation passes a scale on when its result then carries one too; each rule below says with
which labels. An operation without a rule stops it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.rules import argument

aten, slim = torch.ops.aten, torch.ops.slim


@dataclass(frozen=True, eq=False)
class Carried:
    """Which numbers of a scale a value carries.

    Attributes:
        labels: int64, of the value's rank: its size along a dimension that the label depends on, 1 along others.
        power: of the number at a label, the power that the element carries: 2 after a square.
        bends: whether an operation that is only homogeneous, as ReLU is, lies on the way.
    """

    labels: Tensor
    power: float = 1.0
    bends: bool = False

    def of(self, labels: Tensor, power: float | None = None, bends: bool | None = None) -> Carried:
        return Carried(labels, self.power if power is None else power, self.bends if bends is None else bends)

    @property
    def tail(self) -> int:
        """How many dimensions there are from the first that labels depend on to the end."""
        return next((self.labels.dim() - d for d, size in enumerate(self.labels.shape) if size > 1), 0)

    def columns(self, width: int) -> Tensor | None:
        """The label of each of ``width`` columns; None where it depends on the row too."""
        return self.labels.reshape(-1).expand(width) if self.tail <= 1 else None


class Stops(Exception):
    """Why a scale does not pass."""


class Carrying(dict[fx.Node, "Carried | tuple[Carried, ...]"]):
    """What each node carries, as far as the graph was followed.

    Attributes:
        stopped: label -> why its number must be 1. An operation that one argument's scale passes takes any values of
            the others, but not their scales: those are stopped, and the rest goes on.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program
        self.stopped: dict[int, str] = {}

    def stop(self, node: object, reason: str) -> None:
        """Whatever ``node`` carries ends here."""
        carried = self.get(node, ()) if isinstance(node, fx.Node) else ()
        for part in carried if isinstance(carried, tuple) else (carried,):
            self.stop_all(part.labels.unique().tolist(), reason)

    def stop_all(self, labels: Iterable[int], reason: str) -> None:
        for label in labels:
            self.stopped.setdefault(label, reason)

    def one(self, node: object) -> Carried:
        carried = self[node]  # type: ignore[index]
        assert isinstance(carried, Carried)
        return carried

    def constant(self, node: object) -> Tensor | None:
        """The value of a weight; None where ``node`` is none."""
        name = self._program.weight_of(node)
        return None if name is None else self._program.weights[name]


def carry(node: fx.Node, carrying: Carrying) -> Carried | tuple[Carried, ...]:
    """What the result of ``node`` carries, some of whose arguments carry something.

    Raises:
        Stops: with the reason.
    """
    if node.target is operator.getitem:
        return carrying[node.args[0]][node.args[1]]  # type: ignore[index]
    rule = RULES.get(node.target)
    if rule is None:
        raise Stops(f"it goes to {node.target}")
    try:
        return rule(node, carrying)
    except _Unfit as unfit:
        raise Stops(f"it goes to {node.target}{unfit}") from None


class _Unfit(Exception):
    """How an operation is used that a rule does not cover; completes 'it goes to aten.add.Tensor'."""


def _node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def _only(node: fx.Node, carrying: Carrying, name: str) -> Carried:
    """What argument ``name`` carries; what others carry is stopped."""
    source, reason = argument(node, name), f", as something else than its {name}"
    places = [value for value in (*node.args, *node.kwargs.values()) if value is source]
    if source not in carrying or len(places) != 1:
        raise _Unfit(reason)
    for other in node.all_input_nodes:
        if other is not source:
            carrying.stop(other, f"it goes to {node.target}{reason}")
    return carrying.one(source)


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)


def _aligned(labels: Tensor, rank: int) -> Tensor:
    """Labels as they broadcast into a result of more dimensions."""
    return labels.reshape(*[1] * (rank - labels.dim()), *labels.shape)


# -- moving ------------------------------------------------------------------------------------------------------------


def _same(node: fx.Node, carrying: Carrying) -> Carried:
    carried = _only(node, carrying, node.target._schema.arguments[0].name)  # type: ignore[union-attr]
    if not node.meta["val"].dtype.is_floating_point:
        raise _Unfit(f", which makes it {node.meta['val'].dtype}")
    return carried


def _permuted(node: fx.Node, carrying: Carrying) -> Carried:
    carried = _only(node, carrying, "self")
    return carried.of(node.target(carried.labels, *node.args[1:]))  # type: ignore[operator]


def _reshaped(node: fx.Node, carrying: Carrying) -> Carried:
    carried = _only(node, carrying, "self")
    before, after = [list(map(_size, value.meta["val"].shape)) for value in (_node(node.args[0]), node)]
    labels = reshaped_labels(carried.labels, before, after)
    if labels is None:
        raise _Unfit(", which mixes channels and rows")
    return carried.of(labels)


def _size(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def reshaped_labels(labels: Tensor, before: Sequence[Any], after: Sequence[Any]) -> Tensor | None:
    """``labels`` of a value of shape ``before`` as it is reshaped to ``after``; None where they would mix.

    Sizes are ints, or expressions that compare equal where the sizes are.
    """
    shared = min(len(before), len(after))
    left = next((i for i in range(shared) if before[i] != after[i]), shared)
    right = next((i for i in range(shared - left) if before[-1 - i] != after[-1 - i]), shared - left)
    inner, outer = before[left : len(before) - right], after[left : len(after) - right]
    lead, middle, end = (labels.shape[part] for part in _cut(left, len(before) - right))
    depends = next((i for i, size in enumerate(middle) if size > 1), len(middle))
    for first in range(depends, -1, -1):  # dimensions before may join: the four heads that carry the same in [4, 16]
        kept = math.prod(inner[first:])
        start = next((i for i in range(len(outer), -1, -1) if math.prod(outer[i:]) == kept), None)
        if start is not None and all(isinstance(size, int) for size in (*inner[first:], *outer[start:])):
            whole = labels.expand(*lead, *middle[:first], *inner[first:], *end)
            return whole.reshape(*lead, *[1] * start, *outer[start:], *end)
    return None


def _cut(start: int, stop: int) -> tuple[slice, slice, slice]:
    return slice(None, start), slice(start, stop), slice(stop, None)


def _expanded(node: fx.Node, carrying: Carrying) -> Carried:
    """Also where a dimension of size one, which no label depends on, becomes many."""
    carried = _only(node, carrying, "self")
    return carried.of(_aligned(carried.labels, _rank(node)))


def _sliced(node: fx.Node, carrying: Carrying) -> Carried:
    carried, dim = _only(node, carrying, "self"), int(argument(node, "dim"))
    if carried.labels.shape[dim] == 1:
        return carried
    bounds = [argument(node, name) for name in ("start", "end", "step")]
    _fixed(*bounds)
    return carried.of(aten.slice.Tensor(carried.labels, dim, *bounds))


def _selected(node: fx.Node, carrying: Carrying) -> Carried:
    carried, dim, index = _only(node, carrying, "self"), int(argument(node, "dim")), argument(node, "index")
    if carried.labels.shape[dim] == 1:
        return carried.of(carried.labels.squeeze(dim))
    _fixed(index)
    return carried.of(carried.labels.select(dim, index))


def _fixed(*values: Any) -> None:
    if any(isinstance(value, fx.Node) for value in values):
        raise _Unfit(", which picks channels by a size that is not fixed")


def _split(node: fx.Node, carrying: Carrying) -> tuple[Carried, ...]:
    carried, dim = _only(node, carrying, "self"), int(argument(node, "dim"))
    parts: Sequence[Tensor] = [carried.labels] * len(node.meta["val"])
    if carried.labels.shape[dim] > 1:
        _fixed(*node.args[1:])
        parts = node.target(carried.labels, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    elif node.target is aten.unbind.int:
        parts = [part.squeeze(dim) for part in parts]
    return tuple(carried.of(part) for part in parts)


def _repeated(node: fx.Node, carrying: Carrying) -> Carried:
    carried = _only(node, carrying, "self")
    labels = _aligned(carried.labels, _rank(node))
    times = [1 if size == 1 else count for size, count in zip(labels.shape, _list(node.args[1]), strict=True)]
    _fixed(*times)
    return carried.of(labels.repeat(times))


def _list(value: Any) -> list[Any]:
    return list(value)


def _repeat_interleaved(node: fx.Node, carrying: Carrying) -> Carried:
    carried, dim = _only(node, carrying, "self"), argument(node, "dim")
    if dim is None:
        raise _Unfit(", which flattens it")
    if carried.labels.shape[dim] == 1:
        return carried
    _fixed(argument(node, "repeats"))
    return carried.of(carried.labels.repeat_interleave(argument(node, "repeats"), dim))


def _indexed(node: fx.Node, carrying: Carrying) -> Carried:
    """Rows picked along leading dimensions, in front of those that labels depend on."""
    carried, picked = _only(node, carrying, "self"), _list(node.args[1])
    if None in picked:
        return _indexed_by_constant(node, carried, picked, carrying)
    untouched = carried.labels.dim() - len(picked)
    if carried.tail > untouched:
        raise _Unfit(", which picks channels")
    labels = carried.labels.reshape(carried.labels.shape[len(picked) :])
    return carried.of(_aligned(labels, _rank(node)))


def _indexed_by_constant(node: fx.Node, carried: Carried, picked: list[Any], carrying: Carrying) -> Carried:
    """x[:, :, index], with a list of numbers for the index."""
    (dim, *others) = [place for place, index in enumerate(picked) if index is not None]
    if others or _rank(_node(picked[dim])) != 1:
        raise _Unfit(", which picks along several dimensions")
    if carried.labels.shape[dim] == 1:
        return carried
    index = carrying.constant(picked[dim])
    if index is None:
        raise _Unfit(", which picks channels")
    return carried.of(carried.labels.index_select(dim, index.cpu().long() % carried.labels.shape[dim]))


def _picked(node: fx.Node, carrying: Carrying) -> Carried:
    carried = _only(node, carrying, "self")
    if carried.labels.shape[int(argument(node, "dim"))] > 1:
        raise _Unfit(", which picks channels")
    return carried


def _summed(node: fx.Node, carrying: Carrying) -> Carried:
    carried, dims = _only(node, carrying, "self"), argument(node, "dim")
    if not dims or any(carried.labels.shape[dim] > 1 for dim in dims):
        raise _Unfit(", which sums over channels")
    keep = bool(argument(node, "keepdim"))
    return carried if keep else carried.of(carried.labels.squeeze([int(dim) for dim in dims]))


# -- multiplying -------------------------------------------------------------------------------------------------------


def _product(node: fx.Node, carrying: Carrying) -> Carried:
    """By anything that carries nothing; two that carry the same make a square."""
    both = [carrying.one(value) for value in node.args[:2] if value in carrying]
    labels = [_aligned(carried.labels, _rank(node)) for carried in both]
    if not torch.equal(labels[0], labels[-1]):
        raise _Unfit(", which multiplies different channels")
    power = sum(carried.power for carried in both)
    return Carried(labels[0], power, any(carried.bends for carried in both))


def _quotient(node: fx.Node, carrying: Carrying) -> Carried:
    carried = _only(node, carrying, "self")
    return carried.of(_aligned(carried.labels, _rank(node)))


def _sum(node: fx.Node, carrying: Carrying) -> Carried:
    """Of two that carry the same."""
    both = [carrying.one(value) for value in node.args[:2] if value in carrying]
    if len(both) < 2:
        raise _Unfit(f", with {next(_shown(value) for value in node.args[:2] if value not in carrying)}")
    labels = [_aligned(carried.labels, _rank(node)) for carried in both]
    if both[0].power != both[1].power or not torch.equal(*labels):
        raise _Unfit(", which adds different channels")
    return Carried(labels[0], both[0].power, both[0].bends or both[1].bends)


def _shown(value: object) -> str:
    return str(value.target) if isinstance(value, fx.Node) else str(value)


def _homogeneous(node: fx.Node, carrying: Carrying) -> Carried:
    """f(t x) = t f(x) for t > 0."""
    carried = _only(node, carrying, "self")
    return carried.of(carried.labels, bends=True)


def _raised(node: fx.Node, carrying: Carrying) -> Carried:
    carried, exponent = _only(node, carrying, "self"), argument(node, "exponent")
    if isinstance(exponent, fx.Node) or exponent == 0:
        raise _Unfit(f", by {exponent}")
    return carried.of(carried.labels, carried.power * exponent, bends=True)


def _squared(node: fx.Node, carrying: Carrying) -> Carried:
    carried = _only(node, carrying, "self")
    return carried.of(carried.labels, carried.power * 2, bends=True)


def _masked(node: fx.Node, carrying: Carrying) -> Carried:
    carried = _only(node, carrying, "self")
    if argument(node, "value") != 0:
        raise _Unfit(f", which puts {argument(node, 'value')} in places")
    return carried.of(_aligned(carried.labels, _rank(node)))


def _attended(node: fx.Node, carrying: Carrying) -> Carried:
    """Values [B,G,T,D] weighted to [B,H,S,D]: all query heads of a kv head carry what it does."""
    carried = _only(node, carrying, "v")
    labels = carried.labels
    if labels.shape[0] > 1 or labels.shape[2] > 1:
        raise _Unfit(", which mixes channels and rows")
    if labels.shape[1] > 1:
        heads, groups = (int(_node(argument(node, name)).meta["val"].shape[1]) for name in ("q", "v"))
        labels = labels.repeat_interleave(heads // groups, 1)
    return carried.of(labels)


def _mixed(node: fx.Node, carrying: Carrying) -> Carried:
    """Rows of the right factor, weighted by the left one, which carries nothing."""
    carried = _only(node, carrying, node.target._schema.arguments[1].name)  # type: ignore[union-attr]
    if carried.labels.dim() < 2 or carried.labels.shape[-2] > 1:
        raise _Unfit(", which sums over channels")
    return carried.of(_aligned(carried.labels, _rank(node)))


Rule = Callable[[fx.Node, Carrying], "Carried | tuple[Carried, ...]"]
RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.alias.default,
                     aten.neg.default), _same),
    **dict.fromkeys((aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default,
                     aten.squeeze.dim), _permuted),
    **dict.fromkeys((aten.reshape.default, aten.view.default, aten._unsafe_view.default), _reshaped),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int), _split),
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim), _summed),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor), _product),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _quotient),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _sum),
    **dict.fromkeys((aten.relu.default, aten.leaky_relu.default, aten.abs.default), _homogeneous),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _mixed),
    aten.expand.default: _expanded,
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    aten.repeat.default: _repeated,
    aten.repeat_interleave.self_int: _repeat_interleaved,
    aten.index.Tensor: _indexed,
    aten.index_select.default: _picked,
    aten.pow.Tensor_Scalar: _raised,
    aten.square.default: _squared,
    aten.masked_fill.Scalar: _masked,
    slim.attention.default: _attended,
}  # fmt: skip
