"""What a Program says of its quantised weights: number format, granularity, and how their inputs are rounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.program import Program, where
from slim.compiler.uses import DEQUANTIZE, UNPACKS, Role, stored_in, uses

QUANTIZE = torch.ops.slim.quantize.default
_TOKEN_SCALE = torch.ops.slim.token_scale.default
_TOKEN = "a step a token"  # where else a weight's name is
_FORMATS = {op: name for name, op in UNPACKS.items()}


class Unsuitable(Exception):
    """What of a weight, or of its inputs, is not as it is asked for; the text completes "the weight ..."."""


@dataclass(frozen=True)
class Scheme:
    """How a linear is quantised.

    Attributes:
        numbers: "int8", "int4", "int3", "nf4" or "fp8".
        group: numbers of a row that share a scale; None where that is the row.
        symmetric: whether there are no zero points.
        inputs: None, "token" (one step a token, found as it runs) or "tensor" (one step, calibrated).
    """

    numbers: str
    group: int | None = None
    symmetric: bool = True
    inputs: str | None = None


@dataclass(frozen=True)
class Quantised:
    """One quantised weight of a Program.

    Attributes:
        name: of the weight; its numbers [m, n] are kept under it, packed as ``scheme`` says.
        restoring: the ``slim.dequantize`` that gives its value.
        scale: the name of its scales, [m] or [m, n / group].
        zero: the node that gives its zero points as int8, of the shape of ``scale``; None where there are none.
        input_scale: the name of the step of its inputs, where it is calibrated.
    """

    name: str
    restoring: fx.Node
    scheme: Scheme
    scale: str
    zero: fx.Node | None
    input_scale: str | None


def quantised_weights(program: Program) -> Iterator[fx.Node]:
    """The ``slim.dequantize`` of every quantised weight."""
    return (node for node in program.nodes(DEQUANTIZE) if stored_in(node.args[0]))


def weight_name(restoring: fx.Node) -> str:
    """The weight that a ``slim.dequantize`` restores."""
    return str(stored_in(restoring.args[0])[0].target)


def describe(program: Program, restoring: fx.Node) -> Quantised:
    """What ``restoring``, the ``slim.dequantize`` of a weight, says.

    Raises:
        Unsuitable: where it is not a matrix of a linear or a table, or its readers do not round their inputs alike.
    """
    stored, scale, zero = (*restoring.args, None)[:3]
    assert isinstance(stored, fx.Node)
    if len(restoring.meta["val"].shape) != 2:
        raise Unsuitable(f"is a stack of matrices {list(restoring.meta['val'].shape)}, as experts are")
    if not isinstance(scale, fx.Node) or scale.op != "get_attr" or len(scale.meta["val"].shape) not in (1, 2):
        raise Unsuitable("has no scales of its own, by row or by group")
    roundings = {_rounding(use.node) for use in _readers(restoring) if use.role is Role.LINEAR}
    if len(roundings) > 1:
        raise Unsuitable("has readers that round their inputs unlike each other")
    inputs = roundings.pop() if roundings else None
    scheme = Scheme(
        _numbers(stored),
        restoring.kwargs.get("group_size"),  # type: ignore[arg-type]
        zero is None,
        {None: None, _TOKEN: "token"}.get(inputs, "tensor"),
    )
    assert zero is None or isinstance(zero, fx.Node)
    return Quantised(
        weight_name(restoring),
        restoring,
        scheme,
        str(scale.target),
        zero,
        inputs if scheme.inputs == "tensor" else None,
    )


def _readers(restoring: fx.Node) -> list[Any]:
    found = uses(restoring)
    for use in found:
        if use.role not in (Role.LINEAR, Role.TABLE):
            raise Unsuitable(f"is read by {where(use.node)}, which is no linear")
    return found


def _numbers(stored: fx.Node) -> str:
    if stored.op == "call_function":
        return _FORMATS[stored.target]  # type: ignore[index]
    return "fp8" if stored.meta["val"].dtype == torch.float8_e4m3fn else "int8"


def _rounding(linear: fx.Node) -> str | None:
    """How the rows that enter a linear are rounded: None, ``_TOKEN``, or the name of the step for all of them."""
    rounded = linear.args[0]
    if not isinstance(rounded, fx.Node) or not is_rounded(rounded):
        return None
    step = rounded.args[1]
    assert isinstance(step, fx.Node)
    if step.target is _TOKEN_SCALE:
        return _TOKEN
    if step.op == "get_attr" and len(step.meta["val"].shape) == 0 and len(rounded.args) == 2:
        return str(step.target)
    raise Unsuitable(f"has its inputs rounded by {where(rounded)} neither by token nor by one step for all")


def is_rounded(node: fx.Node) -> bool:
    """Whether a node is a ``slim.dequantize`` of what a ``slim.quantize`` rounded."""
    return node.target is DEQUANTIZE and isinstance(node.args[0], fx.Node) and node.args[0].target is QUANTIZE


def restored(program: Program, value: fx.Node) -> Tensor:
    """The numbers that a weight, or what restores one, stands for."""
    if value.op == "get_attr":
        return program.weights[str(value.target)]
    args, kwargs = fx.map_arg((value.args, value.kwargs), lambda node: restored(program, node))
    return value.target(*args, **kwargs)  # type: ignore[operator]
