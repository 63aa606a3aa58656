"""Activations written out by hand, raised to the ATen op that is one kernel; and writes into parts of a tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from slim.compiler.near import Number
from slim.compiler.rules import Either, Match, Near, Pattern, Rule, Var, call

aten = torch.ops.aten


def _times(x: Any, number: float, what: str) -> Pattern:
    """x * number, or x / (1 / number)."""
    return Either(
        (
            call(aten.mul.Tensor, args=(x, Number(number, what)), commutes=True),
            call(aten.div.Tensor, args=(x, Number(1 / number, f"1 over {what}"))),
        )
    )


def _gelu(inner: Pattern) -> Pattern:
    """0.5 x (1 + inner), multiplied in any order."""
    sum_ = call(aten.add.Tensor, args=(inner, Number(1.0, "what is added to it")), commutes=True)
    half = (0.5, "its factor")
    return Either(
        (
            call(aten.mul.Tensor, args=(_times("x", *half), sum_), commutes=True),
            call(aten.mul.Tensor, args=("x", _times(sum_, *half)), commutes=True),
            _times(call(aten.mul.Tensor, args=("x", sum_), commutes=True), *half),
        )
    )


_ROOT = (math.sqrt(2 / math.pi), "the factor in its tanh")
_CUBIC = (0.044715, "the factor of its x^3")
_CUBE = call(aten.pow.Tensor_Scalar, args=("x", Number(3.0, "the power in its tanh")))
_SUM = call(aten.add.Tensor, args=("x", _times(_CUBE, *_CUBIC)))
_SQUARED = call(aten.mul.Tensor, args=(_times("x", *_CUBIC), "x"), commutes=True)
_FACTORED = call(
    aten.mul.Tensor,
    args=(
        _times("x", *_ROOT),
        call(aten.add.Tensor, args=(_SQUARED, Number(1.0, "what is added to its square")), commutes=True),
    ),
    commutes=True,
)
_TANH = call(aten.tanh.default, args=(Either((_times(_SUM, *_ROOT), _FACTORED)),))
_SCALED = call(aten.mul.Tensor, args=("x", Var("factor", lambda v: isinstance(v, float))), commutes=True)
_ERF = call(aten.erf.default, args=(_times("x", math.sqrt(0.5), "the factor in its erf"),))


def _scattered(m: Match) -> fx.Node | None:
    """Two writes that fill a new tensor along one dimension are a concatenation."""
    size = m["empty"].meta["val"].shape[m["dim"]]
    if isinstance(size, torch.SymInt) or m["a"] not in (0, None) or m["b"] != m["c"] or m["d"] < size:
        return None
    return m.new(aten.cat.default, [m["x"], m["y"]], m["dim"])


def _written(value: str) -> Any:
    return call(aten.copy.default, args=(Var(f"{value} over"), value))


ACTIVATIONS = (
    Rule(
        "0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = gelu(x, tanh)",
        _gelu(_TANH),
        lambda m: m.new(aten.gelu.default, m["x"], approximate="tanh"),
    ),
    Rule(
        "0.5 x (1 + erf(x / sqrt(2))) = gelu(x)",
        _gelu(_ERF),
        lambda m: m.new(aten.gelu.default, m["x"]),
    ),
    Rule(
        "x sigmoid(x) = silu(x)",
        call(aten.mul.Tensor, args=("x", call(aten.sigmoid.default, args=("x",))), commutes=True),
        lambda m: m.new(aten.silu.default, m["x"]),
        near=(
            Near(
                call(aten.mul.Tensor, args=("x", call(aten.sigmoid.default, args=(_SCALED,))), commutes=True),
                "its sigmoid is of {factor:g} x",
            ),
        ),
    ),
    Rule(
        "empty[:n] = x, empty[n:] = y is cat(x, y)",
        call(
            aten.slice_scatter.default,
            args=(
                call(
                    aten.slice_scatter.default,
                    args=(
                        call(aten.new_empty.default, aten.empty.memory_format, name="empty"),
                        _written("x"),
                        "dim",
                        "a",
                        "b",
                    ),
                ),
                _written("y"),
                "dim",
                "c",
                "d",
            ),
        ),
        _scattered,
    ),
)
