"""Folds what a norm scales and shifts into the linears that read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from slim.compiler.biases import new_bias
from slim.compiler.passes_base import FLOAT_WEIGHTS, UNSMOOTHED, Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report, Skip
from slim.compiler.rows import leaves_rows_whole
from slim.compiler.rules import argument
from slim.compiler.scaling import by_rows, scale_weight, settle
from slim.compiler.uses import EXPERTS, LINEAR

aten, slim = torch.ops.aten, torch.ops.slim

_NORMS = (slim.rms_norm.default, slim.layer_norm.default)


@dataclass(frozen=True)
class FoldNorms(Pass):
    """Moves gains (and LayerNorm's shift) out of norms, into the linears behind them; the function stays the same.

    For ``norm(x) = n(x) * g + b`` and a reader ``W norm(x) + c``: W becomes ``W diag(g)`` and c becomes ``c + W b``,
    computed in float32 and rounded once. The norm keeps no weights, which is what rotations and scale moves start
    from. RMSNorm with gain ``w`` or ``1 + w``, LayerNorm; linears, expert linears and routers. Weights that still lie
    on disk are scaled as they are read.

    A norm is left alone when anything but linears reads it (post-norms, norms of queries and keys), or when one of
    their weights has another reader (a tied head).

    Shapes are unchanged, but a linear without bias that reads a LayerNorm with shift gains one.
    Source: Ashkboos et al., SliceGPT, 2024, section 3.1.
    """

    lossless = True
    requires = frozenset({FLOAT_WEIGHTS, UNSMOOTHED})

    def run(self, program: Program, ctx: Context) -> Report:
        """Changes weights, norm arguments, and ``facts.retired``, which keeps what stands for the folded weights."""
        report, before = Report(), len(program.facts.added)
        norms = [node for node in program.nodes(*_NORMS) if _gain(node) or _shift(node)]
        for norm in ctx.track("folding norms", norms):
            name = _name(norm)
            try:
                site = _find_site(program, norm)
            except _LeftAlone as reason:
                report.skipped.append(Skip(name, str(reason)))
                continue
            _fold(program, site)
            report.matched.append(name)
        settle(program)
        if added := program.facts.added[before:]:
            more = f" and {len(added) - 1} more are" if len(added) > 1 else " is"
            report.notes.append(f"{added[0]}{more} new: linears had no bias to hold their norm's shift")
        return report


class _LeftAlone(Exception):
    """Why a norm cannot be folded."""


@dataclass
class _Site:
    """A norm, and the linears that read all of it."""

    norm: fx.Node
    readers: list[fx.Node] = field(default_factory=list)

    @property
    def matrices(self) -> list[fx.Node]:
        """The distinct weights of the readers."""
        return list(dict.fromkeys(reader.args[1] for reader in self.readers if isinstance(reader.args[1], fx.Node)))


# -- finding -----------------------------------------------------------------------------------------------------------


def _gain(norm: fx.Node) -> fx.Node | None:
    return _node(argument(norm, "weight"))


def _shift(norm: fx.Node) -> fx.Node | None:
    return _node(argument(norm, "bias"))


def _node(value: object) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _name(norm: fx.Node) -> str:
    held = _gain(norm) or _shift(norm)
    return str(held.target) if held is not None and held.op == "get_attr" else norm.name


def _find_site(program: Program, norm: fx.Node) -> _Site:
    site = _Site(norm, list(dict.fromkeys(_readers(norm))))
    for held in (_gain(norm), _shift(norm)):
        if held is not None:
            _alone(held, [norm])
    for reader in site.readers:
        matrix = reader.args[1]
        assert isinstance(matrix, fx.Node)
        _alone(matrix, site.readers)
        bias = _node(argument(reader, "bias"))
        if bias is not None and _shift(norm) is not None:
            _alone(bias, [other for other in site.readers if other.args[1] is matrix])
    return site


def _alone(weight: fx.Node, readers: list[fx.Node]) -> None:
    """Refuses a weight that is computed, or that any node but ``readers`` reads."""
    if weight.op != "get_attr":
        raise _LeftAlone(f"{weight.name} is computed, by {weight.target}")
    for user in weight.users:
        if user not in readers:
            raise _LeftAlone(f"{weight.target} is read by {user.target} too")


def _readers(norm: fx.Node) -> Iterator[fx.Node]:
    """The linears at the end of every path from ``norm``; refuses where one ends in anything else."""
    waiting, seen = [norm], {norm}
    while waiting:
        value = waiting.pop()
        for user in value.users:
            if user.target in (LINEAR, EXPERTS) and [i for i, a in enumerate(user.args) if a is value] == [0]:
                yield user
            elif not leaves_rows_whole(value, user):
                goal = "the output" if user.op == "output" else user.target
                raise _LeftAlone(f"its result goes to {goal}, and not to linears alone")
            elif user not in seen:
                seen.add(user)
                waiting.append(user)


# -- folding -----------------------------------------------------------------------------------------------------------


def _fold(program: Program, site: _Site) -> None:
    shift, gain = _shift(site.norm), _gain(site.norm)
    if shift is not None:  # first, while the matrices are what they were
        _fold_shift(program, site, program.weights[str(shift.target)].float())
        program.facts.retired[str(shift.target)] = 0.0
    if gain is not None:
        offset = float(argument(site.norm, "offset") or 0.0)
        factor = program.weights[str(gain.target)].float() + offset
        for matrix in site.matrices:
            scale_weight(program, str(matrix.target), columns=factor)
        program.facts.retired[str(gain.target)] = 1.0 - offset
    _bare(program, site.norm)


def _fold_shift(program: Program, site: _Site, shift: Tensor) -> None:
    done: set[fx.Node] = set()
    for matrix in site.matrices:
        weight = program.weights[str(matrix.target)]
        moved = _times(weight, shift)
        for reader in (r for r in site.readers if r.args[1] is matrix):
            bias = _node(argument(reader, "bias"))
            if bias is None:
                bias = new_bias(program, matrix, moved.to(weight.dtype))
            elif bias not in done:
                held = program.weights[str(bias.target)]
                program.weights[str(bias.target)] = (held.float() + moved).to(held.dtype)
            done.add(bias)
            reader.args = (*reader.args[:2], bias, *reader.args[3:])
            reader.kwargs = {key: value for key, value in reader.kwargs.items() if key != "bias"}


def _times(weight: Tensor, shift: Tensor) -> Tensor:
    return by_rows(weight, weight.shape[:-1], torch.float32, lambda rows: weight[rows].float() @ shift)


def _bare(program: Program, norm: fx.Node) -> None:
    """Takes gain and shift off the norm; where the gain had widened its result, a cast does so instead."""
    was = norm.meta["val"].dtype
    rms = norm.target is slim.rms_norm.default
    norm.args = (norm.args[0], None) if rms else (norm.args[0], None, None)
    norm.kwargs = {"eps": norm.kwargs["eps"]}
    norm.meta["val"] = program.typer.value(norm, program.weights)
    if norm.meta["val"].dtype != was:
        with program.graph.inserting_after(norm):
            cast = program.graph.call_function(aten._to_copy.default, (norm,), {"dtype": was})
        cast.meta = {**norm.meta, "val": None}
        norm.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
        cast.meta["val"] = program.typer.value(cast, program.weights)
