"""Takes neurons, attention heads, channels or whole blocks out of a model, without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, NoReturn

from torch import Tensor, fx

from slim import errors
from slim.compiler.dependencies import Dependencies, Kind
from slim.compiler.machine import measure_machine
from slim.compiler.options import literal
from slim.compiler.passes_base import (
    FLOAT_KV,
    FLOAT_WEIGHTS,
    KNOWN_HEADS,
    STATISTICS,
    UNSMOOTHED,
    Context,
    Pass,
)
from slim.compiler.program import Program
from slim.compiler.report import Report, Skip
from slim.compiler.residual import NoStream
from slim.compiler.stack import find_blocks, take_out
from slim.compiler.statistics import SiteStatistics, calibration_of, collect
from slim.compiler.statistics.gradients import output_moments
from slim.compiler.uses import EXPERTS
from slim.passes.fold_norms import FoldNorms
from slim.passes.pruning import depth as depths
from slim.passes.pruning import experts, gradients, scores
from slim.passes.pruning.budget import Budget, Counts, TooMuch, spaced
from slim.passes.pruning.checks import faults
from slim.passes.pruning.measure import Comparison
from slim.passes.pruning.narrow import Narrowing, Unsaid, untied
from slim.passes.pruning.prices import Load, Measure, Prices
from slim.passes.pruning.sites import HEADS, Site, block_parameters, find_sites
from slim.passes.pruning.spread import by_scores, by_surgeon, spread
from slim.passes.pruning.tied import part
from slim.passes.pruning.work import Choice, Result, Work, alone, at_once, lowest
from slim.passes.pruning.write import can_say_heads, write_config

_KINDS = {
    "both": (Kind.NEURON, Kind.KV_HEAD),
    "neurons": (Kind.NEURON,),
    "heads": (Kind.KV_HEAD,),
    "query heads": (Kind.QUERY_HEAD,),
    "experts": (Kind.EXPERT,),
}
_GOALS = ("ratio", "parameters", "bytes", "flops", "latency", "depth")
_MEASURES: tuple[Measure, ...] = ("parameters", "bytes", "flops", "latency")
_NARROW = (
    "transformers has no configuration for this model with a narrower residual stream: it takes a head to be as wide "
    "as the stream divided by the heads, or has no place for a bias that a linear gets; reload=False leaves it to slim"
)
_UNKNOWN_CHOICE = "how its experts are chosen cannot be followed, so that none of them can go"
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

    How much goes is said in one way: by ``ratio``; by what the whole model may hold or cost afterwards, ``parameters``,
    ``bytes``, ``flops`` or ``latency``, at most; or by ``depth``.

    With ``depth`` whole blocks go, and nothing is fitted: what reads a block's output reads its input. Blocks are what
    the model repeats, wherever one value alone leads from one to the next. The number of layers in the configuration
    follows, lists that speak of each layer too, and so do the layers of the KV cache.

    Args:
        ratio: of the parameters of the blocks (the matrices that are neither embedding nor head), the share that goes;
            at least that, as numbers of neurons are rounded.
        criterion: "obs" is the above. Baselines, which choose by a score and fit nothing: "wanda", "flap" (which adds
            a bias for what is lost on average), "taylor", "fisher" (both need gradients), "magnitude" and "random"
            (which need no calibration). They take the same share of heads as of neurons.
        units: what may go: "both" is "neurons" and "heads", which are kv heads with the queries that read them. "query
            heads" are one of every kv head at a time, and keys and values stay. "experts" of mixtures go with their
            place at the router; nothing is fitted, and "obs" is then the energy of what an expert adds to the stream.
            "channels" are those of the residual stream, which is rotated first: the directions go that what reads it
            needs least, and every layer gets narrower by as many; ``ratio``, ``parameters`` and ``bytes`` say how many.
            A head that is tied to the embeddings stays tied, behind a root mean square norm.
        protect: patterns of weight names; a site that any of its weights matches is left alone.
        multiple: what the number of neurons left is divisible by; None is 128, or less for narrow layers.
        refit: fit what reads the units that are left; None is True for "obs" and False for the baselines.
        bias: give linears that have no bias one, for what is lost on average. Plain transformers may have no place
            for it.
        reload: take only such numbers of heads that plain transformers can build the model of; some architectures
            leave no choice but to take neurons alone.
        scope: "global" lets every layer lose a number of its own: those units go whose loss, estimated from the fit
            and the curvature of the model's loss, costs least for what it saves; a quarter of each site stays. For
            "obs", "taylor" and "fisher", whose costs layers can be compared by. Needs ``reload=False``: no
            configuration of transformers holds such a model.
        parameters: numbers that the whole model holds afterwards, at most.
        bytes: the same in bytes of its weights as they are stored, before any quantisation behind this pass.
        flops: floating-point operations to write one token behind ``context`` - 1 others, one row at a time (to read
            ``context`` tokens, for models that do not write).
        latency: the same in milliseconds of a roofline: what each matrix and attention moves, or computes, by the
            bandwidth and speed that are measured on this machine's CPU as the pass begins.
        context: tokens, for ``flops`` and ``latency``.
        depth: whole blocks instead: how many, or which share of them (rounded, one at least).
        blocks: which of them, for ``depth``: "loss" takes one after the other the block without which the output moves
            least on some 4,000 calibration tokens; "influence" those that turn what they read least.
        rounds: of Gauss-Newton over an MLP's linears, those that make neurons and the one that reads them, from where
            the closed form for the latter leaves them. None is two where anything is fitted. 0 is much faster.

    Source: units and costs follow Hassibi & Stork, 1993 and ZipLM (Kurtic et al., 2023); the fit is the closed form
    that FLAP (An et al., 2024) approximates by a bias. Blocks: Song et al., SLEB, 2024; Men et al., ShortGPT, 2024.
    Channels: Ashkboos et al., SliceGPT, 2024.

    Example:
        >>> slim.compile(model, passes=[Prune(0.2)], calibration=texts)
        >>> slim.compile(model, passes=[Prune(depth=4), Prune(0.1)], calibration=texts)
    """

    ratio: float | None = None
    criterion: Literal["obs", "wanda", "flap", "taylor", "fisher", "magnitude", "random"] = "obs"
    units: Literal["both", "neurons", "heads", "query heads", "experts", "channels"] = "both"
    protect: tuple[str, ...] = ()
    multiple: int | None = None
    refit: bool | None = None
    bias: bool = False
    reload: bool = True
    scope: Literal["layer", "global"] = "layer"
    parameters: int | None = None
    bytes: int | None = None
    flops: int | None = None
    latency: float | None = None
    context: int = 512
    depth: int | float | None = None
    blocks: Literal["loss", "influence"] = "loss"
    rounds: int | None = None

    requires = frozenset({FLOAT_WEIGHTS, FLOAT_KV, KNOWN_HEADS, STATISTICS})

    def check(self) -> None:
        """Refuses shares that leave all or nothing, and options that nothing would read."""
        given = [name for name in _GOALS if getattr(self, name) is not None]
        if not given:
            self._refuse("ratio", f"how much is to go must be said: prune(0.2), or one of {', '.join(_GOALS[1:])}")
        if len(given) > 1:
            reason = "each says how much is to go; two passes, one after the other, do both"
            raise errors.ContradictoryOptions(a=f"{given[0]}=", b=f"{given[1]}=", reason=reason)
        for option, fault in faults(self):
            self._refuse(option, fault)
        if self.units == "channels":  # norms are folded, which would undo smoothing
            object.__setattr__(self, "requires", Prune.requires | {UNSMOOTHED})
        if self.scope == "global" and self.reload and self.depth is None:
            reason = "layers of different sizes are not what any configuration of transformers describes"
            raise errors.ContradictoryOptions(a='scope="global"', b="reload=True", reason=reason)

    @property
    def fits(self) -> bool:
        """Whether what is left is fitted."""
        return self.criterion == "obs" and self.units != "experts" if self.refit is None else self.refit

    @property
    def _goal(self) -> str:
        """The option that says how much is to go."""
        return next(name for name in _GOALS if getattr(self, name) is not None)

    def _refuse(self, option: str, reason: str) -> NoReturn:
        raise errors.BadPassOption(pass_name=self.name, option=option, reason=reason)

    def run(self, program: Program, ctx: Context) -> Report:
        """Changes the shapes of weights, what reads them, and ``facts.config``."""
        report = Report()
        self._check_protected(program)
        if self.depth is not None:
            self._shorten(program, ctx, report, self.depth)
            return report
        if self.units == "channels":
            self._narrow(program, ctx, report)
            return report
        kinds = _KINDS[self.units]
        found = Dependencies(program, "query" if self.units == "query heads" else "kv")
        sites, report.skipped = find_sites(program, found, self.protect, kinds)
        others = [
            site
            for site in find_sites(program, found, kinds=kinds)[0]
            if site.group not in {one.group for one in sites}
        ]
        if not sites:
            if not report.skipped:
                unknown = self.units == "experts" and any(program.nodes(EXPERTS))
                none = f"it has no {' or '.join(f'{kind}s' for kind in kinds)}"
                report.skipped.append(Skip("the graph", _UNKNOWN_CHOICE if unknown else none))
            return report
        self._check_multiple(sites)
        before = block_parameters(program)
        counts = self._counts(program, ctx, sites, report)
        sites = list(counts)
        result = self._pruned(program, ctx, counts, report)
        found.remove({site.group: units for site, units in result.gone.items() if len(units)})
        program.clean()
        report.matched = [str(site) for site, count in counts.items() if count]
        report.notes += list(_told(counts, result))
        report.notes += write_config(program, sites, others, counts)
        after = block_parameters(program)
        gone = before - after
        if before:
            report.notes.append(f"{gone:,} of the {before:,} parameters of blocks are gone, {gone / before:.1%}")
        return report

    def _check_protected(self, program: Program) -> None:
        """Refuses patterns that match nothing: a misspelt one would leave nothing alone."""
        facts = program.facts
        for pattern in self.protect:
            if not any(fnmatchcase(name, pattern) for name in (*program.weights, *facts.tied, *facts.bases)):
                self._refuse("protect", f"{literal(pattern)} matches no weight")

    def _check_multiple(self, sites: Sequence[Site]) -> None:
        """Refuses a multiple that leaves a site as it is: heads would have to make up for its neurons."""
        for site in sites:
            if self.multiple is not None and site.kind not in HEADS and self.multiple >= site.units:
                reason = f"{site} has {site.units} {site.kind}s, and no smaller number but 0 is divisible by"
                self._refuse("multiple", f"{reason} {self.multiple}")

    # -- whole blocks --------------------------------------------------------------------------------------------------

    def _shorten(self, program: Program, ctx: Context, report: Report, depth: int | float) -> None:
        every = find_blocks(program)
        if not every:
            report.skipped.append(Skip("the graph", "it repeats no block that one value alone leads into and out of"))
            return
        blocks, report.skipped = depths.may_go(every, self.protect)
        count = depth if isinstance(depth, int) else max(1, round(depth * len(every)))
        if count > min(len(blocks), len(every) - 1):
            held = f"{len(every) - len(blocks)} are protected" if report.skipped else "one at least is left"
            self._refuse("depth", f"{count} cannot go: of the model's {len(every)} blocks {held}")
        choose = depths.by_loss if self.blocks == "loss" else depths.by_influence
        gone = choose(program, blocks, count, calibration_of(program, ctx, repr(self)).batches, ctx)
        said = None if program.facts.config is None else depths.shortened(program, every, gone)
        before, told = program.parameters, {str(block): cost for block, cost in gone.items()}
        take_out(program, [block for block in every if block in gone])
        what = "the output is moved by" if self.blocks == "loss" else "influence"
        report.matched = list(told)
        report.notes += [f"{name} is gone: {what} {cost:.4f}" for name, cost in told.items()]
        report.notes.append(f"{len(every)} blocks to {len(every) - count}, {before - program.parameters:,} parameters")
        if isinstance(said, str):
            report.notes.append(f"the configuration cannot say so ({said}): slim saves it, transformers cannot hold it")
        elif said is not None:
            program.facts.config = said

    # -- channels ------------------------------------------------------------------------------------------------------

    def _narrow(self, program: Program, ctx: Context, report: Report) -> None:
        measure: Measure | None = next((name for name in _MEASURES if name == self._goal), None)
        if measure is not None:
            self._above(program, Prices(measure, Load.of(program, self.context)), report)
        tie = part(program)
        if tie is None:
            report.notes += untied(program)
        report.notes += FoldNorms().run(program, Context(progress=ctx.progress)).notes
        program.clean()
        narrowing = Narrowing(
            self.criterion, self.fits, self.reload, self.multiple, self.ratio, self.parameters, self.bytes, repr(self)
        )
        try:
            narrowing.run(program, tie, ctx, report)
        except NoStream as reason:
            self._refuse("units", f"the residual stream cannot be rotated: {reason}")
        except TooMuch:
            self._refuse(self._goal, "not so many channels of the residual stream can go: two at least must stay")
        except Unsaid:
            self._refuse("reload", _NARROW)

    # -- how many ------------------------------------------------------------------------------------------------------

    def _wanted(self, program: Program, ctx: Context, report: Report) -> tuple[Prices, float]:
        """What is counted, and how much of it is to go."""
        load = Load.of(program, self.context)
        if self.ratio is not None:
            prices = Prices("blocks", load)
            if not (held := prices.total(program)):
                self._refuse(
                    "ratio", "no linear lies between others, of which a share could go; parameters= counts all"
                )
            return prices, self.ratio * held
        measure: Measure = next(name for name in _MEASURES if name == self._goal)
        ctx.progress("measuring the machine", 0, 1)
        prices = Prices(measure, load, measure_machine() if measure == "latency" else None)
        return prices, self._above(program, prices, report)

    def _above(self, program: Program, prices: Prices, report: Report) -> float:
        """By how much the model is above what it may hold or cost."""
        most = getattr(self, prices.measure)
        try:
            held = prices.total(program)
        except TypeError as error:
            self._refuse(prices.measure, f"the cost of this model depends on more than its tokens: {error}")
        if held <= most:
            reason = f"the model is at {held:,.6g} {prices.unit} already, and may be at {most:,.6g}"
            self._refuse(prices.measure, reason)
        report.notes.append(f"{held:,.6g} {prices.unit} are to become {most:,.6g} at most")
        return float(held - most)

    def _counts(self, program: Program, ctx: Context, sites: list[Site], report: Report) -> Counts:
        prices, wanted = self._wanted(program, ctx, report)
        holding = prices.holding(program)
        sites = [holding.priced(site) for site in sites]
        budget = Budget(sites, wanted, holding.gone, self.multiple, partial(self._allowed, program))
        try:
            if self.scope == "global":
                return spread(self._costs(program, ctx, sites), wanted, holding.gone, self.multiple)
            ways = spaced(budget.ways()) if self.criterion == "obs" else [budget.level()]
        except TooMuch:
            rule = "a quarter of each site stays" if self.scope == "global" else budget.binding()
            self._too_much(program, sites, wanted, rule)
        if len(ways) == 1:
            return ways[0]
        statistics = self._collected(program, ctx, sites)
        most = {site: max(way[site] for way in ways) for site in sites}
        compared = Comparison(program, statistics, calibration_of(program, ctx, repr(self)).batches, most)
        return min(ctx.track("sharing the budget", ways), key=compared.loss)

    def _too_much(self, program: Program, sites: Sequence[Site], wanted: float, rule: str) -> NoReturn:
        held = sum(site.cost * site.units for site in sites)
        of = "" if self.ratio is None else f" of the {block_parameters(program):,} parameters of blocks"
        rule = "" if wanted > held else f"; {rule}"
        hold = "hold only" if wanted > held else "hold"
        reason = f"{_count(wanted)}{of} must go, and the units that can go {hold} {_count(held)}{rule}"
        self._refuse(self._goal, reason)

    def _costs(self, program: Program, ctx: Context, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """[units] of each: nats lost by the first 0, 1, 2, ... units that go."""
        known = self._known_scores(program, ctx, sites)
        if known is not None:
            return {site: by_scores(alone(scores)) for site, scores in known.items()}
        statistics = self._collected(program, ctx, sites)
        moments = output_moments(program, [site.linear for site in sites], ctx, asked_by=repr(self))
        return {site: by_surgeon(program, statistics, moments, site) for site in ctx.track("weighing units", sites)}

    def _allowed(self, program: Program, lost: Counts) -> bool:
        return not self.reload or can_say_heads(program, lost)

    def _collected(self, program: Program, ctx: Context, sites: Sequence[Site]) -> dict[fx.Node, SiteStatistics]:
        return collect(program, [site.value for site in sites], ctx, asked_by=repr(self), gram=True)

    # -- which ---------------------------------------------------------------------------------------------------------

    def _pruned(self, program: Program, ctx: Context, counts: Counts, report: Report) -> Result:
        """Chooses units, and fits what is left where that is asked for."""
        if self.units == "experts" and self.criterion == "obs":
            batches = calibration_of(program, ctx, repr(self)).batches
            return at_once(program, counts, experts.saliency(program, batches, list(counts), ctx).__getitem__)
        fits = self.fits
        known = self._known_scores(program, ctx, list(counts))
        if known is not None and not fits and not self.bias:
            return at_once(program, counts, known.__getitem__)
        rounds = _ROUNDS if self.rounds is None else self.rounds
        work = Work(self._choice(program, known), fits, self.bias or (self.criterion == "flap" and not fits), rounds)
        return work.run(program, counts, ctx, repr(self), report.notes)

    def _known_scores(self, program: Program, ctx: Context, sites: Sequence[Site]) -> dict[Site, Tensor] | None:
        """Scores, or slopes, that do not depend on what other sites lose; None where the criterion's do."""
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


def _count(value: float) -> str:
    """Parameters, bytes, FLOPs, or milliseconds, which may be few."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def _told(counts: Counts, result: Result) -> Iterator[str]:
    """A line a site."""
    for site, count in counts.items():
        lost = f"; measured: what reads them loses {result.missing[site]:.2%}" if site in result.missing else ""
        if count:
            yield f"{site}: {site.units} to {site.units - count} {site.kind}s{lost}"
