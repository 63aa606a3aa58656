"""Quantises the weights of linears."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, fx

from slim import errors
from slim.compiler.blocks import row_blocks
from slim.compiler.dialect.quant import pack_int4
from slim.compiler.options import literal
from slim.compiler.passes_base import FLOAT_WEIGHTS, Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report, Skip
from slim.compiler.uses import ATTENTION, DEQUANTIZE, EXPERTS, LINEAR, UNPACKS, Role, reached, uses, weight_nodes

aten = torch.ops.aten

_MATRIX = frozenset({Role.LINEAR, Role.EXPERTS})
_MIXES = frozenset({LINEAR, EXPERTS, *ATTENTION})
_LIMITS = {"int8": 127, "int4": 7}  # the largest number of each format
_INT4_GROUP = 32
_SMALLEST = 2.0**-24  # of float16
_LATER = "{value} comes with a later version of slim"


@dataclass(frozen=True)
class Quantize(Pass):
    """Holds the weights of linears as int8 or int4, rounded to nearest.

    A weight W [m, n] becomes ``q`` under W's name and ``scale`` under ``<name>_scale``; what read W reads
    ``slim.dequantize(q, scale)`` in W's own type. int8: q [m, n] and one float32 scale an output channel, [m], with
    ``s = max|w| / 127`` and ``q = round(w / s)``. int4: two numbers a byte, uint8 [m, n / 2] (``slim.unpack_int4``
    says how), and one float16 scale for every ``group_size`` numbers of a row, [m, n / group_size]: 4.5 bits a weight
    with groups of 32. Weights of experts [E, m, n] have scales [E, m] or [E, m, n / group_size]. No calibration is
    needed; weights on disk are read, quantised and dropped one at a time.

    Args:
        weights: the number format; "int8" or "int4" today.
        group_size: numbers of a row that share a scale. None is one scale a row for int8, and 32 for int4, which
            needs groups. A weight whose rows it does not divide is left alone, and the report says so.
        activations, method: come with later versions; None, or "rtn" for the method.
        embeddings: quantise embedding tables too, one scale a token.
        head: quantise the head of a language model. A head tied to the embedding takes the embedding with it.
        exclude: patterns of weight names to leave alone (``"*.down_proj.weight"``); each must match one.

    Routers stay as they are: they hold few numbers, and a rounding there chooses another expert.
    Source: round to nearest is the baseline of Dettmers et al., LLM.int8(), 2022; the scale of int4 that sends the
    largest weight to -8 is that of llama.cpp's Q4_0, used in the groups where it beats ``max|w| / 7``.

    Example:
        >>> slim.compile(model, passes=[Quantize("int4", group_size=32)])
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
        if self.weights not in _LIMITS:
            self._refuse("weights", _LATER.format(value=literal(self.weights)))
        if self.activations is not None:
            self._refuse("activations", _LATER.format(value=literal(self.activations)))
        if self.method not in (None, "rtn"):
            self._refuse("method", _LATER.format(value=literal(self.method)))
        if self.group_size is not None and self.group_size < 1:
            self._refuse("group_size", f"a group of {self.group_size} holds no number")
        if self._packs and self._group % 2:
            self._refuse("group_size", f"{self.weights} keeps two numbers in a byte, and {self.group_size} is odd")

    def _refuse(self, option: str, reason: str) -> NoReturn:
        raise errors.BadPassOption(pass_name=self.name, option=option, reason=reason)

    @property
    def _packs(self) -> bool:
        return self.weights == "int4"

    @property
    def _group(self) -> int:
        """Numbers that share a scale; 0 where that is a row."""
        return self.group_size or (_INT4_GROUP if self._packs else 0)

    def run(self, program: Program, ctx: Context) -> Report:
        """Changes weights, and puts one ``slim.dequantize`` behind each of them."""
        report = Report()
        chosen = list(self._choose(program, report))
        for node in ctx.track("quantising", chosen):
            quantize_weight(program, node, self.weights, self._group)
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
        width = node.meta["val"].shape[-1]
        if self._group and width % self._group:
            return f"its rows of {width} do not divide into groups of {self._group}"
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


def quantize_weight(program: Program, node: fx.Node, weights: str = "int8", group: int = 0) -> fx.Node:
    """Quantises the weight that ``node`` reads, and puts the value it stands for before its first reader.

    Args:
        weights: "int8", or "int4", which is packed. group: numbers of a row that share a scale; 0 for all of them.

    Returns:
        The ``slim.dequantize`` node that all readers now read.
    """
    name = str(node.target)
    dtype = program.weights.dtype(name)
    readers = list(node.users)
    first = min(readers)  # fx orders nodes by their place in the graph
    q, program.weights[f"{name}_scale"] = round_to_nearest(program.weights[name], weights, group)
    program.weights[name] = pack_int4(q) if weights == "int4" else q
    node.meta["val"] = program.typer.value(node, program.weights)
    numbers = program.insert(first, UNPACKS["int4"], node, like=first) if weights == "int4" else node
    scale = program.weight_node(f"{name}_scale")
    grain: dict[str, Any] = dict(axis=len(scale.meta["val"].shape) - 1, group_size=group or None)
    restored = program.insert(first, DEQUANTIZE, numbers, scale, like=first, **grain, dtype=dtype)
    for reader in readers:
        reader.replace_input_with(node, restored)
    return restored


def round_to_nearest(weight: Tensor, weights: str = "int8", group: int = 0) -> tuple[Tensor, Tensor]:
    """(q, int8 of weight's shape; scale): ``w ~ q * s``, with q from -127 to 127 ("int8") or -8 to 7 ("int4").

    Without ``group``, scales are float32, of the weight's shape without its last dimension. With it there is one for
    every ``group`` numbers of the last dimension, in float16 unless the weight is too large or too small for that
    (then float32); numbers are rounded by the scale as it is stored. Zeros get a scale that is not zero, so that
    nothing divides by it.
    """
    rows = weight.reshape(-1, group or weight.shape[-1])
    kept = _scale_type(weight, weights) if group else torch.float32
    q = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows.shape[0], dtype=kept, device=weight.device)
    for block in row_blocks(rows.shape):
        wide = rows[block].to(torch.float32, copy=True)
        q[block], scale[block] = _round_int4(wide, kept) if weights == "int4" else _round_int8(wide, kept)
    shape = (*weight.shape[:-1], weight.shape[-1] // group) if group else weight.shape[:-1]
    return q.view(weight.shape), scale.view(shape)


def _scale_type(weight: Tensor, weights: str) -> torch.dtype:
    """float16 where the largest scale is a normal number of it: then all are off by 2^-11 of that at most."""
    largest = float(max(-weight.min(), weight.max())) / _LIMITS[weights]
    limits = torch.finfo(torch.float16)
    return torch.float16 if limits.tiny <= largest <= limits.max or largest == 0 else torch.float32


def _round_int8(wide: Tensor, kept: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row by the scale that sends its largest magnitude to 127; overwrites ``wide``."""
    largest = torch.maximum(wide.amax(-1), -wide.amin(-1))  # four times as fast as aminmax
    scale = _stored_scale(largest / _LIMITS["int8"], kept)
    return wide.div_(scale.float()[:, None]).round_().clamp_(-127, 127), scale  # slim.quantize, in place


def _round_int4(wide: Tensor, kept: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row by the better of two scales: the largest magnitude at 7 or -7, or, whatever its sign, at -8."""
    low, high = wide.amin(-1), wide.amax(-1)
    extreme = torch.where(high > -low, high, low)
    symmetric = _stored_scale(extreme.abs() / 7, kept)
    full = _stored_scale(extreme / -8, kept)
    options = [(_steps(wide, scale), scale) for scale in (symmetric, full)]
    (first, second) = [(wide - steps * scale.float()[:, None]).square_().sum(-1) for steps, scale in options]
    better = second < first
    return torch.where(better[:, None], options[1][0], options[0][0]), torch.where(better, full, symmetric)


def _steps(wide: Tensor, scale: Tensor) -> Tensor:
    return (wide / scale.float()[:, None]).round_().clamp_(-8, 7)


def _stored_scale(scale: Tensor, kept: torch.dtype) -> Tensor:
    """``scale`` as it is stored, and never zero."""
    smallest = _SMALLEST if kept == torch.float16 else torch.finfo(kept).tiny
    return torch.where(scale.abs() < smallest, smallest, scale).to(kept)
