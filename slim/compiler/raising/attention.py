"""Attention: sdpa, or a softmax(q k^T) v written by hand, raised to ``slim.attention``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from slim.compiler.program import Program
from slim.compiler.raising.alibi import by_head
from slim.compiler.raising.cleanup import COPIES
from slim.compiler.raising.masks import HIDDEN, static_gate
from slim.compiler.raising.scores import (
    TRANSPARENT,
    WHERE,
    Scores,
    add_mask,
    hides,
    is_bool,
    number_of,
    peel,
    shape_of,
    together,
)
from slim.compiler.rules import Either, Match, Near, NearMiss, Pattern, Rule, Through, argument, call

aten, slim = torch.ops.aten, torch.ops.slim
ATTENTION = slim.attention.default
_MATMULS = frozenset({aten.matmul.default, aten.bmm.default})


def _fold_visibility(m: Match) -> fx.Node | None:
    """attention(q, k, v, bias=visibility(...)) = attention(q, k, v, causal, window, key_mask)."""
    bias = m["bias"]
    if not isinstance(bias, fx.Node):
        return None
    scores = Scores(m["q"], m["k"], causal=m["causal"], window=m["window"], key_mask=m["key_mask"], slopes=m["slopes"])
    known = replace(scores, biases=[])
    add_mask(m.program, scores, bias)
    if replace(scores, biases=[]) == known:
        return None
    return _attention(m, scores, m["v"], sinks=m["sinks"], layer=m["layer"], scale=m["scale"], softcap=m["softcap"])


def _attention(m: Match, scores: Scores, v: fx.Node, **options: Any) -> fx.Node:
    bias = together(m, scores.biases)
    options = {"sinks": None, "layer": -1, "scale": scores.scale, "softcap": scores.softcap, **options}
    sinks = options.pop("sinks")
    return m.new(
        ATTENTION,
        scores.q,
        scores.k,
        v,
        scores.key_mask,
        bias,
        sinks,
        scores.slopes,
        causal=scores.causal,
        window=scores.window,
        **options,
    )


# -- F.scaled_dot_product_attention ------------------------------------------------------------------------------------


def _from_sdpa(m: Match) -> fx.Node | None:
    q, k, v = m["q"], m["k"], m["v"]
    if len(shape_of(q)) != 4:
        raise NearMiss(f"its queries have {len(shape_of(q))} dimensions, not 4 (batch, heads, length, width)")
    if m["dropout"]:
        raise NearMiss("it drops out")
    scale = m["scale"] if m["scale"] is not None else float(q.meta["val"].shape[-1]) ** -0.5
    scores = Scores(q, unrepeated(k), scale=float(scale), causal=bool(m["causal"]))
    if m["mask"] is not None:
        add_mask(m.program, scores, m["mask"])
    return _attention(m, scores, unrepeated(v))


def unrepeated(k: fx.Node) -> fx.Node:
    """k before its heads were repeated for the query heads (unsqueeze, expand, reshape; or repeat_interleave)."""
    if k.target is aten.reshape.default:
        wide = k.args[0]
        if isinstance(wide, fx.Node) and wide.target is aten.expand.default:
            narrow = wide.args[0]
            if isinstance(narrow, fx.Node) and narrow.target is aten.unsqueeze.default and narrow.args[1] == 2:
                return narrow.args[0]
    if k.target is aten.repeat_interleave.self_int and argument(k, "dim") == 1:
        return k.args[0]
    return k


# -- softmax(q k^T) v --------------------------------------------------------------------------------------------------


def _from_softmax(m: Match) -> fx.Node | None:
    probabilities, v = m["p"], m["v"]
    if _peel_scores(m.node.args[0]) is not probabilities:
        raise NearMiss("its probabilities are reshaped between softmax and product")
    if argument(probabilities, "dim") not in (-1, len(shape_of(probabilities)) - 1):
        raise NearMiss("its softmax is not over the keys")
    scores = Scores()
    _read_scores(m.program, probabilities.args[0], scores)
    flat = scores.q
    q, k, v = (_four_dimensional(x) for x in (scores.q, scores.k, v))
    scores.q, scores.k = q, unrepeated(k)
    scores.slopes = by_head(m.program, scores.slopes, shape_of(q)[1])
    out = _attention(m, scores, unrepeated(v))
    if len(shape_of(m.node)) == 4:
        return out
    shape: Any = flat.args[1]
    return m.new(aten.reshape.default, out, [*shape[:2], shape_of(v)[-1]])


def _four_dimensional(x: fx.Node | None) -> fx.Node:
    """x as [batch, heads, length, width], also where batch and heads were made one dimension for bmm."""
    if x is not None and len(shape_of(x)) == 3 and x.target is aten.reshape.default:
        x = x.args[0]
    if x is None or len(shape_of(x)) != 4:
        raise NearMiss("queries, keys and values are not [batch, heads, length, width]")
    return x


def _read_scores(program: Program, node: Any, scores: Scores, factor: float = 1.0) -> None:
    """Walks from the softmax to q k^T, collecting what happens on the way; ``factor`` scales all of it."""
    node = _peel_scores(node)
    left, right = (*node.args, None, None)[:2]
    number = number_of(program, right)
    if node.target is aten.add.Tensor and isinstance(right, fx.Node):
        inner, mask = (left, right) if _leads_to_matmul(left) else (right, left)
        if argument(node, "alpha") != 1 or is_bool(peel(mask)):
            raise NearMiss(f"it adds {mask.name}, which is scaled or boolean")
        add_mask(program, scores, mask, factor)
        _read_scores(program, inner, scores, factor)
    elif node.target is aten.sub.Tensor and isinstance(right, fx.Node) and argument(node, "alpha") == 1:
        add_mask(program, scores, right, -factor)
        _read_scores(program, left, scores, factor)
    elif node.target in (aten.mul.Tensor, aten.mul.Scalar) and number is not None:
        _read_scores(program, left, scores, factor * number)
    elif node.target in (aten.div.Tensor, aten.div.Scalar) and number is not None:
        _read_scores(program, left, scores, factor / number)
    elif node.target is aten.mul.Tensor and static_gate(program, right) == (scores.causal, scores.window):
        _read_scores(program, left, scores, factor)  # what it multiplies by 0 is hidden already
    elif node.target in (aten.max.other, aten.maximum.default) and hides(program, right, factor):
        _read_scores(program, left, scores, factor)  # it keeps scores finite, and what it raises is hidden still
    elif node.target in WHERE and hides(program, node.args[2], factor):
        add_mask(program, scores, left)
        _read_scores(program, right, scores, factor)
    elif node.target is aten.masked_fill.Scalar and hides(program, node.args[2], factor):
        add_mask(program, scores, _negated(program, right))
        _read_scores(program, left, scores, factor)
    elif node.target in _MATMULS:
        scores.scale *= factor
        scores.q, scores.k = _unscaled(program, left, scores), _transposed(program, right, scores)
    else:
        raise NearMiss(_why_not(program, node, factor))


def _why_not(program: Program, node: fx.Node, factor: float) -> str:
    """What is wrong with an operation that scores pass through."""
    others = [other for other in node.args[1:] if isinstance(other, fx.Node)]
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and others:
        return f"its scores are scaled by {others[0].name}, which is no number"
    if node.target in WHERE or node.target is aten.masked_fill.Scalar:
        value = number_of(program, node.args[2])
        held = "what is no number" if value is None else f"{value * factor:g}"
        return f"its mask puts {held} where a key is hidden, which softmax sees unless it is {HIDDEN:g} or less"
    return f"its scores pass through {node.target}"


def _negated(program: Program, hidden: Any) -> fx.Node:
    """The mask whose negation ``hidden`` is: by a not, or by being an additive mask where it is not zero."""
    if isinstance(hidden, fx.Node) and hidden.target in (aten.bitwise_not.default, aten.logical_not.default):
        return hidden.args[0]
    source = _added(hidden)
    if source is not None:
        return source
    if isinstance(hidden, fx.Node) and hidden.meta["val"].dtype == torch.bool:
        return program.insert(hidden.next, aten.logical_not.default, hidden, like=hidden)
    raise NearMiss("its masked_fill takes a mask that is not boolean")


def _added(hidden: Any) -> fx.Node | None:
    """The additive mask of slim that was cast to what is True where it hides (MPT)."""
    while isinstance(hidden, fx.Node) and hidden.target in TRANSPARENT:
        hidden = hidden.args[0]
    if not isinstance(hidden, fx.Node) or hidden.target is not slim.visibility.default:
        return None
    return hidden if argument(hidden, "additive") is not None else None


def _peel_scores(node: Any) -> Any:
    """Scores seen through casts, copies, and reshapes that only merge or part batch and heads."""
    node = peel(node)
    while node.target is aten.reshape.default and _sizes(node)[-2:] == _sizes(node.args[0])[-2:]:
        node = peel(node.args[0])
    return node


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in shape_of(node)]


_ON_THE_WAY = frozenset(
    {
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.add.Tensor,
        aten.sub.Tensor,
        *WHERE,
        aten.masked_fill.Scalar,
        aten.max.other,
    }
)


def _leads_to_matmul(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    node = _peel_scores(node)
    if node.target in _MATMULS:
        return True
    return node.target in _ON_THE_WAY and any(_leads_to_matmul(argument) for argument in node.args)


def _unscaled(program: Program, q: Any, scores: Scores) -> Any:
    q = peel(q, COPIES | {aten.expand.default})
    if q.target in (aten.mul.Tensor, aten.mul.Scalar):
        factor = number_of(program, q.args[1])
        if factor is not None:
            scores.scale *= factor
            return _unscaled(program, q.args[0], scores)
    if q.target in (aten.div.Tensor, aten.div.Scalar):
        factor = number_of(program, q.args[1])
        if factor is not None:
            scores.scale /= factor
            return _unscaled(program, q.args[0], scores)
    return q


def _transposed(program: Program, k: Any, scores: Scores) -> fx.Node:
    """k, given k^T."""
    k = _unscaled(program, k, scores)
    rank = len(shape_of(k))
    if k.target is aten.transpose.int and sorted(d % rank for d in k.args[1:3]) == [rank - 2, rank - 1]:
        return _unscaled(program, k.args[0], scores)
    if k.target is aten.permute.default:
        order = [d % rank for d in k.args[1]]
        source = k.args[0]
        if rank == 4 and order == [0, 2, 3, 1]:  # [B, S, H, D] straight to [B, H, D, S]
            with program.graph.inserting_before(k):
                return program.insert(k, aten.transpose.int, source, 1, 2, like=k)
        if order[: rank - 2] == list(range(rank - 2)):
            return source
    raise NearMiss(f"the right side of its scores is {k.target}, not a transposed key")


_SOFTMAX = call(aten.softmax.int, aten._softmax.default, name="p")
_EXP = call(aten.exp.default, args=("scores",))
_WRITTEN_OUT = call(aten.div.Tensor, args=(_EXP, call(aten.sum.dim_IntList, args=(_EXP,))))


def _seen_through(inner: Pattern) -> Pattern:
    return Through(TRANSPARENT | {aten.reshape.default}, inner)


def _changed(inner: Pattern) -> Pattern:
    """What is done to probabilities number by number."""
    pairs = call(aten.mul.Tensor, aten.add.Tensor, args=(inner, "by"), commutes=True, name="changed")
    rest = call(aten.div.Tensor, aten.sub.Tensor, aten.masked_fill.Scalar, args=(inner,), name="changed")
    return Either((pairs, rest, call(*WHERE, args=("by", inner), name="changed")))


ATTENTION_RULES = (
    Rule(
        "attention(bias=visibility(mask)) = attention(mask, causal, window)",
        call(
            ATTENTION,
            args=("q", "k", "v", "key_mask", "bias", "sinks", "slopes"),
            layer="layer",
            scale="scale",
            causal="causal",
            window="window",
            softcap="softcap",
        ),
        _fold_visibility,
    ),
    Rule(
        "sdpa(q, k, v) = attention(q, k, v)",
        call(
            aten.scaled_dot_product_attention.default, args=("q", "k", "v", "mask", "dropout", "causal"), scale="scale"
        ),
        _from_sdpa,
    ),
    Rule(
        "softmax(q k^T) v = attention(q, k, v)",
        call(*_MATMULS, args=(_seen_through(_SOFTMAX), "v")),
        _from_softmax,
        near=(
            Near(
                call(*_MATMULS, args=(_seen_through(_changed(_seen_through(_SOFTMAX))), "v")),
                "its probabilities pass through {changed} on the way to the values",
            ),
            Near(
                call(*_MATMULS, args=(_seen_through(_WRITTEN_OUT), "v")),
                "its softmax is written out",
            ),
        ),
    ),
)


def number_layers(program: Program) -> None:
    """Attention nodes are layers 0, 1, 2... in the order of execution."""
    for layer, node in enumerate(program.attention_nodes()):
        node.update_kwarg("layer", layer)
