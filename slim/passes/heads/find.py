"""Finds, by data flow, the linears that make an attention's queries, keys and values, and the one that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.rules import argument
from slim.compiler.uses import DEQUANTIZE, LINEAR

aten, slim = torch.ops.aten, torch.ops.slim

_COPIES = frozenset({
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten._to_copy.default, aten.detach.default,
})  # fmt: skip
RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
_TRANSPOSES = frozenset({aten.transpose.int, aten.permute.default})
_SCALES = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})
_NORMS = frozenset({slim.rms_norm.default, slim.layer_norm.default})
_ROPE = slim.rope.default


class LeftAlone(Exception):
    """Why the heads of a layer are not touched."""


@dataclass(frozen=True)
class Projection:
    """One of q, k and v: a linear, and how its rows become heads [B, heads, S, width].

    Row ``h * width + c`` of the linear's weight is channel ``c`` of head ``h``.

    Attributes:
        path: the operations from behind the linear up to the attention, in order.
        rope: the rotation among them.
        norm: a norm over each head's channels among them.
    """

    what: str
    linear: fx.Node
    path: tuple[fx.Node, ...]
    heads: int
    width: int
    rope: fx.Node | None = None
    norm: fx.Node | None = None

    @property
    def weight(self) -> str:
        return _name(self.linear.args[1])

    @property
    def bias(self) -> str | None:
        bias = argument(self.linear, "bias")
        return None if bias is None else _name(bias)


@dataclass(frozen=True)
class Heads:
    """An attention layer: H query heads over G kv heads, and the linear that reads what they return.

    Attributes:
        attention: the ``slim.attention`` node.
        out: the linear over the heads' results, head by head.
        site: the weight that names the layer in reports.
    """

    attention: fx.Node
    q: Projection
    k: Projection
    v: Projection
    out: fx.Node

    @property
    def site(self) -> str:
        return self.k.weight

    @property
    def weights(self) -> list[str]:
        """Those that make queries, keys and values, and their biases."""
        made = (self.q, self.k, self.v)
        return [one.weight for one in made] + [one.bias for one in made if one.bias is not None]

    @property
    def share(self) -> int:
        """Query heads that read one kv head."""
        return self.q.heads // self.k.heads

    @property
    def out_weight(self) -> str:
        return _name(self.out.args[1])

    @property
    def out_bias(self) -> str | None:
        bias = argument(self.out, "bias")
        return None if bias is None else _name(bias)

    @property
    def sinks(self) -> str | None:
        """The weight that holds a score for each query head to leave attention at."""
        sinks = argument(self.attention, "sinks")
        return None if sinks is None or sinks.op != "get_attr" or len(sinks.users) > 1 else str(sinks.target)

    @property
    def ordered(self) -> bool:
        """Whether query heads must stay where they are: something that cannot follow them differs from head to head."""
        if argument(self.attention, "sinks") is not None and self.sinks is None:
            return True
        bias = argument(self.attention, "bias")
        by_head = bias is not None and bias.meta["val"].shape[1] != 1
        return by_head or argument(self.attention, "slopes") is not None


def find_heads(program: Program, attention: fx.Node) -> Heads:
    """The layer around ``attention``.

    Raises:
        LeftAlone: where a step between the linears and the attention is not understood, or something is shared with
            another reader.
    """
    q, k, v = (_projection(node, what) for node, what in zip(attention.args[:3], _WHAT, strict=True))
    if q.heads % k.heads or k.heads != v.heads:
        raise LeftAlone(f"its {q.heads} query heads do not divide over {k.heads} key and {v.heads} value heads")
    if len({q.linear, k.linear, v.linear}) < 3:
        raise LeftAlone("one linear makes two of its queries, keys and values")
    _same_rotation(q, k)
    return Heads(attention, q, k, v, _reader(attention))


_WHAT = ("queries", "keys", "values")


# -- from the linear to the attention ----------------------------------------------------------------------------------


def _projection(value: object, what: str) -> Projection:
    assert isinstance(value, fx.Node)
    path: list[fx.Node] = []
    node = value
    while node.target is not LINEAR:
        path.insert(0, node)
        node = _source(node, what)
    for made in (node, *path):
        if len(made.users) > 1:
            readers = [str(user.target) for user in made.users if user not in path]
            raise LeftAlone(f"its {what} are read by {readers[0] if readers else 'the output'} too, as {made.name}")
    _only_reader(node)
    axes = _Axes(node, what)
    for step in path:
        axes.follow(step)
    if axes.rope is not None and what == "values":
        raise LeftAlone("its values are rotated")
    shape = value.meta["val"].shape
    heads, width = shape[1], shape[3]
    if (axes.head, axes.channel) != (1, 3) or not isinstance(heads, int) or not isinstance(width, int):
        raise LeftAlone(f"its {what} are not rows of a linear, head by head")
    return Projection(what, node, tuple(path), heads, width, axes.rope, axes.norm)


def _source(node: fx.Node, what: str) -> fx.Node:
    """The value that ``node`` moves, copies, scales or turns."""
    known = node.target in _COPIES | RESHAPES | _TRANSPOSES | _SCALES | _NORMS or node.target is _ROPE
    if not known:
        origin = node.target if node.op == "call_function" else f"{node.op} {node.target}"
        raise LeftAlone(f"{origin} stands between its {what} and a linear")
    if node.target in _SCALES:
        whole = [a for a in node.args if isinstance(a, fx.Node) and a.op == "call_function" and _alike(a, node)]
        if not whole:
            raise LeftAlone(f"{node.target} stands between its {what} and a linear")
        return whole[0]
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _alike(a: fx.Node, b: fx.Node) -> bool:
    return len(a.meta["val"].shape) == len(b.meta["val"].shape) and bool(
        a.meta["val"].shape[-1] == b.meta["val"].shape[-1]
    )


class _Axes:
    """Where the features of a linear are, on the way to [B, heads, S, channels]: one axis at first, then two."""

    def __init__(self, linear: fx.Node, what: str) -> None:
        self.what = what
        self.flat = True
        self.head = self.channel = len(linear.meta["val"].shape) - 1
        self.rope: fx.Node | None = None
        self.norm: fx.Node | None = None

    def follow(self, node: fx.Node) -> None:
        source = node.args[0]
        rank = len(node.meta["val"].shape)
        if node.target in _COPIES:
            return
        if node.target in RESHAPES:
            self._split(node)
        elif node.target in _TRANSPOSES:
            moved = _order(node, rank)
            self.head, self.channel = moved.index(self.head), moved.index(self.channel)
        elif node.target in _SCALES:
            self._scaled(node, rank)
        elif node.target in _NORMS:
            if self.flat or self.channel != rank - 1:
                raise LeftAlone(f"a norm over all heads at once stands between its {self.what} and their linear")
            self.norm = node
        elif node.target is _ROPE and (self.head, self.channel) == (1, 3) and self.rope is None:
            self.rope = node
        else:
            raise LeftAlone(f"{node.target} of {source} stands between its {self.what} and their linear")

    def _split(self, node: fx.Node) -> None:
        before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
        features = before[self.channel]
        if self.flat and len(after) == 4 and isinstance(after[2], int) and after[2] * after[3] == features:
            self.flat, self.head, self.channel = False, 2, 3
        elif self.flat and after[-1] == features:
            self.head = self.channel = len(after) - 1
        else:
            raise LeftAlone(f"{node.name} cuts its {self.what} into parts other than heads")

    def _scaled(self, node: fx.Node, rank: int) -> None:
        for factor in node.args:
            shape = factor.meta["val"].shape if isinstance(factor, fx.Node) else ()
            if isinstance(factor, fx.Node) and _alike(factor, node) and factor.op == "call_function":
                continue
            aligned = [1] * (rank - len(shape)) + list(shape)
            if any(aligned[axis] != 1 for axis in {self.head, self.channel} if aligned):
                raise LeftAlone(f"{node.name} scales the channels of its {self.what} one by one")


def _order(node: fx.Node, rank: int) -> list[int]:
    """Which axis of its argument each axis of a transpose's or permute's result is."""
    axes: Any = node.args[1:]
    if node.target is aten.permute.default:
        return [axis % rank for axis in axes[0]]
    order = list(range(rank))
    a, b = axes[0] % rank, axes[1] % rank
    order[a], order[b] = b, a
    return order


def _same_rotation(q: Projection, k: Projection) -> None:
    if (q.rope is None) != (k.rope is None):
        raise LeftAlone("of its queries and keys only one is rotated")
    if q.rope is None or k.rope is None:
        return
    names = ("cos", "sin", "interleaved")
    if any(argument(q.rope, name) is not argument(k.rope, name) for name in names):
        raise LeftAlone("its queries and keys are rotated by different angles")


# -- from the attention to the linear that reads it --------------------------------------------------------------------


def _reader(attention: fx.Node) -> fx.Node:
    node, head, channel, flat = attention, 1, 3, False
    while True:
        if len(node.users) != 1:
            raise LeftAlone(f"its result is read by {len(node.users)} nodes, as {node.name}")
        user = next(iter(node.users))
        shape: Sequence[int] = user.meta["val"].shape if isinstance(user.meta.get("val"), Tensor) else ()
        if user.target is LINEAR and user.args[0] is node and flat:
            _only_reader(user)
            return user
        if user.target in _TRANSPOSES and not flat:
            moved = _order(user, len(shape))
            head, channel = moved.index(head), moved.index(channel)
        elif user.target in RESHAPES and _joins(node, shape, head, channel, flat):
            flat, head, channel = True, len(shape) - 1, len(shape) - 1
        elif user.target not in _COPIES:
            raise LeftAlone(f"{user.target} stands between its result and the next linear")
        node = user


def _joins(node: fx.Node, after: Sequence[int], head: int, channel: int, flat: bool) -> bool:
    """Whether a reshape puts the heads, in order, onto one axis, or leaves them there."""
    before = node.meta["val"].shape
    if flat:
        return bool(after[-1] == before[-1])
    last = len(before) - 1
    return (head, channel) == (last - 1, last) and bool(after[-1] == before[head] * before[channel])


# -- weights -----------------------------------------------------------------------------------------------------------


def _only_reader(linear: fx.Node) -> None:
    """Refuses a linear whose weights are computed, quantised, or read elsewhere."""
    for weight in (linear.args[1], argument(linear, "bias")):
        if weight is None:
            continue
        assert isinstance(weight, fx.Node)
        if weight.op != "get_attr":
            kind = "quantised" if weight.target is DEQUANTIZE else f"computed, by {weight.target}"
            raise LeftAlone(f"the weight of {linear.name} is {kind}")
        if len(weight.users) > 1:
            raise LeftAlone(f"{weight.target} is read by {len(weight.users)} nodes")


def _name(node: object) -> str:
    assert isinstance(node, fx.Node)
    return str(node.target)
