"""Rotary embedding: from cosines, slices and negations to ``slim.rope_table`` and ``slim.rope``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from slim.compiler.near import LastAxis, Middle, Number
from slim.compiler.raising.cleanup import CASTS, COPIES
from slim.compiler.rules import Either, Literal, Match, Near, NearMiss, Pattern, Rule, Var, argument, call

aten, slim = torch.ops.aten, torch.ops.slim
_VIEWS = CASTS | COPIES | {aten.unsqueeze.default, aten.expand.default, aten.reshape.default}
_END = 1 << 60

# -- the table: cos and sin of positions x frequencies -----------------------------------------------------------------


def _table(m: Match, which: int) -> fx.Node | None:
    angles = _angles(m, m["f"])
    if angles is None:
        return None
    positions, inv_freq = angles
    table = m.new(slim.rope_table.default, positions, inv_freq)
    return m.new(operator.getitem, table, which)


def _angles(m: Match, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(positions [B,S], inv_freq [R/2]) where ``node`` is their outer product."""
    if node.target is aten.transpose.int and node.args[0].target in (aten.matmul.default, aten.bmm.default):
        node = node.args[0]
    elif node.target not in (aten.mul.Tensor, aten.matmul.default, aten.bmm.default):
        return None
    sides = [_peel(side) for side in node.args[:2]]
    for positions, inv_freq in (sides, sides[::-1]):
        if _is_frequencies(inv_freq) and _is_positions(positions):
            return positions, inv_freq
    return None


def _peel(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        node = node.args[0]
    return node


def _is_frequencies(node: Any) -> bool:
    value = node.meta["val"] if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point() and len(value.shape) == 1


def _is_positions(node: Any) -> bool:
    value = node.meta["val"] if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32) and len(value.shape) == 2


def _rescaled(m: Match) -> fx.Node | None:
    """table * s = table(scale=s)"""
    if not isinstance(m["s"], (int, float)):
        return None
    table = m["t"]
    scale = float(argument(table, "scale")) * float(m["s"])
    new = m.new(slim.rope_table.default, *table.args, scale=scale, dtype=argument(table, "dtype"))
    return m.new(operator.getitem, new, m["i"])


def _retyped(m: Match) -> fx.Node | None:
    table = m["t"]
    scale, dtype = float(argument(table, "scale")), m.node.meta["val"].dtype
    return m.new(operator.getitem, m.new(slim.rope_table.default, *table.args, scale=scale, dtype=dtype), m["i"])


class _Entry(Pattern):
    """getitem(rope_table t, i)."""

    def match(self, value: Any, bound: dict[str, Any]) -> Any:
        if isinstance(value, fx.Node) and value.target is operator.getitem:
            table, index = value.args
            if isinstance(table, fx.Node) and table.target is slim.rope_table.default:
                yield {**bound, "t": table, "i": index}


_DOUBLED = call(aten.cat.default, args=(["f", "f"],), name="doubled")
_REPEATED = call(aten.repeat_interleave.self_int, args=("f", 2), name="doubled")
_STACKED = call(aten.reshape.default, args=(call(aten.stack.default, args=(["f", "f"], -1)),), name="doubled")
_TWICE = Either((_DOUBLED, _REPEATED, _STACKED))


def _pushed_in(m: Match) -> fx.Node | None:
    """g(twice(f)) = twice(g(f)) for what works number by number."""
    twice = m["doubled"]
    args = tuple(a for a in m.node.args[1:])
    kwargs = dict(m.node.kwargs)
    if any(isinstance(a, fx.Node) for a in args):
        return None
    inner = m.new(m.node.target, m["f"], *args, **kwargs)
    if twice.target is aten.cat.default:
        return m.new(aten.cat.default, [inner, inner], *twice.args[1:])
    if twice.target is aten.repeat_interleave.self_int:
        return m.new(aten.repeat_interleave.self_int, inner, *twice.args[1:], **twice.kwargs)
    stacked = m.new(aten.stack.default, [inner, inner], -1)
    return m.new(aten.reshape.default, stacked, twice.args[1])


TABLE_RULES = (
    Rule(
        "cos(twice(f)) = twice(cos(f))",
        call(aten.cos.default, aten.sin.default, aten.mul.Tensor, aten.mul.Scalar, *CASTS, args=(_TWICE,)),
        _pushed_in,
    ),
    Rule("cos(positions x inv_freq) = rope_table[0]", call(aten.cos.default, args=("f",)), lambda m: _table(m, 0)),
    Rule("sin(positions x inv_freq) = rope_table[1]", call(aten.sin.default, args=("f",)), lambda m: _table(m, 1)),
    Rule("rope_table * s = rope_table(scale=s)", call(aten.mul.Tensor, args=(_Entry(), "s")), _rescaled),
    Rule("cast(rope_table) = rope_table(dtype)", call(*CASTS, args=(_Entry(),)), _retyped),
)

# -- the rotation ------------------------------------------------------------------------------------------------------


def _whole(name: str, first: Any, last: Any, step: int = 1) -> Pattern:
    """x[..., first:last:step] of the tensor called ``name``."""
    return call(aten.slice.Tensor, args=(name, LastAxis(name, _TURN), first, last, Literal(step)))


_TURN = "its turn"
_LAST = Var("end", lambda v: isinstance(v, int) and v > _END)
_HALF = Middle("x", "the cut of its turn")


def _on_heads(full: Pattern) -> Pattern:
    """A table [B,S,R] made to broadcast over heads."""
    axis = Number(1, "the axis at which its table is widened")
    return Either((call(aten.unsqueeze.default, args=(full, axis)), full))


def _half(name: str) -> Pattern:
    return _on_heads(call(aten.cat.default, args=([name, name], LastAxis(name, "the doubling of its table"))))


def _pairs(name: str) -> Pattern:
    stacked = call(aten.reshape.default, args=(call(aten.stack.default, args=([name, name], -1)),))
    return _on_heads(Either((call(aten.repeat_interleave.self_int, args=(name, 2)), stacked)))


def _any(name: str) -> Pattern:
    return Var(name, lambda v: isinstance(v, fx.Node))


def _negated(x: Pattern) -> Pattern:
    return call(aten.neg.default, args=(x,))


def _joined_halves(*halves: Pattern) -> Pattern:
    return call(aten.cat.default, args=(halves, LastAxis("x", _TURN)))


def _joined_pairs(*parts: Pattern) -> Pattern:
    return call(aten.reshape.default, args=(call(aten.stack.default, args=(parts, -1)),))


_FIRST_HALF, _SECOND_HALF = _whole("x", 0, _HALF), _whole("x", _HALF, _LAST)
_EVEN, _ODD = _whole("x", 0, _LAST, 2), _whole("x", 1, _LAST, 2)
_HALF_TURN, _HALF_BACK = (
    _joined_halves(_negated(_SECOND_HALF), _FIRST_HALF),
    _joined_halves(_SECOND_HALF, _negated(_FIRST_HALF)),
)
_PAIR_TURN, _PAIR_BACK = _joined_pairs(_negated(_ODD), _EVEN), _joined_pairs(_ODD, _negated(_EVEN))


def _rotation(turn: Pattern, table: Callable[[str], Pattern], op: Any = aten.add.Tensor) -> Pattern:
    """x * cos + turn(x) * sin"""
    parts = (
        call(aten.mul.Tensor, args=("x", table("c")), commutes=True),
        call(aten.mul.Tensor, args=(turn, table("s")), commutes=True),
    )
    return call(op, args=parts, commutes=op is aten.add.Tensor)


def _near_rotations(turn: Pattern, back: Pattern, table: Any, other: Any, what: str, others: str) -> tuple[Near, ...]:
    """What looks like a rotation of ``what``, by a table laid out for them, and is none."""
    return (
        Near(_rotation(turn, table, aten.sub.Tensor), "it turns the other way: the product with the sine is taken off"),
        Near(_rotation(back, table), "it turns the other way: the first of each two is negated, not the second"),
        Near(_rotation(turn, other), f"it turns {what} by a table that is laid out for {others}"),
        Near(
            _rotation(turn, _any), f"its table is not one number for both of two that are turned, laid out for {what}"
        ),
    )


def _rope(m: Match, interleaved: bool) -> fx.Node | None:
    x, c, s = m["x"], m["c"], m["s"]
    if len(x.meta["val"].shape) != 4:
        raise NearMiss(f"it rotates {len(x.meta['val'].shape)} dimensions, not [batch, heads, length, width]")
    if len(c.meta["val"].shape) != 3:
        raise NearMiss("its table is not [batch, length, width]")
    if torch.promote_types(c.meta["val"].dtype, x.meta["val"].dtype) != x.meta["val"].dtype:
        raise NearMiss(f"its table is {c.meta['val'].dtype} and what it turns is {x.meta['val'].dtype}")
    return m.new(slim.rope.default, x, c, s, interleaved=interleaved)


def _from_halves(m: Match) -> fx.Node | None:
    """cat(a c - b s, b c + a s) with a, b the halves of x."""
    a, b = m["a"], m["b"]
    x = _joined(a, b) or m.new(aten.cat.default, [a, b], -1)
    c, s = m["c"], m["s"]
    if c.target is not aten.unsqueeze.default or s.target is not aten.unsqueeze.default:
        raise NearMiss("its table does not broadcast over the heads")
    if len(x.meta["val"].shape) != 4 or c.args[1] != 1:
        raise NearMiss("it does not rotate [batch, heads, length, width]")
    return m.new(slim.rope.default, x, c.args[0], s.args[0])


def _joined(a: fx.Node, b: fx.Node) -> fx.Node | None:
    """x, where a and b are its first and second half along the last dimension."""
    if a.target is operator.getitem and b.target is operator.getitem and a.args[0] is b.args[0]:
        split = a.args[0]
        return split.args[0] if (a.args[1], b.args[1]) == (0, 1) and len(split.meta["val"]) == 2 else None
    if a.target is aten.slice.Tensor and b.target is aten.slice.Tensor and a.args[0] is b.args[0]:
        return a.args[0] if argument(a, "start") in (0, None) and argument(a, "end") == argument(b, "start") else None
    return None


def _moved(m: Match) -> fx.Node | None:
    """g(unsqueeze(t, 1)) = unsqueeze(g(t), 1) for g along the last dimension of a table t [B,S,R]."""
    table, dim = m["t"], m["dim"]
    if len(table.meta["val"].shape) != 3 or dim not in (-1, 3):
        return None
    names = [a.name for a in m.node.target._schema.arguments if not a.kwarg_only]
    arguments = {name: argument(m.node, name) for name in names[1:]}
    inner = m.new(m.node.target, table, *({**arguments, "dim": -1}.values()))
    return m.new(aten.unsqueeze.default, inner, 1)


def _first_half(m: Match) -> fx.Node | None:
    """twice(f)[..., :half] = f"""
    f, start, end = m["f"], m["start"], m["end"]
    width = f.meta["val"].shape[-1]
    cat_dim, rank = m["doubled"].args[1:] or (0,), len(f.meta["val"].shape)
    last = cat_dim[0] in (-1, rank - 1) and m["dim"] in (-1, rank - 1)
    if not last or argument(m.node, "step") != 1:
        return None
    return f if (start in (0, None) and end == width) or (start == width and end >= 2 * width) else None


def _with_rest(m: Match) -> fx.Node | None:
    """cat(rope(x[..., :R]), x[..., R:]) = rope(x) of the first R channels."""
    x, rope = m["x"], m["rope"]
    width = rope.meta["val"].shape[-1]
    first, rest = m["first"], m["rest"]
    if not _is_first_and_rest(first, rest, x, width):
        return None
    return m.new(slim.rope.default, x, *rope.args[1:], **rope.kwargs)


def _is_first_and_rest(first: fx.Node, rest: fx.Node, x: fx.Node, width: int) -> bool:
    if first.target is aten.slice.Tensor and rest.target is aten.slice.Tensor:
        same = first.args[0] is rest.args[0] is x
        return same and argument(first, "start") in (0, None) and argument(rest, "start") == width
    return False


def _rest_of_split(m: Match) -> fx.Node | None:
    first, rest, rope = m["first"], m["rest"], m["rope"]
    x = _split_source(first, rest)
    return None if x is None else m.new(slim.rope.default, x, *rope.args[1:], **rope.kwargs)


def _split_source(first: fx.Node, rest: fx.Node) -> fx.Node | None:
    if first.target is operator.getitem and rest.target is operator.getitem and first.args[0] is rest.args[0]:
        split = first.args[0]
        whole = (first.args[1], rest.args[1]) == (0, 1) and len(split.meta["val"]) == 2
        return split.args[0] if whole else None
    return None


def _turned_halves(first: Any, second: Any) -> Pattern:
    """cat(a c - b s, b c + a s), with these operations for - and +."""

    def product(half: str, table: str) -> Pattern:
        return call(aten.mul.Tensor, args=(half, table))

    halves = [
        call(first, args=(product("a", "c"), product("b", "s"))),
        call(second, args=(product("b", "c"), product("a", "s"))),
    ]
    return call(aten.cat.default, args=(halves, LastAxis("a", _TURN)))


_NEAR_HALVES = _near_rotations(_HALF_TURN, _HALF_BACK, _half, _pairs, "halves", "pairs")
_NEAR_PAIRS = _near_rotations(_PAIR_TURN, _PAIR_BACK, _pairs, _half, "pairs", "halves")
_FIRST = call(aten.slice.Tensor, args=("x",), name="first")
ROTATION_RULES = (
    Rule("x cos + turn(x) sin = rope(x)", _rotation(_HALF_TURN, _half), lambda m: _rope(m, False), _NEAR_HALVES),
    Rule(
        "x cos + turn(x) sin = rope(x, interleaved)",
        _rotation(_PAIR_TURN, _pairs),
        lambda m: _rope(m, True),
        _NEAR_PAIRS,
    ),
    Rule(
        "cat(a cos - b sin, b cos + a sin) = rope(x)",
        _turned_halves(aten.sub.Tensor, aten.add.Tensor),
        _from_halves,
        near=(
            Near(
                _turned_halves(aten.add.Tensor, aten.sub.Tensor),
                "it turns the other way: the sine is added to the first half and taken off the second",
            ),
        ),
    ),
    Rule(
        "cat(rope(x[:R]), x[R:]) = rope(x)",
        call(
            aten.cat.default,
            args=(
                [
                    call(slim.rope.default, args=(_FIRST,), name="rope"),
                    call(aten.slice.Tensor, args=("x",), name="rest"),
                ],
            ),
        ),
        _with_rest,
    ),
    Rule(
        "cat(rope(split(x)[0]), split(x)[1]) = rope(x)",
        call(aten.cat.default, args=([call(slim.rope.default, args=("first",), name="rope"), "rest"],)),
        _rest_of_split,
    ),
)

_UNSQUEEZED = call(aten.unsqueeze.default, args=("t", 1))
SHAPE_RULES = (
    Rule(
        "unsqueeze(t)[..., a:b] = unsqueeze(t[..., a:b])",
        call(aten.slice.Tensor, args=(_UNSQUEEZED, "dim"), step=Var("step")),
        _moved,
    ),
    Rule(
        "repeat(unsqueeze(t)) = unsqueeze(repeat(t))",
        call(aten.repeat_interleave.self_int, args=(_UNSQUEEZED, "n", "dim")),
        _moved,
    ),
    Rule("twice(f)[..., :half] = f", call(aten.slice.Tensor, args=(_DOUBLED, "dim", "start", "end")), _first_half),
)

ROPE = SHAPE_RULES + TABLE_RULES + ROTATION_RULES
