"""Replaces linears by two smaller ones: fewer numbers to hold and to read, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from slim import errors
from slim.compiler.passes_base import FLOAT_WEIGHTS, STATISTICS, WHOLE_WEIGHTS, Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report, Skip, short_count
from slim.compiler.selection import Choice
from slim.compiler.statistics import calibration_of
from slim.passes.factoring.forms import Storage
from slim.passes.factoring.pictures import charts
from slim.passes.factoring.ranks import Budget, Group, chosen_ranks, share
from slim.passes.factoring.sites import Linear, Site, Table, by_rows, find_sites
from slim.passes.factoring.tables import factor_tables
from slim.passes.factoring.work import factor, factor_as_published, spectra, weigh


@dataclass(frozen=True)
class LowRank(Pass):
    """Holds the weights of linears as matrices of lower rank, in fewer numbers.

    A linear y = W x + b becomes one of the r directions of its results that matter most, and what makes all results
    of these. Directions are the eigenvectors of K^T W C W^T K, where C are the second moments of x (about their mean,
    if there is a bias to take it up) and S = K K^T those of the gradients of the model's result by y: of all matrices
    of rank r theirs is the one that costs the model least, as far as x and gradients are independent. How many each
    linear keeps is settled for all of them at once, under one budget, by what the last number that it holds undoes.
    Linears are replaced one after the other, each fitted by least squares to what it returned in the original, on what
    its input has become by then.

    Shapes: W [m, n] of rank r becomes r of its rows, ``<name>_pivots`` [r, n], and the coefficients that make the other
    rows of these, ``<name>_rest`` [m - r, r]: r (m + n - r) numbers, and ``<name>_order`` [m] puts results in order.
    Linears that read the same rows (q, k and v; gate and up) become one matrix where that loses less.
    ``storage="factors"`` holds ``<name>_inner`` [r, n] and ``<name>_outer`` [m, r]: r (m + n). What the Program takes
    and returns, and its configuration, stay as they are; plain transformers cannot hold the result.

    A linear is left alone, and the report says why, where its results are worth more than the numbers that a lower
    rank would save, and where it is a stack of experts, a router, or read at several places.

    Args:
        keep: the share, in (0, 1), of their numbers that the chosen linears hold in sum, what orders results included.
        method: "whitened" is the above. Baselines, each with the same share for every linear and nothing fitted:
            "svd_llm" takes the same directions without S, "asvd" scales columns by the root of their inputs' mean
            magnitude, "svd" sees the weights alone, and needs no calibration.
        storage: "pivot" or "factors"; None is "pivot" for "whitened", and "factors", as published, for the others.
        importance: "fisher" takes S from gradients on the calibration data (one backward pass, with the model's
            weights and what one sequence leaves in memory); "none" is S = 1 and the same share for every linear. None
            is "fisher" for "whitened".
        multiple: what ranks are multiples of; None is 32 for matrices of 256 rows and columns or more, less for
            smaller ones, and 1 where every linear holds the same share.
        least_saving: the share of its numbers that a linear must save; others stay as they are, for a second product
            takes time too: of a tenth less no decoding gets faster (docs/low_rank.md).
        head: factor the head of a language model too. One that is tied to the embedding takes the embedding with it.
        embeddings: factor tables of embeddings too, as rows of r numbers [V, r] and what widens them [n, r]. Errors of
            a row count as often as it is looked up in the calibration data.
        exclude: patterns of weight names to leave alone (``"*.down_proj.weight"``); each must match one.

    Sources: the directions: Wang et al., SVD-LLM, 2024, without its inverse; rows and coefficients: Zhao et al., PIFA,
    2025; S: Martens and Grosse, K-FAC, 2015. Their combination is this project's own (docs/low_rank.md). ASVD: Yuan et
    al., 2023.

    Example:
        >>> slim.compile(model, passes=[LowRank(0.8)], calibration=texts)
    """

    keep: float
    method: Literal["whitened", "svd_llm", "asvd", "svd"] = "whitened"
    storage: Literal["pivot", "factors"] | None = None
    importance: Literal["fisher", "none"] | None = None
    multiple: int | None = None
    least_saving: float = 0.1
    head: bool = False
    embeddings: bool = False
    exclude: tuple[str, ...] = ()

    requires = frozenset({FLOAT_WEIGHTS, STATISTICS})
    invalidates = frozenset({WHOLE_WEIGHTS})

    def check(self) -> None:
        """Refuses options that mean nothing, alone or together."""
        if not 0.0 < self.keep < 1.0:
            self._refuse("keep", f"a share of the numbers lies between 0 and 1, and {self.keep} does not")
        if self.multiple is not None and self.multiple < 1:
            self._refuse("multiple", f"no rank is a multiple of {self.multiple}")
        if not 0.0 <= self.least_saving < 1.0:
            self._refuse("least_saving", f"a share lies between 0 and 1, and {self.least_saving} does not")
        if self.importance == "fisher" and self._published:
            raise errors.ContradictoryOptions(
                a=f'method="{self.method}"', b='importance="fisher"', reason="the published methods weigh no results"
            )
        if self.embeddings and self._even:
            self._refuse_tables("embeddings=True")

    def _refuse(self, option: str, reason: str) -> NoReturn:
        raise errors.BadPassOption(pass_name=self.name, option=option, reason=reason)

    def _refuse_tables(self, asked: str) -> NoReturn:
        even = f'method="{self.method}"' if self._published else 'importance="none"'
        raise errors.ContradictoryOptions(a=asked, b=even, reason="tables are weighed by gradients")

    @property
    def _published(self) -> bool:
        return self.method != "whitened"

    @property
    def _even(self) -> bool:
        """Whether every linear holds the same share."""
        return self._published or self.importance == "none"

    @property
    def _storage(self) -> Storage:
        return self.storage or ("factors" if self._published else "pivot")

    def run(self, program: Program, ctx: Context) -> Report:
        """Replaces linears, and the weights that they read."""
        report = Report()
        multiple = 1 if self._even and self.multiple is None else self.multiple
        budget = Budget(self.keep, self._storage, multiple, self.least_saving)
        choice = Choice(self.name, self.embeddings, self.head or None, self.exclude)
        sites = list(find_sites(program, choice, report, multiple))
        sites = self._with_ranks(program, ctx, sites, budget) if sites else []
        chosen = [site for site in sites if site.rank is not None]
        report.notes += self._few(program, ctx, chosen)
        for site in sites:
            if site.rank is None:
                report.skipped += [Skip(linear.name, self._whole(site, budget)) for linear in site.linears]
        if chosen and self.method == "whitened":
            self._factor(program, ctx, chosen, report)
        elif chosen:
            factor_as_published(program, ctx, chosen, self._storage, self.method, repr(self), report)
        report.matched += [linear.name for site in chosen for linear in site.linears]
        program.facts.replaced |= dict.fromkeys(report.matched, repr(self))
        report.notes += [str(site) for site in chosen]
        report.notes += [self._held(sites)] if chosen else []
        report.charts = charts(chosen)
        return report

    def _factor(self, program: Program, ctx: Context, chosen: Sequence[Site], report: Report) -> None:
        """Replaces tables, which all else comes behind, and then linears by what their rows have become."""
        tables = [site for site in chosen if isinstance(site, Table)]
        meant = program.copy() if tables else None
        factor_tables(program, tables, report)
        linears = [site for site in chosen if site not in tables]
        if linears:
            factor(program, ctx, linears, self._storage, repr(self), report, meant)

    def _with_ranks(self, program: Program, ctx: Context, alone: list[Site], budget: Budget) -> list[Site]:
        """Every linear in a site with its rank, or None, and with what it will lose, where that is known."""
        tables = [site for site in alone if isinstance(site, Table)]
        if tables and self._even:
            self._refuse_tables(f"head=True (it is the table {tables[0].name} too)")
        if self._published:
            for site in alone:
                site.rank = budget.even(site)
            return alone
        whole = [site for site in alone if not budget.ranks(site)]
        alone = [site for site in alone if site not in whole]
        if not alone:
            return whole
        tables = [site for site in tables if site in alone]
        linears = [site.linears[0] for site in alone if site not in tables]
        if not self._even:
            weigh(program, ctx, linears, tables, repr(self))
        groups = [Group([Site((linear,))], None) for linear in linears] if self._even else _groups(linears)
        lost = spectra(program, ctx, [site for group in groups for site in group.sites], repr(self))
        lost |= {table.name: table.lost for table in tables if table.lost is not None}
        groups += [Group([table], None) for table in tables]
        apart = [site for group in groups for site in group.apart]
        plan = [(site, budget.even(site)) for site in apart] if self._even else chosen_ranks(groups, lost, budget)
        if plan is None:
            least = sum(budget.least(site) for site in apart) / sum(site.size for site in apart)
            self._refuse("keep", f"even the smallest ranks hold {least:.1%} of the numbers")
        for site, rank in plan:
            site.rank, site.predicted = rank, None if rank is None else share(lost[site.name], rank)
            site.lost = lost[site.name]
        return [*whole, *(site for site, _ in plan)]

    def _few(self, program: Program, ctx: Context, sites: Sequence[Site]) -> list[str]:
        """A note where there are fewer rows than a matrix has columns: nothing is known of the other directions."""
        widest = max((site.shape[1] for site in sites), default=0)
        if self.method == "svd" or not sites:
            return []
        tokens = calibration_of(program, ctx, repr(self)).tokens
        few = f"{tokens:,} calibration tokens are fewer than the {widest:,} columns of the widest matrix"
        return [] if tokens >= widest else [f"{few}: what is predicted to be lost says little, more data help"]

    def _whole(self, site: Site, budget: Budget) -> str:
        """Why a linear is not factored."""
        if not budget.ranks(site):
            return f"no rank saves {self.least_saving:.0%} of its numbers, and with fewer saved it would run no faster"
        if self._even:
            return f"its smallest rank holds more than {self.keep:.1%} of its numbers"
        return "its results are worth more than the numbers of a lower rank would save"

    def _held(self, sites: Sequence[Site]) -> str:
        """How much of the budget is used."""
        held, whole = sum(site.cost(self._storage, site.rank) for site in sites), sum(site.size for site in sites)
        return f"the linears hold {short_count(held)} numbers of {short_count(whole)}: {held / whole:.2%}"


def _groups(linears: Sequence[Linear]) -> list[Group]:
    """Linears that read the same rows, each on its own and all as one."""
    return [
        Group([Site((linear,)) for linear in found], Site(tuple(found)) if len(found) > 1 else None)
        for found in by_rows(linears)
    ]
