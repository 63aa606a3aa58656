"""Statistics of activations: one collector that serves every pass.

``collect`` sums up what enters some linears of a Program as it is. ``walk`` does the same stretch by stretch and lets
the caller rewrite each before it goes on, so that later statistics are those of the model as changed so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from slim import errors
from slim.compiler.passes_base import STATISTICS, Context
from slim.compiler.program import Program
from slim.compiler.report import short_bytes
from slim.compiler.statistics.accumulate import SiteStatistics, Wanted
from slim.compiler.statistics.batches import MOST, Calibration, read_calibration
from slim.compiler.statistics.segments import Grain, readers
from slim.compiler.statistics.walk import Block, Passed, Walk

__all__ = ["Block", "Grain", "Passed", "SiteStatistics", "calibration_of", "collect", "readers", "site_values", "walk"]

_BATCHES = "calibration batches"


def calibration_of(program: Program, ctx: Context, asked_by: str, most: int = MOST) -> Calibration:
    """The user's calibration data as batches for ``program``; read once for a pipeline.

    Args:
        most: tokens of text that are wanted; for more than is usual, texts are read again.

    Raises:
        NeedsCalibration: where the user gave none. BadInput and others: see ``read_calibration``.
    """
    if ctx.calibration is None:
        raise errors.NeedsCalibration(pass_name=asked_by)
    if ctx.batches is None:
        ctx.batches = read_calibration(program, ctx.calibration)
    found: Calibration = ctx.batches
    texts = isinstance(ctx.calibration, Sequence) and all(isinstance(item, str) for item in ctx.calibration)
    return read_calibration(program, ctx.calibration, most) if texts and most > MOST else found


def site_values(linears: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes whose rows enter ``linears``, each once: q, k and v share one."""
    return list(dict.fromkeys(linear.args[0] for linear in linears if isinstance(linear.args[0], fx.Node)))


def collect(
    program: Program,
    values: Sequence[fx.Node],
    ctx: Context,
    *,
    asked_by: str,
    gram: bool = False,
    rows: int = 0,
    notes: list[str] | None = None,
) -> dict[fx.Node, SiteStatistics]:
    """Statistics of every site over the calibration data, which the Program is run on once, stretch by stretch.

    What an earlier pass of the pipeline collected, and nothing has made untrue, is not collected again.

    Args:
        values: the sites: nodes whose rows enter linears; see ``site_values``.
        asked_by: the pass with its options, its repr: for messages, progress, and to know its own checkpoint again.
        gram: whether E[x x^T] is needed.
        rows: how many sampled rows are needed.
        notes: takes what the user should know: how much data there was, and the memory it took.

    Raises:
        NeedsCalibration, NonFiniteActivation, BadInput.
    """
    cache: dict[str, SiteStatistics] = ctx.collected.setdefault(STATISTICS, {})
    missing = [value for value in values if not _serves(cache.get(value.name), gram, rows)]
    if missing:
        for block in walk(program, missing, ctx, asked_by=asked_by, gram=gram, rows=rows, changes=False, notes=notes):
            for value in block.values:
                if not block.restored:
                    block.results |= block.statistics[value].tensors(value.name)
                cache[value.name] = SiteStatistics.of(block.results, value.name)
    return {value: cache[value.name] for value in values}


def _serves(held: SiteStatistics | None, gram: bool, rows: int) -> bool:
    if held is None or (gram and held.gram is None):
        return False
    return rows == 0 or (held.rows is not None and len(held.rows) >= min(rows, held.count))


def walk(
    program: Program,
    values: Sequence[fx.Node],
    ctx: Context,
    *,
    asked_by: str,
    gram: bool = False,
    rows: int = 0,
    cross: bool = False,
    dense: bool = False,
    meant: Program | None = None,
    grain: Grain = "block",
    changes: bool = True,
    beside: Mapping[fx.Node, Sequence[fx.Node]] | None = None,
    makers: Mapping[fx.Node, fx.Node] | None = None,
    whole: Mapping[fx.Node, Sequence[fx.Node]] | None = None,
    notes: list[str] | None = None,
) -> Iterator[Block]:
    """Yields the sites of ``program``, in order, a stretch at a time, with their statistics.

    The caller may rewrite what lies between a Block's values and the next stretch before it asks for the next Block:
    the statistics of that one are then those of the Program as rewritten so far.

    Args:
        asked_by, gram, rows: as ``collect`` has them.
        cross: whether E[x_dense x^T] is needed, with x_dense what entered the site before anything was changed; the
            model is then run twice side by side.
        dense: whether the moments of x_dense themselves are needed too; beside cross.
        meant: a copy of the Program from before something was changed, that x_dense are to come from; implies cross.
        grain: "block": a stretch a transformer block. "site": a stretch a site, so that k sees what became of q.
        changes: False promises that nothing is rewritten, and saves running each stretch again.
        beside: of sites, values with as many rows, made before the site's. What they have lost, their sum before
            anything was changed less what it is now, goes on as further features of x_dense; needs cross.
        makers: of sites, the first linear that they are made by, which may be rewritten as what lies behind may. Rows
            are sampled of these sites alone, and each holds what that linear reads now and, behind it, the same row
            of x_dense; needs cross. No other site lies between.
        whole: of sites, values of their stretch that are kept as they are, of all batches; needs cross.

    Example:
        >>> for block in walk(program, values, ctx, asked_by="quantize", gram=True):
        ...     for value, statistics in block.statistics.items():
        ...         for linear in readers(value): ...
    """
    calibration = calibration_of(program, ctx, asked_by)
    wanted = Wanted(gram=gram, rows=rows, cross=cross or meant is not None, dense=dense)
    label = f"{asked_by}: calibrating"
    run = Walk(program, list(values), ctx, calibration, wanted, grain, changes, label, meant, beside, makers, whole)
    yield from run
    if notes is not None:
        notes += calibration.notes
        amount = f"{calibration.tokens:,} calibration tokens, {short_bytes(run.peak)} held at most"
        notes.append(amount)
