"""Activations written out by hand, raised to the ATen op that is one kernel; and writes into parts of a tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from slim.compiler.rules import Either, Match, Rule, Var, call

aten = torch.ops.aten


def _about(value: float) -> Var:
    """A number within rounding of ``value``; each gets a name of its own."""
    return Var(f"about {value}", lambda v: isinstance(v, (int, float)) and math.isclose(v, value, rel_tol=1e-6))


_CUBE = call(aten.pow.Tensor_Scalar, args=("x", _about(3.0)))
_CUBIC = call(aten.add.Tensor, args=("x", call(aten.mul.Tensor, args=(_CUBE, _about(0.044715)), commutes=True)))
_TANH = call(
    aten.tanh.default, args=(call(aten.mul.Tensor, args=(_CUBIC, _about(math.sqrt(2 / math.pi))), commutes=True),)
)


_ROOT = _about(math.sqrt(2 / math.pi))
_SQUARED = call(
    aten.mul.Tensor, args=(call(aten.mul.Tensor, args=("x", _about(0.044715)), commutes=True), "x"), commutes=True
)
_FACTORED = call(
    aten.tanh.default,
    args=(
        call(
            aten.mul.Tensor,
            args=(
                call(aten.mul.Tensor, args=("x", _ROOT), commutes=True),
                call(aten.add.Tensor, args=(_SQUARED, _about(1.0)), commutes=True),
            ),
            commutes=True,
        ),
    ),
)


def _gelu(m: Match) -> fx.Node:
    return m.new(aten.gelu.default, m["x"], approximate="tanh")


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
        call(
            aten.mul.Tensor,
            args=(
                call(aten.mul.Tensor, args=("x", _about(0.5)), commutes=True),
                call(aten.add.Tensor, args=(Either((_TANH, _FACTORED)), _about(1.0)), commutes=True),
            ),
            commutes=True,
        ),
        _gelu,
    ),
    Rule(
        "x sigmoid(x) = silu(x)",
        call(aten.mul.Tensor, args=("x", call(aten.sigmoid.default, args=("x",))), commutes=True),
        lambda m: m.new(aten.silu.default, m["x"]),
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
