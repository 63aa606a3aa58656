"""Operations that compute nothing: copies, casts to the type a value has, whole slices, ones and zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.rules import Literal, Match, Rule, Var, argument, call

aten = torch.ops.aten

COPIES = frozenset(
    {
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
        aten.lift_fresh_copy.default,
    }
)
CASTS = frozenset({aten._to_copy.default, aten.to.dtype})
RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})


def _same_shape(a: Any, b: Any) -> bool:
    return len(a.shape) == len(b.shape) and all(_same_size(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def _same_size(a: Any, b: Any) -> bool:
    """Equal as expressions: asks nothing of the hints, so adds no guard."""
    return _expression(a) == _expression(b)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _if_same_type(m: Match) -> fx.Node | None:
    x, old = m["x"], m.node.meta["val"]
    if not isinstance(x, fx.Node) or not isinstance(x.meta["val"], Tensor):
        return None
    new = x.meta["val"]
    same = new.dtype == old.dtype and new.device == old.device and _same_shape(new, old)
    return x if same else None


def _drop(name: str, *targets: Any, **keywords: Any) -> Rule:
    return Rule(name, call(*targets, args=("x",), **keywords), _if_same_type)


def _whole_slice(m: Match) -> fx.Node | None:
    return m["x"] if argument(m.node, "step") == 1 and _if_same_type(m) is not None else None


def _as_reshape(m: Match) -> fx.Node:
    return m.new(aten.reshape.default, m["x"], m["shape"])


def _merged_reshape(m: Match) -> fx.Node:
    return m.new(aten.reshape.default, m["x"], m["shape"])


def _static_shape(m: Match) -> fx.Node | None:
    """[B, S, 4, 16] and [B, S, -1, 16] become one: sizes of inputs, then -1 for the first width, then numbers.

    With -1 a pass that changes a width changes only weights.
    """
    sizes = list(m.node.meta["val"].shape)
    widths = next((i for i, size in enumerate(sizes) if not isinstance(size, torch.SymInt)), len(sizes))
    if any(isinstance(size, torch.SymInt) for size in sizes[widths:]) or widths == len(sizes):
        return None
    lead = m["shape"][:widths]
    if not all(isinstance(size, fx.Node) for size in lead):
        return None
    shape = [*lead, -1, *(int(size) for size in sizes[widths + 1 :])]
    return None if shape == list(m["shape"]) else m.new(aten.reshape.default, m["x"], shape)


def _selected_one(m: Match) -> fx.Node | None:
    """reshape(x, [..., 1, ...])[..., 0, ...] = reshape(x, [...])"""
    dim, shape = m["dim"], list(m["shape"])
    dim = dim % len(shape)
    if shape[dim] != 1 or m["index"] not in (0, -1):
        return None
    return m.new(aten.reshape.default, m["x"], [*shape[:dim], *shape[dim + 1 :]])


def _without_empty(m: Match) -> fx.Node | None:
    """cat(x, nothing) = x"""
    parts = m["parts"]
    rank = len(m.node.meta["val"].shape)
    dim = argument(m.node, "dim") % rank
    # torch.cat takes an empty [0] beside tensors of any rank, as caches are that hold nothing yet
    kept = [p for p in parts if len(p.meta["val"].shape) == rank and _expression(p.meta["val"].shape[dim]) != 0]
    if len(kept) == len(parts) or not kept:
        return None
    return kept[0] if len(kept) == 1 else m.new(aten.cat.default, kept, dim)


def _cast_like(m: Match) -> fx.Node:
    return m.new(aten._to_copy.default, m["x"], dtype=m.node.meta["val"].dtype)


CLEANUP = (
    Rule("cat(x, nothing) = x", call(aten.cat.default, args=("parts",)), _without_empty),
    Rule("type_as(x, y) = cast(x)", call(aten.type_as.default, args=("x",)), _cast_like),
    Rule(
        "reshape(x, 1)[0] = reshape(x)",
        call(aten.select.int, args=(call(aten.reshape.default, args=("x", "shape")), "dim", "index")),
        _selected_one,
    ),
    _drop("copy(x) = x", *COPIES),
    _drop("cast(x, type of x) = x", *CASTS),
    _drop("expand(x, shape of x) = x", aten.expand.default),
    _drop("dropout(x, eval) = x", aten.dropout.default, aten.native_dropout.default, train=False),
    _drop("reshape(x, shape of x) = x", *RESHAPES),
    Rule("x * 1 = x", call(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, args=("x", Literal(1))), _if_same_type),
    Rule("x + 0 = x", call(aten.add.Tensor, aten.sub.Tensor, args=("x", Literal(0))), _if_same_type),
    Rule("x[:] = x", call(aten.slice.Tensor, args=("x",)), _whole_slice),
    Rule("view(x) = reshape(x)", call(*(RESHAPES - {aten.reshape.default}), args=("x", "shape")), _as_reshape),
    Rule(
        "reshape(reshape(x)) = reshape(x)",
        call(aten.reshape.default, args=(call(aten.reshape.default, args=("x",)), "shape")),
        _merged_reshape,
    ),
    Rule("reshape(x, sizes) = reshape(x, -1)", call(aten.reshape.default, args=("x", Var("shape"))), _static_shape),
)
