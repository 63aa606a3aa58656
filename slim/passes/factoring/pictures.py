"""What lower ranks lose, as charts for the report."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slim.compiler.charts import Chart
from slim.passes.factoring.sites import Site

_POINTS = 50  # steps of a spectrum, whatever the rank: a report is no place for thousands of numbers a matrix


def charts(sites: Sequence[Site]) -> list[Chart]:
    """Predicted and measured losses of factored matrices, and their spectra; none where nothing was predicted."""
    told = [site for site in sites if site.predicted is not None and site.measured is not None]
    if not told:
        return []
    losses = {
        "predicted": [site.predicted or 0.0 for site in told],
        "measured": [site.measured or 0.0 for site in told],
    }
    title = "What lower ranks lose"
    bars = Chart(title, "matrix", "share of the results", losses, [site.name for site in told], style=".2%")
    drawn = [site for site in told if site.lost is not None]
    series = {site.name: _steps(site.lost) for site in drawn if site.lost is not None}
    marks = {site.name: round(_POINTS * (site.rank or 0) / min(site.shape)) for site in drawn}
    of = f"rank, in {_POINTS}ths of the full one"
    lines = Chart(
        "What each rank would lose; the chosen one is marked", of, "share of the results", series, marks=marks,
        kind="lines", style=".2%",
    )  # fmt: skip
    return [bars, lines]


def _steps(lost: Tensor) -> list[float]:
    """The share that is lost at each step from rank 0 to the full one."""
    last = len(lost) - 1
    whole = float(lost[0])
    return [float(lost[round(step * last / _POINTS)]) / whole if whole else 0.0 for step in range(_POINTS + 1)]
