"""Activations that the Program rounds to int8: how they are read from the graph, and what only linears see of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from slim.codegen.regions.wants import Wants
from slim.compiler.program import Program
from slim.compiler.rules import argument
from slim.compiler.uses import DEQUANTIZE, EXPERTS, LINEAR

QUANTIZE = torch.ops.slim.quantize.default
TOKEN_SCALE = torch.ops.slim.token_scale.default


class Rounding(NamedTuple):
    """dequantize(quantize(x, step), step), to -128..127.

    Attributes:
        by_row: whether there is a step for each row of x; else it is one for all.
    """

    x: fx.Node
    step: fx.Node
    by_row: bool

    @property
    def is_own(self) -> bool:
        """Whether the step of a row is what ``slim.token_scale`` says of that row."""
        return self.step.target is TOKEN_SCALE and self.step.args[0] is self.x


def rounding(node: fx.Node) -> Rounding | None:
    """What ``node`` rounds, if it is x rounded to int8 and back, with one step a row or one for all."""
    if node.target is not DEQUANTIZE:
        return None
    q, step = node.args[:2]
    if not isinstance(q, fx.Node) or q.target is not QUANTIZE or q.args[1] is not step:
        return None
    assert isinstance(step, fx.Node)
    plain = all(argument(each, name) is None for each in (q, node) for name in ("zero_point", "group_size"))
    if not plain or (argument(q, "low"), argument(q, "high")) != (-128, 127):
        return None
    x, axis = q.args[0], argument(node, "axis")
    assert isinstance(x, fx.Node)
    shape, steps = x.meta["val"].shape, step.meta["val"].shape
    if axis != argument(q, "axis") or len(shape) < 2:
        return None
    if axis is None:
        return Rounding(x, step, by_row=False) if len(steps) == 0 else None
    by_row = axis == len(shape) - 2 and len(steps) == len(shape) - 1
    return Rounding(x, step, by_row=True) if by_row else None


def absorbed(program: Program, wants: Wants) -> frozenset[fx.Node]:
    """The nodes that nothing but linears sees, which round their rows as they load them: no region computes them."""
    if not wants.int8_rows:
        return frozenset()
    found: set[fx.Node] = set()
    roundings = {node: of for node in program.nodes(DEQUANTIZE) if (of := rounding(node)) is not None}
    found |= {node for node in roundings if all(_multiplies(user, node) for user in readers(node))}
    found |= {q for node in roundings if isinstance(q := node.args[0], fx.Node) and found.issuperset(readers(q))}
    if wants.own_steps:
        found |= {of.step for of in roundings.values() if of.is_own and found.issuperset(readers(of.step))}
    return frozenset(found)


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read numbers of ``node``, not just its size."""
    return [user for user in node.users if isinstance(user.meta.get("val"), (torch.Tensor, tuple, list))]


def _multiplies(user: fx.Node, rows: fx.Node) -> bool:
    """Whether ``user`` is a linear that reads ``rows`` as its rows alone."""
    others = [argument for argument in user.args[1:] if argument is rows]
    return user.target in (LINEAR, EXPERTS) and user.args[0] is rows and not others


__all__ = ["Rounding", "absorbed", "readers", "rounding"]
