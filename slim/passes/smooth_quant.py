"""Moves outliers of activations into the weights that read them, so that both round well to int8."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from slim import errors
from slim.compiler.blocks import row_blocks
from slim.compiler.options import literal
from slim.compiler.passes_base import FLOAT_WEIGHTS, STATISTICS, UNSMOOTHED, Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report
from slim.compiler.scaling import ScaleSite, scale_sites, settle
from slim.compiler.statistics import SiteStatistics, collect

slim = torch.ops.slim

_GRID = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
_ROWS = 256  # of a site's input, that the search rounds
_LIMIT = 1e5  # no channel moves further than this

Statistics = Mapping[fx.Node, SiteStatistics]


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divides the channels of activations by a scale and multiplies the columns that read them; the function stays.

    Large models have a few channels whose activations are many times larger than the others', and one int8 scale a
    token then leaves the others no digits. With ``s_j = max|x_j|^alpha / max_i|W_ij|^(1 - alpha)``, over all readers W
    of channel j, ``x_j / s_j`` and ``W_ij s_j`` share the difficulty. The scale goes where it costs nothing at run
    time: into the gain of a norm, the rows of v (through attention; query heads that share a kv head share it), the
    rows of up (through the product with the gate), those of fc1 where ReLU or its square stands before fc2.

    Sites are found by data flow (``slim.compiler.scaling``); inputs of linears that no scale reaches are left alone,
    and the report says why. The channel in the middle keeps its scale, as do those that are zero in x or W on the
    calibration data; a constant factor changes nothing about rounding.

    Args:
        alpha: how much of the difficulty moves from activations to weights, 0 to 1; 0.5 suits most models, 0.8 to 0.9
            those with larger outliers. "search" takes, for each site, what makes the product of both sides, rounded
            to int8 (activations by token, weights by row), come closest to the exact one on 256 calibration tokens,
            out of twelve values of alpha and of not moving anything.

    Weights keep their shape; they are computed in float32 and rounded once. A norm without a gain gets one.
    Source: Xiao et al., SmoothQuant, 2023, equation 4.

    Example:
        >>> slim.compile(model, passes=[SmoothQuant(0.8), Quantize("int8", activations="int8")], calibration=texts)
    """

    alpha: float | Literal["search"] = 0.5

    lossless = True
    requires = frozenset({FLOAT_WEIGHTS, STATISTICS})
    invalidates = frozenset({UNSMOOTHED})

    def check(self) -> None:
        """Refuses an alpha that is no share."""
        if isinstance(self.alpha, float) and not 0 <= self.alpha <= 1:
            reason = f"{literal(self.alpha)} is not between 0 and 1"
            raise errors.BadPassOption(pass_name=self.name, option="alpha", reason=reason)

    def run(self, program: Program, ctx: Context) -> Report:
        """Changes gains, shifts, weights and biases; adds a gain to norms that have none."""
        sites, skipped = scale_sites(program)
        report = Report(skipped=skipped)
        rows = _ROWS if self.alpha == "search" else 0
        values = list(dict.fromkeys(value for site in sites for value in site.values))
        statistics = collect(program, values, ctx, asked_by=repr(self), rows=rows, notes=report.notes) if sites else {}
        known = len(program.facts.added)
        chosen: Counter[str] = Counter()
        for site in ctx.track("smoothing", sites):
            alpha = self.alpha if isinstance(self.alpha, float) else _search(program, site, statistics)
            chosen["none" if alpha is None else f"{alpha:g}"] += 1
            if alpha is not None:
                site.apply(program, smoothing_scale(*largest(program, site, statistics), alpha))
            report.matched.append(site.name)
        settle(program)
        if self.alpha == "search":
            found = ", ".join(f"{alpha} at {count}" for alpha, count in sorted(chosen.items()))
            report.notes.append(f"alpha found by search: {found} of {len(sites)} sites")
        report.notes += [f"{name} is new: its norm had no gain" for name in program.facts.added[known:]]
        return report


# -- the scale ---------------------------------------------------------------------------------------------------------


def largest(program: Program, site: ScaleSite, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """(max|x|, max|W|), float32 [site.size] each: over what each number of the scale divides, and multiplies."""
    x, w = torch.zeros(site.size), torch.zeros(site.size)
    for reader in site.readers:
        x = torch.maximum(x, site.gather(reader, statistics[reader.value].absmax))
        w = torch.maximum(w, site.gather(reader, _largest_by_column(program.weights[reader.weight])))
    return x, w


def _largest_by_column(weight: Tensor) -> Tensor:
    """max_i |W_ij|, float32 [n], for W [..., m, n]."""
    found = torch.zeros(weight.shape[-1], device=weight.device)
    for block in _matrix_blocks(weight):
        found = torch.maximum(found, block.abs().amax(0))
    return found.cpu()


def _matrix_blocks(weight: Tensor) -> Iterator[Tensor]:
    """The rows of W [..., m, n] as float32 [some, n]."""
    rows = weight.reshape(-1, weight.shape[-1])
    for block in row_blocks(rows.shape):
        yield rows[block].float()


def smoothing_scale(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """x^alpha / w^(1 - alpha), over its median; one where x or w is zero."""
    alive = (x > 0) & (w > 0)
    if not bool(alive.any()):
        return torch.ones(x.shape)
    exponent = alpha * x.double().log() - (1 - alpha) * w.double().log()
    middle = exponent[alive].median()
    return torch.where(alive, (exponent - middle).exp().clamp(1 / _LIMIT, _LIMIT), 1.0).float()


# -- searching ---------------------------------------------------------------------------------------------------------


def _search(program: Program, site: ScaleSite, statistics: Statistics) -> float | None:
    """The alpha under which the readers' products are rounded least; None where that is without any scale."""
    x, w = largest(program, site, statistics)
    choices: list[float | None] = [None, *_GRID]
    scales = [torch.ones(site.size) if alpha is None else smoothing_scale(x, w, alpha) for alpha in choices]
    errors_ = rounding_errors(program, site, statistics, scales)
    return choices[int(errors_.argmin())]


def rounding_errors(program: Program, site: ScaleSite, statistics: Statistics, scales: Sequence[Tensor]) -> Tensor:
    """float64 [scales]: |Q(X / s) Q(W s)^T - X W^T|^2 / |X W^T|^2, summed over the readers of ``site``.

    X is the sample of rows that the statistics hold; Q rounds to int8, by row.
    """
    total = torch.zeros(len(scales), dtype=torch.float64)
    for reader in site.readers:
        x = statistics[reader.value].rows
        assert x is not None
        columns = [site.spread(reader, scale) for scale in scales]
        rounded = [_rounded(x / column) for column in columns]
        off, energy = torch.zeros(len(scales), dtype=torch.float64), 0.0
        for block in _matrix_blocks(program.weights[reader.weight].cpu()):
            exact = x @ block.T
            energy += float(exact.square().sum())
            for index, (column, side) in enumerate(zip(columns, rounded, strict=True)):
                off[index] += float((side @ _rounded(block * column).T - exact).square().sum())
        total += off / energy if energy else off
    return total


def _rounded(rows: Tensor) -> Tensor:
    """int8 with a scale for each row, as floats again."""
    scale = slim.token_scale(rows)
    return slim.dequantize(slim.quantize(rows, scale, axis=0), scale, axis=0)
