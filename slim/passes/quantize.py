"""Quantises the weights of linears."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, fx

from slim import errors
from slim.compiler.blocks import row_blocks
from slim.compiler.options import literal
from slim.compiler.passes_base import FLOAT_WEIGHTS, Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report, Skip
from slim.compiler.uses import ATTENTION, EXPERTS, LINEAR, Role, reached, uses, weight_nodes

aten, slim = torch.ops.aten, torch.ops.slim

_MATRIX = frozenset({Role.LINEAR, Role.EXPERTS})
_MIXES = frozenset({LINEAR, EXPERTS, *ATTENTION})
_LATER = "{value} comes with a later version of slim"


@dataclass(frozen=True)
class Quantize(Pass):
    """Holds the weights of linears as int8, one scale an output channel, rounded to nearest.

    A weight W [m, n] becomes ``q`` int8 [m, n] under W's name and ``scale`` float32 [m] under ``<name>_scale``, with
    ``s = max|w| / 127`` a row and ``q = round(w / s)``; what read W reads ``slim.dequantize(q, scale)`` in W's own
    type. Weights of experts [E, m, n] have scales [E, m]. No calibration is needed; weights on disk are read,
    quantised and dropped one at a time.

    Args:
        weights: the number format; int8 today.
        activations, group_size, method: come with later versions; None, or "rtn" for the method.
        embeddings: quantise embedding tables too, one scale a token.
        head: quantise the head of a language model. A head tied to the embedding takes the embedding with it.
        exclude: patterns of weight names to leave alone (``"*.down_proj.weight"``); each must match one.

    Routers stay as they are: they hold few numbers, and a rounding there chooses another expert.
    Source: round to nearest is the baseline of Dettmers et al., LLM.int8(), 2022.
    """

    weights: Literal["int8", "int4", "int3", "nf4", "fp8"] = "int8"
    activations: Literal["int8"] | None = None
    group_size: int | None = None
    method: Literal["rtn", "gptq", "awq", "hqq"] | None = None
    embeddings: bool = False
    head: bool = True
    exclude: tuple[str, ...] = ()

    requires = frozenset({FLOAT_WEIGHTS})
    invalidates = frozenset({FLOAT_WEIGHTS})

    def check(self) -> None:
        """Refuses what this version does not have."""
        today = {"weights": "int8", "activations": None, "group_size": None}
        if self.method not in (None, "rtn"):
            today["method"] = None
        for option, value in today.items():
            if getattr(self, option) != value:
                reason = _LATER.format(value=literal(getattr(self, option)))
                raise errors.BadPassOption(pass_name=self.name, option=option, reason=reason)

    def run(self, program: Program, ctx: Context) -> Report:
        """Changes weights, and puts one ``slim.dequantize`` behind each of them."""
        report = Report()
        chosen = list(self._choose(program, report))
        for node in ctx.track("quantising", chosen):
            quantize_weight(program, node)
            report.matched.append(str(node.target))
        return report

    def _choose(self, program: Program, report: Report) -> Iterator[fx.Node]:
        """The weights to quantise; the others go into the report with the reason."""
        excluded = self._excluded(program)
        heads = _heads(program)
        if not self.head and not heads:
            report.notes.append("head=False has nothing to leave out: this model has no language model head")
        for node in _matrices(program):
            name = str(node.target)
            reason = excluded.get(name) or self._refused(node, node in heads)
            if reason:
                report.skipped.append(Skip(name, reason))
                continue
            if self._is_shared(node) and not self.embeddings:
                report.notes.append(
                    f"{name} is embedding and head at once, so the embedding is quantised with the head"
                )
            yield node

    def _refused(self, node: fx.Node, is_head: bool) -> str | None:
        """Why the weight of ``node`` is left alone; None where it is not."""
        found = uses(node)
        others = [use.node.target for use in found if use.role is Role.OTHER]
        if others:
            return f"it is read by {others[0]}, which is no linear"
        if is_head and not self.head:
            if self.embeddings and self._is_shared(node):
                raise errors.ContradictoryOptions(
                    a="embeddings=True", b="head=False", reason=f"{node.target} is embedding and head at once"
                )
            return "it is the head (head=False)"
        if all(use.role is Role.TABLE for use in found) and not self.embeddings:
            return "it is an embedding (embeddings=False)"
        if any(_routes(use.node) for use in found if use.role is Role.LINEAR):
            return "it routes tokens to experts"
        return None

    @staticmethod
    def _is_shared(node: fx.Node) -> bool:
        roles = {use.role for use in uses(node)}
        return Role.TABLE in roles and bool(roles & _MATRIX)

    def _excluded(self, program: Program) -> dict[str, str]:
        """Weight -> which pattern excludes it; a tied weight goes by all its names."""
        canonical = {name: name for name in program.weights} | program.facts.tied
        found: dict[str, str] = {}
        for pattern in self.exclude:
            names = [name for name in canonical if fnmatchcase(name, pattern)]
            if not names:
                reason = f"{literal(pattern)} matches no weight"
                raise errors.BadPassOption(pass_name=self.name, option="exclude", reason=reason)
            found |= {canonical[name]: f"it is excluded by {literal(pattern)}" for name in names}
        return found


# -- choosing ----------------------------------------------------------------------------------------------------------


def _matrices(program: Program) -> Iterator[fx.Node]:
    """The weight nodes that hold floating-point matrices, or stacks of them."""
    for node in weight_nodes(program):
        value = node.meta["val"]
        if value.dtype.is_floating_point and value.dim() >= 2 and value.numel() > 0:
            yield node


def _heads(program: Program) -> set[fx.Node]:
    """Weights of the linears of a language model whose results are seen by its output alone."""
    if program.facts.kind != "causal_lm":
        return set()
    last = [node for node in program.nodes(LINEAR) if not any(n.target in _MIXES for n in reached(node, _MIXES))]
    return {node.args[1] for node in last if isinstance(node.args[1], fx.Node)}


def _routes(linear: fx.Node) -> bool:
    """Whether the result picks experts: it reaches a top-k before any other matrix."""
    return any(node.target is aten.topk.default for node in reached(linear, _MIXES))


# -- quantising --------------------------------------------------------------------------------------------------------


def quantize_weight(program: Program, node: fx.Node) -> fx.Node:
    """Puts the weight that ``node`` reads into int8, and the dequantised value before its first reader.

    Returns:
        The ``slim.dequantize`` node that all readers now read.
    """
    name = str(node.target)
    dtype = program.weights.dtype(name)
    readers = list(node.users)
    program.weights[name], program.weights[f"{name}_scale"] = round_to_nearest(program.weights[name])
    node.meta["val"] = program.typer.value(node, program.weights)
    first = min(readers)  # fx orders nodes by their place in the graph
    scale = program.weight_node(f"{name}_scale")
    axis = program.weights.shape(f"{name}_scale")
    restored = program.insert(first, slim.dequantize.default, node, scale, like=first, axis=len(axis) - 1, dtype=dtype)
    for reader in readers:
        reader.replace_input_with(node, restored)
    return restored


def round_to_nearest(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 of weight's shape, float32 scale of its shape without the last dimension): ``w ~ q * s``.

    Symmetric: s = max|w| / 127 over the last dimension, q in [-127, 127], |w - q s| <= s / 2. A row of zeros keeps
    the smallest normal number as its scale, so that nothing divides by zero.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    q = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=weight.device)
    for block in row_blocks(rows.shape):
        wide = rows[block].to(torch.float32, copy=True)
        largest = torch.maximum(wide.amax(-1), -wide.amin(-1))  # four times as fast as aminmax
        scale[block] = (largest / 127).clamp_min_(torch.finfo(torch.float32).tiny)
        q[block] = wide.div_(scale[block, None]).round_().clamp_(-127, 127)  # slim.quantize, in place
    return q.view(weight.shape), scale.view(weight.shape[:-1])
