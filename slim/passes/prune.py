"""Takes neurons and attention heads out of a model, without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NoReturn

from torch import Tensor, fx

from slim import errors
from slim.compiler.dependencies import Dependencies, Kind
from slim.compiler.passes_base import FLOAT_KV, FLOAT_WEIGHTS, KNOWN_HEADS, STATISTICS, Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report
from slim.compiler.statistics import SiteStatistics, calibration_of, collect
from slim.passes.pruning import gradients, scores
from slim.passes.pruning.budget import Budget, Counts, TooMuch, spaced
from slim.passes.pruning.measure import Comparison
from slim.passes.pruning.sites import Site, block_parameters, find_sites
from slim.passes.pruning.work import Choice, Result, Work, at_once, lowest
from slim.passes.pruning.write import can_say_heads, write_config

_KINDS = {
    "both": (Kind.NEURON, Kind.KV_HEAD),
    "neurons": (Kind.NEURON,),
    "heads": (Kind.KV_HEAD,),
}
_ROUNDS = 2  # of Gauss-Newton; the third gains nothing on tokens that were not seen


@dataclass(frozen=True)
class Prune(Pass):
    """Takes the neurons of MLPs and the kv heads of attentions that matter least out, with all that belongs to them.

    What belongs to a unit is read off the graph: of a neuron the rows of gate and up that make it and the column of
    down that reads it; of a kv head its rows of k and v, the rows of the queries that read it, and the columns of o.
    The model that is left has smaller matrices and nothing else: no masks, no indices.

    Which units: those whose loss costs the next linear least, given that it is then fitted anew to the units that are
    left (optimal brain surgeon for columns). Layers are pruned one after the other, each on the input that the pruned
    ones before it give, and each linear that reads pruned units is fitted by least squares, so that the residual stream
    that it adds to is again what it was. Of MLPs the linears that make the neurons are then fitted with it. How much of
    the budget falls to heads and how much to neurons is measured: a few ways to share it are tried on the calibration
    data, every layer fitted on its own, and the one that moves the output least is taken.

    Every layer loses the same number of neurons and of heads, and the configuration follows, so that the result loads
    in plain transformers where the architecture lets its configuration say so. An even number of kv heads stays even
    (or becomes one), so that GQA behind this pass still finds groups.

    Args:
        ratio: of the parameters of the blocks (the matrices that are neither embedding nor head), the share that goes;
            at least that, as numbers of neurons are rounded.
        criterion: "obs" is the above. Baselines, which choose by a score and fit nothing: "wanda", "flap" (which adds
            a bias for what is lost on average), "taylor", "fisher" (both need gradients), "magnitude" and "random"
            (which need no calibration). They take the same share of heads as of neurons.
        units: what may go: "both", "neurons" or "heads".
        protect: patterns of weight names; a site that any of its weights matches is left alone.
        multiple: what the number of neurons left is divisible by; None is 128, or less for narrow layers.
        refit: fit what reads the units that are left; None is True for "obs" and False for the baselines.
        bias: give linears that have no bias one, for what is lost on average. Plain transformers may have no place
            for it.
        reload: take only such numbers of heads that plain transformers can build the model of; some architectures
            leave no choice but to take neurons alone.
        rounds: of Gauss-Newton over an MLP's linears, those that make neurons and the one that reads them, from where
            the closed form for the latter leaves them. None is two where anything is fitted. 0 is much faster.

    Source: units and costs follow Hassibi & Stork, 1993 and ZipLM (Kurtic et al., 2023); the fit is the closed form
    that FLAP (An et al., 2024) approximates by a bias.

    Example:
        >>> slim.compile(model, passes=[Prune(0.2)], calibration=texts)
    """

    ratio: float
    criterion: Literal["obs", "wanda", "flap", "taylor", "fisher", "magnitude", "random"] = "obs"
    units: Literal["both", "neurons", "heads"] = "both"
    protect: tuple[str, ...] = ()
    multiple: int | None = None
    refit: bool | None = None
    bias: bool = False
    reload: bool = True
    rounds: int | None = None

    requires = frozenset({FLOAT_WEIGHTS, FLOAT_KV, KNOWN_HEADS, STATISTICS})

    def check(self) -> None:
        """Refuses shares that leave all or nothing."""
        if not 0.0 < self.ratio < 1.0:
            self._refuse("ratio", f"a share of the parameters lies between 0 and 1, and {self.ratio} does not")
        if self.multiple is not None and self.multiple < 1:
            self._refuse("multiple", f"a number is divisible by 1 at least, and not by {self.multiple}")
        if self.rounds is not None and (self.rounds < 0 or not (self.criterion == "obs" or self.refit)):
            self._refuse("rounds", "it is a number of rounds of fitting, and needs refit=True")

    def _refuse(self, option: str, reason: str) -> NoReturn:
        raise errors.BadPassOption(pass_name=self.name, option=option, reason=reason)

    def run(self, program: Program, ctx: Context) -> Report:
        """Changes the shapes of weights, what reads them, and ``facts.config``."""
        report = Report()
        found = Dependencies(program)
        sites, report.skipped = find_sites(program, found, self.protect, _KINDS[self.units])
        others = [site for site in find_sites(program, found)[0] if site.group not in {one.group for one in sites}]
        if not sites:
            return report
        before = block_parameters(program)
        counts = self._counts(program, ctx, sites, before)
        result = self._pruned(program, ctx, counts, report)
        found.remove({site.group: units for site, units in result.gone.items() if len(units)})
        program.clean()
        report.matched = [str(site) for site, count in counts.items() if count]
        report.notes += list(_told(counts, result))
        report.notes += write_config(program, sites, others, counts)
        after = block_parameters(program)
        gone = before - after
        report.notes.append(f"{gone:,} of the {before:,} parameters of blocks are gone, {gone / before:.1%}")
        return report

    # -- how many ------------------------------------------------------------------------------------------------------

    def _counts(self, program: Program, ctx: Context, sites: Sequence[Site], parameters: int) -> Counts:
        budget = Budget(sites, self.ratio * parameters, self.multiple, partial(self._allowed, program))
        try:
            ways = spaced(budget.ways()) if self.criterion == "obs" else [budget.even()]
        except TooMuch:
            held = sum(site.cost * site.units for site in sites)
            self._refuse("ratio", f"the units that can go hold {held:,} of the {parameters:,} parameters of blocks")
        if len(ways) == 1:
            return ways[0]
        statistics = self._collected(program, ctx, sites)
        most = {site: max(way[site] for way in ways) for site in sites}
        compared = Comparison(program, statistics, calibration_of(program, ctx, repr(self)).batches, most)
        return min(ctx.track("sharing the budget", ways), key=compared.loss)

    def _allowed(self, program: Program, lost: Counts) -> bool:
        return not self.reload or can_say_heads(program, lost)

    def _collected(self, program: Program, ctx: Context, sites: Sequence[Site]) -> dict[fx.Node, SiteStatistics]:
        return collect(program, [site.value for site in sites], ctx, asked_by=repr(self), gram=True)

    # -- which ---------------------------------------------------------------------------------------------------------

    def _pruned(self, program: Program, ctx: Context, counts: Counts, report: Report) -> Result:
        """Chooses units, and fits what is left where that is asked for."""
        fits = self.criterion == "obs" if self.refit is None else self.refit
        known = self._known_scores(program, ctx, list(counts))
        if known is not None and not fits and not self.bias:
            return at_once(program, counts, known.__getitem__)
        rounds = _ROUNDS if self.rounds is None else self.rounds
        work = Work(self._choice(program, known), fits, self.bias or (self.criterion == "flap" and not fits), rounds)
        return work.run(program, counts, ctx, repr(self), report.notes)

    def _known_scores(self, program: Program, ctx: Context, sites: Sequence[Site]) -> dict[Site, Tensor] | None:
        """Scores that do not depend on what other sites lose; None where the criterion's do."""
        if self.criterion in ("magnitude", "random"):
            score = scores.magnitude if self.criterion == "magnitude" else scores.random
            return {site: score(program, site) for site in sites}
        if self.criterion in ("taylor", "fisher"):
            slopes = gradients.taylor if self.criterion == "taylor" else gradients.fisher
            return slopes(program, calibration_of(program, ctx, repr(self)).batches, sites, ctx)
        return None

    def _choice(self, program: Program, known: dict[Site, Tensor] | None) -> Choice | None:
        if self.criterion == "obs":
            return None
        if known is not None:
            return lambda site, statistics, count: lowest(known[site], count)
        score = scores.wanda if self.criterion == "wanda" else scores.flap
        return lambda site, statistics, count: lowest(score(program, site, statistics), count)


def _told(counts: Counts, result: Result) -> Iterator[str]:
    """A line a site."""
    for site, count in counts.items():
        lost = f"; measured: what reads them loses {result.missing[site]:.2%}" if site in result.missing else ""
        if count:
            yield f"{site}: {site.units} to {site.units - count} {site.kind}s{lost}"
