"""The scores of an attention as they are read: what scales, hides and biases them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import fx

from slim.compiler.program import Program
from slim.compiler.raising.alibi import alibi_slopes
from slim.compiler.raising.cleanup import CASTS, COPIES
from slim.compiler.raising.masks import HIDDEN, key_mask, static_mask
from slim.compiler.rules import Match, NearMiss, argument

aten, slim = torch.ops.aten, torch.ops.slim

TRANSPARENT = CASTS | COPIES | {aten.expand.default, aten.nan_to_num.default}
WHERE = frozenset({aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf})


def shape_of(node: fx.Node) -> list[Any]:
    return list(node.meta["val"].shape)


def peel(node: Any, targets: frozenset[Any] = TRANSPARENT) -> Any:
    while isinstance(node, fx.Node) and node.target in targets:
        node = node.args[0]
    return node


@dataclass
class Scores:
    """What is known of the scores of an attention, read from the softmax down to q k^T."""

    q: fx.Node | None = None
    k: fx.Node | None = None
    scale: float = 1.0
    softcap: float | None = None
    causal: bool = False
    window: int | None = None
    key_mask: fx.Node | None = None
    slopes: fx.Node | None = None
    biases: list[fx.Node] = field(default_factory=list)


def add_mask(program: Program, scores: Scores, mask: fx.Node, factor: float = 1.0) -> None:
    """Folds ``factor`` times one additive mask, or a boolean one, into ``scores``: as attributes where it is one."""
    mask = _mask_source(mask)
    low = factor if mask.meta["val"].dtype != torch.bool else 1.0
    if mask.target is aten.add.Tensor and all(isinstance(a, fx.Node) and not is_bool(a) for a in mask.args[:2]):
        for part in mask.args[:2]:
            add_mask(program, scores, part, factor)
        return
    if mask.target is aten.zeros.default:
        return
    if mask.target in WHERE and hides(program, mask.args[2], factor) and number_of(program, mask.args[1]) == 0:
        return add_mask(program, scores, mask.args[0])
    if mask.target is slim.visibility.default:
        _hide_keys(program, scores, argument(mask, "key_mask"), mask)
        scores.causal |= argument(mask, "causal")
        scores.window = _narrower(scores.window, argument(mask, "window"))
        return
    padding = key_mask(program, mask, low)
    if padding is not None:
        _hide_keys(program, scores, padding, mask)
        return
    static = static_mask(program, mask, low)
    if static is not None:
        scores.causal, scores.window = scores.causal or static[0], _narrower(scores.window, static[1])
        return
    slopes = alibi_slopes(program, mask, factor)
    if slopes is not None and scores.slopes is None:
        scores.slopes = slopes
        return
    if len(shape_of(mask)) != 4:
        raise NearMiss(f"it adds {mask.name}, which is not [batch, heads, queries, keys]")
    if low != 1.0:
        mask = program.insert(mask.next, aten.mul.Tensor, mask, low, like=mask)
    scores.biases.append(mask)


def _hide_keys(program: Program, scores: Scores, mask: fx.Node | None, at: fx.Node) -> None:
    """Adds a key mask [B, S], of any type, to the one there is."""
    if mask is None or mask is scores.key_mask:
        return
    if mask.meta["val"].dtype != torch.bool:
        mask = program.insert(at.next, aten._to_copy.default, mask, dtype=torch.bool, like=at)
    if scores.key_mask is not None:
        anchor = max(mask, scores.key_mask, at)
        mask = program.insert(anchor.next, aten.logical_and.default, scores.key_mask, mask, like=at)
    scores.key_mask = mask


def hides(program: Program, value: Any, factor: float = 1.0) -> bool:
    """Whether adding ``factor`` times ``value`` to a score takes the key out of the softmax."""
    number = number_of(program, value)
    return number is not None and number * factor <= HIDDEN


def _mask_source(mask: fx.Node) -> fx.Node:
    """The mask before it was cast, expanded, or cut to the length of the keys (which it has)."""
    while True:
        inner = mask
        while inner.target in TRANSPARENT and is_bool(inner) == is_bool(inner.args[0]):
            inner = inner.args[0]  # but a cast from numbers to truth, or back, says something else
        if inner.target is aten.slice.Tensor and shape_of(inner) == shape_of(inner.args[0]):
            inner = inner.args[0]
        if inner is mask:
            return mask
        mask = inner


def is_bool(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == torch.bool)


def _narrower(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def number_of(program: Program, value: Any) -> float | None:
    """The value of a number, or of a constant tensor with one element."""
    if isinstance(value, (int, float)):
        return float(value)
    name = program.weight_of(peel(value))
    if name is not None and program.weights.numel(name) == 1:
        return float(program.weights[name])
    if isinstance(value, fx.Node) and value.target is aten.full.default and not argument(value, "size"):
        return float(argument(value, "fill_value"))
    return None


def together(m: Match, biases: list[fx.Node]) -> fx.Node | None:
    """One bias for what is added to the scores and what says which keys are seen."""
    added = [bias for bias in biases if not is_bool(bias)]
    seen = [bias for bias in biases if is_bool(bias)]
    total = reduce(partial(m.new, aten.add.Tensor), added) if added else None
    kept = reduce(partial(m.new, aten.logical_and.default), seen) if seen else None
    if total is None or kept is None:
        return kept if total is None else total
    return m.new(aten.where.ScalarOther, kept, total, torch.finfo(total.meta["val"].dtype).min)
