"""Rotary embedding written with complex numbers: a pair of channels times exp(i angle) is a rotation of the pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from slim.compiler.raising.cleanup import CASTS
from slim.compiler.rules import Either, Match, NearMiss, Rule, Through, Var, call

aten, slim = torch.ops.aten, torch.ops.slim

_TURN = call(aten.polar.default, args=("radius", "angle"))
_SCALED = Either((_TURN, call(aten.mul.Tensor, args=(_TURN, Var("scale", lambda v: isinstance(v, (int, float)))))))
_ON_HEADS = call(aten.unsqueeze.default, args=(Through(CASTS, _SCALED), "axis"))
_TURNED = call(
    aten.mul.Tensor,
    args=(call(aten.view_as_complex.default, args=("pairs",)), Through(CASTS, _ON_HEADS)),
    commutes=True,
)


def _complex_rope(m: Match) -> fx.Node:
    """x is [batch, heads, length, width] for a table widened at axis 1, [batch, length, heads, width] at axis 2."""
    if not _is_ones(m.program, m["radius"]):
        raise NearMiss("it turns by numbers whose length may not be 1")
    if len(m.node.meta["val"].shape) != 4 or m["axis"] not in (1, 2):
        raise NearMiss("it does not turn heads of four dimensions")
    cos, sin = (m.new(op, m["angle"]) for op in (aten.cos.default, aten.sin.default))
    if m.get("scale") is not None:
        cos, sin = (m.new(aten.mul.Tensor, table, m["scale"]) for table in (cos, sin))
    x = m.new(aten.reshape.default, m["pairs"], m["shape"])
    if m["axis"] == 1:
        return m.new(slim.rope.default, x, cos, sin, interleaved=True)
    turned = m.new(slim.rope.default, m.new(aten.transpose.int, x, 1, 2), cos, sin, interleaved=True)
    return m.new(aten.transpose.int, turned, 1, 2)


def _is_ones(program: Any, node: Any) -> bool:
    if node.target in (aten.ones_like.default, aten.ones.default):
        return True
    name = program.weight_of(node)
    return name in program.facts.constants and bool((program.weights[name] == 1).all())


COMPLEX_ROPE = (
    Rule(
        "real(complex(x) * exp(i angle)) = rope(x, interleaved)",
        call(aten.reshape.default, args=(call(aten.view_as_real.default, args=(_TURNED,)), "shape")),
        _complex_rope,
    ),
)
