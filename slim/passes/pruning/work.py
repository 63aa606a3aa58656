"""Chooses units site by site, on what the sites before have become, and fits what reads the ones that are left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from slim.compiler.biases import new_bias
from slim.compiler.gauss_newton import fitted
from slim.compiler.passes_base import Context
from slim.compiler.program import Program
from slim.compiler.rules import argument
from slim.compiler.statistics import SiteStatistics, walk
from slim.compiler.statistics.paired import Paired
from slim.compiler.stream import beside
from slim.compiler.uses import LINEAR
from slim.compiler.weights import Deferred
from slim.passes.pruning.budget import Counts
from slim.passes.pruning.makers import Makers, find_makers
from slim.passes.pruning.obs import removal_order
from slim.passes.pruning.rearrange import rearranged
from slim.passes.pruning.refit import masked, refit, wanted
from slim.passes.pruning.sites import Site

Choice = Callable[[Site, SiteStatistics, int], Tensor]  # the units to take out of a site
_GONE, _MISSING, _SHIFT = "gone", "missing", "bias"  # among the results of a walk; no weight is called that
_ROWS, _NUMBERS = 16_384, 1 << 26  # that makers are fitted to: tokens, and numbers of them that are held


@dataclass
class Result:
    """What became of the sites.

    Attributes:
        gone: the units to take out; the columns that read them are zeros already.
        missing: of sites that were fitted, the share of the old result's energy that is lost.
    """

    gone: dict[Site, Tensor] = field(default_factory=dict)
    missing: dict[Site, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """How sites are pruned.

    Attributes:
        choose: which units go; None chooses those that are best taken out given that the others are fitted.
        fit: least squares over what is left. Without it weights stay as they are.
        bias: a linear that has no bias gets one.
        rounds: of Gauss-Newton, in which what makes neurons is fitted too.
    """

    choose: Choice | None
    fit: bool
    bias: bool
    rounds: int = 0

    def run(self, program: Program, counts: Counts, ctx: Context, asked_by: str, notes: list[str]) -> Result:
        """Writes zeros into the columns that go; the Program keeps its shapes, so that the walk can go on."""
        todo = {site.value: site for site in counts}
        originals = {site: program.weights.raw(site.weight) for site in counts}
        result = Result()
        makers = self._makers(counts)
        streams = {site.value: beside(site.linear) for site in counts} if self.fit else {}
        blocks = walk(
            program, list(todo), ctx, asked_by=asked_by, gram=True, cross=True, dense=True, grain="site",
            rows=_rows(makers), beside=streams, makers={value: each.linears[0] for value, each in makers.items()},
            notes=notes,
        )  # fmt: skip
        for block in blocks:
            (value,) = block.values
            site = todo[value]
            if not block.restored:
                statistics = block.statistics[value]
                made = self._made(program, site, counts[site], originals[site], statistics)
                if value in makers:
                    made |= self._fitted(program, makers[value], originals[site], made, statistics)
                block.results.update(made)
            self._take(program, site, dict(block.results), result)
        return result

    def _makers(self, counts: Counts) -> dict[fx.Node, Makers]:
        """Of the sites that lose neurons; the walk has to come past the makers since the site before."""
        found, before = dict[fx.Node, Makers](), None
        for site, count in sorted(counts.items(), key=lambda item: item[0].linear):
            makers = find_makers(site, before) if self.fit and self.rounds and count else None
            if makers is not None:
                found[site.value] = makers
            before = site.linear
        return found

    def _fitted(
        self,
        program: Program,
        makers: Makers,
        original: Tensor | Deferred,
        made: dict[str, Tensor],
        statistics: SiteStatistics,
    ) -> dict[str, Tensor]:
        """Makers and reader fitted together, from what the closed form ``made`` of the reader."""
        site, kept = makers.site, makers.site.kept(made[_GONE])
        assert statistics.rows is not None
        width = makers.source.meta["val"].shape[-1]
        rows, dense = statistics.rows[:, :width], statistics.rows[:, width:]
        held = original if isinstance(original, Tensor) else original.load()
        aim = dense @ wanted(held.float(), dense.shape[-1]).float().T
        if site.bias is not None:
            aim += program.weights[site.bias].float()
        shift = made[_SHIFT].float() if _SHIFT in made else None
        start = makers.layer(program, made[site.weight][:, kept].float(), shift, kept)
        layer, missing = fitted(start, rows, aim, self.rounds)
        new = {site.weight: masked(layer.reader, kept, held), _MISSING: torch.tensor(missing)}
        if layer.shift is not None:
            new[_SHIFT] = layer.shift.to(held.dtype)
        return new | makers.written(program, layer)

    def _made(
        self, program: Program, site: Site, count: int, original: Tensor | Deferred, statistics: SiteStatistics
    ) -> dict[str, Tensor]:
        held = original if isinstance(original, Tensor) else original.load()
        weight = held.float().reshape(-1, held.shape[-1])
        biased = site.linear.target is LINEAR and (site.fitted_bias is not None or self.bias)
        paired = Paired.of(statistics, centred=biased)
        gone = self._chosen(site, count, weight, paired, statistics)
        kept = site.kept(gone)
        name = site.fitted_bias
        bias = program.weights[name] if name is not None else torch.zeros(len(weight)) if biased else None
        if self.fit:
            fitted = refit(weight, bias if biased else None, paired, kept)
            made = {site.weight: masked(fitted.weight, kept, held), _MISSING: torch.tensor(fitted.missing)}
            shift = fitted.bias
        else:
            made = {site.weight: masked(weight[:, kept], kept, held)}
            left_out = weight.clone()
            left_out[:, kept] = 0.0
            shift = bias + left_out @ statistics.mean if bias is not None and self.bias else None
        if shift is not None:
            made[_SHIFT] = shift.to(held.dtype)
        return made | {_GONE: gone}

    def _chosen(self, site: Site, count: int, weight: Tensor, paired: Paired, statistics: SiteStatistics) -> Tensor:
        if count == 0:
            return torch.zeros(0, dtype=torch.long)
        if self.choose is not None:
            return self.choose(site, statistics, count)
        aim = paired.fit(wanted(weight, len(paired.dense)), weight.double())  # what does to x now what is wanted of it
        return removal_order(aim, paired.gram, site.columns, count).units

    def _take(self, program: Program, site: Site, results: dict[str, Tensor], result: Result) -> None:
        result.gone[site] = results.pop(_GONE)
        if _MISSING in results:
            result.missing[site] = float(results.pop(_MISSING))
        shift = results.pop(_SHIFT, None)
        if shift is not None and site.bias is not None:
            program.weights[site.bias] = shift
        elif shift is not None:
            read(program, site.linear, shift)
        for name, value in results.items():
            program.weights[name] = value


def _rows(makers: Mapping[fx.Node, Makers]) -> int:
    """How many are sampled."""
    widest = max(
        (each.source.meta["val"].shape[-1] + 2 * len(each.site.columns) for each in makers.values()), default=1
    )
    return min(_ROWS, _NUMBERS // widest) if makers else 0


def read(program: Program, linear: fx.Node, bias: Tensor) -> None:
    """Makes ``linear``, which has no bias, read one."""
    matrix = linear.args[1]
    assert isinstance(matrix, fx.Node)
    assert argument(linear, "bias") is None
    linear.args = (*linear.args[:2], new_bias(program, matrix, bias), *linear.args[3:])


def lowest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` units with the least scores; those of slopes [rows, units] that do least together."""
    first = alone(scores).argsort(stable=True)[:count]
    return first if scores.dim() == 1 else rearranged(scores, first)


def alone(scores: Tensor) -> Tensor:
    """[units]: scores, or of slopes [rows, units] what each unit does alone."""
    return scores if scores.dim() == 1 else scores.square().sum(0)


def at_once(program: Program, counts: Counts, scores: Callable[[Site], Tensor]) -> Result:
    """Units chosen by scores that need no activations; weights stay as they are."""
    return Result({site: lowest(scores(site), count) for site, count in counts.items()})
