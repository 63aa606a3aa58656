"""Channels of the residual stream: which directions stay, and what reads and writes the stream fitted to them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from slim.compiler.passes_base import Context
from slim.compiler.program import Program
from slim.compiler.residual import NoStream, Stream, turn
from slim.compiler.rules import argument
from slim.compiler.statistics import SiteStatistics, readers, site_values, walk
from slim.compiler.statistics.paired import Paired
from slim.compiler.stream import beside
from slim.compiler.uses import EMBEDDING, EXPERTS, LINEAR
from slim.passes.pruning import tied
from slim.passes.pruning.directions import Seen, leading
from slim.passes.pruning.refit import masked, refit

aten, slim = torch.ops.aten, torch.ops.slim

_ROWS = 8192  # of a weight that are fitted at once


# -- the basis ---------------------------------------------------------------------------------------------------------


def centre(program: Program, stream: Stream) -> bool:
    """Takes the mean over channels out of what is written, where LayerNorms take it out of what is read; if it did.

    A LayerNorm over what has no mean is a root mean square norm, which does not know one basis from another.

    Raises:
        NoStream: where something else reads the mean.
    """
    means = [norm for norm in stream.norms if norm.target is slim.layer_norm.default]
    if not means:
        return False
    raw = next((node for node in stream.readers if not _is_behind_norm(node, stream)), None)
    if len(means) < len(stream.norms) or raw is not None:
        other = raw or next(norm for norm in stream.norms if norm not in means)
        raise NoStream(f"LayerNorms take the mean over its channels out, and {other.name} reads it")
    for norm in means:
        norm.target, norm.args = slim.rms_norm.default, norm.args[:2]
    eye = torch.eye(stream.width).double()
    turn(program, stream, eye - 1 / stream.width, eye)
    return True


def _is_behind_norm(reader: fx.Node, stream: Stream) -> bool:
    value = reader.args[0]
    while value not in stream.norms and len(value.all_input_nodes) == 1:  # type: ignore[union-attr]
        value = value.all_input_nodes[0]  # type: ignore[union-attr]
    return value in stream.norms


def directions(program: Program, stream: Stream, kept: int, ctx: Context, asked_by: str) -> Tensor:
    """[width, width]: an orthonormal basis of the stream; the first ``kept`` directions are those to keep."""
    every = []
    for block in walk(program, site_values(stream.readers), ctx, asked_by=asked_by, gram=True, changes=False):
        if not block.restored:
            block.results |= {value.name: _gram(found) for value, found in block.statistics.items()}
        for value in block.values:
            if not bool(block.results[value.name].any()):
                continue  # no token came here
            mine = [str(node.args[1].target) for node in readers(value) if node in stream.readers]  # type: ignore[union-attr]
            moments = block.results[value.name]
            if stream.squares and value is stream.squares[0].args[0]:
                every += tied.seen(program.weights[mine[0]], program.weights[table_of(stream.squares[0])], moments)
                continue
            weights = [program.weights[name].reshape(-1, stream.width) for name in dict.fromkeys(mine)]
            every.append(Seen.of(moments, weights))
    return leading(every, kept)


def _gram(statistics: SiteStatistics) -> Tensor:
    assert statistics.gram is not None
    return statistics.gram


def by_magnitude(program: Program, stream: Stream) -> Tensor:
    """[width, width]: the channels as they are, those first whose weights have the largest sum of squares."""
    total = torch.zeros(stream.width)
    for name in stream.rows:
        total += program.weights[name].float().square().transpose(-1, -2).reshape(-1, stream.width).sum(0)
    for name in (*stream.entries, *stream.columns):
        total += program.weights[name].float().square().reshape(-1, stream.width).sum(0)
    return torch.eye(stream.width).double()[:, total.argsort(descending=True)]


def by_chance(stream: Stream) -> Tensor:
    """[width, width]: the channels as they are, in an order that is the same each time."""
    order = torch.randperm(stream.width, generator=torch.Generator().manual_seed(0))
    return torch.eye(stream.width).double()[:, order]


# -- deleting ----------------------------------------------------------------------------------------------------------


def silence(program: Program, stream: Stream, kept: int) -> None:
    """Writes zeros to all but the first ``kept`` channels; shapes stay."""
    eye = torch.eye(stream.width).double()
    turn(program, stream, eye * (torch.arange(stream.width) < kept), eye)


def delete(program: Program, stream: Stream, kept: int, means: bool) -> None:
    """Takes all but the first ``kept`` channels, the others being zero, out for good; the function stays the same.

    Values are scaled by the root of the share that is left, so that norms, which average over fewer, divide by what
    they did. Where norms take a mean out, one channel more is written, in directions that each add up to zero.
    """
    wide = kept + means
    scale = (wide / stream.width) ** 0.5
    places, eye = torch.eye(stream.width).double()[:kept], torch.eye(kept).double()
    spread = _without_mean(wide) if means else eye
    _rescale(program, stream, wide)
    if means:
        for norm in stream.norms:
            norm.target, norm.args = slim.layer_norm.default, (norm.args[0], None, None)
    turn(program, stream, scale * spread @ places, places.T @ spread.T / scale)


def _without_mean(width: int) -> Tensor:
    """[width, width - 1]: orthonormal columns that each add up to zero."""
    columns = torch.cat([torch.ones(width, 1), torch.eye(width)[:, 1:]], 1).double()
    return torch.linalg.qr(columns).Q[:, 1:]


def _rescale(program: Program, stream: Stream, width: int) -> None:
    """A table that is multiplied by the root of the stream's width, as some are, is by that of what it becomes."""
    for node in stream.values:
        if node.target is not aten.mul.Tensor:
            continue
        table = next((n for n in node.all_input_nodes if n.target is EMBEDDING), None)
        factor = next((n for n in node.all_input_nodes if n.op == "get_attr"), None)
        if table is None or factor is None:
            continue
        heads = {head for square in stream.squares for head in square.users}
        if not set(table.args[0].users) <= {table, *heads}:  # type: ignore[union-attr]
            continue
        name, held = str(factor.target), program.weights[str(factor.target)]
        if held.numel() == 1 and abs(float(held) / stream.width**0.5 - 1) < 1e-2 and len(factor.users) == 1:
            new = torch.full_like(held, width**0.5)
            rows = str(table.args[0].target)  # type: ignore[union-attr]
            value = program.weights[rows]
            program.weights[rows] = (value.float() * (float(held) / float(new))).to(value.dtype)
            for square in stream.squares:
                matrix = str(square.args[1].target)  # type: ignore[union-attr]
                program.weights[matrix] = program.weights[matrix] * (float(new) / float(held))
            program.weights[name] = new


# -- fitting -----------------------------------------------------------------------------------------------------------


@dataclass
class Fitting:
    """Fits, in order, what reads the channels that are left and what writes to them, to what they were.

    Readers are fitted to what they returned in ``dense``; writers to that and to what the stream has lost by then.

    Attributes:
        program: writes zeros to all but the first ``kept`` channels. dense: the same before it did.
        missing: of each weight the share of its old result's energy that is lost.
    """

    program: Program
    dense: Program
    stream: Stream
    kept: int
    missing: dict[str, float] = field(default_factory=dict)

    def run(self, ctx: Context, asked_by: str, notes: list[str]) -> None:
        mine = [node for node in self.program.nodes(LINEAR, EXPERTS) if self._reads(node) or self._writes(node)]
        streams = {node.args[0]: beside(node) for node in mine if self._writes(node) and _is_alone(node)}
        blocks = walk(
            self.program, site_values(mine), ctx, asked_by=asked_by, gram=True, cross=True, dense=True, grain="site",
            meant=self.dense, beside=streams, notes=notes,  # type: ignore[arg-type]
        )  # fmt: skip
        for block in blocks:
            if not block.restored:
                for value, statistics in block.statistics.items():
                    for linear in (node for node in readers(value) if node in mine):
                        block.results |= self._made(linear, statistics)
            for name, made in block.results.items():
                self.program.weights[name] = made

    def _reads(self, linear: fx.Node) -> bool:
        return linear in self.stream.readers

    def _writes(self, linear: fx.Node) -> bool:
        """Experts add to what others add, each to its own tokens: they stay as they are."""
        return linear in self.stream.writers and linear.target is LINEAR

    def _made(self, linear: fx.Node, statistics: SiteStatistics) -> dict[str, Tensor]:
        """The weight, and the bias where there is one."""
        name, bias = str(linear.args[1].target), argument(linear, "bias")  # type: ignore[union-attr]
        held = self.dense.weights[name]
        if linear in self.stream.squares:
            table = self.dense.weights[table_of(linear)]
            square, self.missing[name] = tied.fit(held, table, Paired.of(statistics, centred=False), self.kept)
            full = torch.zeros_like(held)
            full[: self.kept, : self.kept] = square
            return {name: full}
        old = held.float().reshape(-1, held.shape[-1])
        biased = linear.target is LINEAR and bias is not None
        shift = self.dense.weights[str(bias.target)] if biased else None
        paired = Paired.of(statistics, centred=biased)
        columns = torch.arange(self.kept if self._reads(linear) else old.shape[-1])
        step = _ROWS if len(paired.dense) == old.shape[-1] else len(old)
        parts = [
            refit(old[i : i + step], None if shift is None else shift[i : i + step], paired, columns)
            for i in range(0, len(old), step)
        ]
        self.missing[name] = sum(part.missing for part in parts) / len(parts)
        weight = masked(torch.cat([part.weight for part in parts]), columns, held)
        made = {name: weight}
        if shift is not None:
            made[str(bias.target)] = torch.cat([part.bias for part in parts if part.bias is not None]).to(shift.dtype)
        if self._writes(linear):
            made = {key: _first_rows(value, self.kept) for key, value in made.items()}
        return made


def table_of(square: fx.Node) -> str:
    """The table that what a square makes is read through."""
    (head,) = square.users
    return str(head.args[1].target)  # type: ignore[union-attr]


def _is_alone(linear: fx.Node) -> bool:
    """Whether nothing else reads what a linear reads."""
    return len(readers(linear.args[0])) == 1  # type: ignore[arg-type]


def _first_rows(value: Tensor, count: int) -> Tensor:
    value = value.clone()
    value[count:] = 0.0
    return value
