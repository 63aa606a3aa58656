"""Draws a run: tokens a second by engine, a chart a case and a line of charts a shape.

    python -m benchmarks.gpu_peers.picture results/gpu.json results/gpu.png

It wants matplotlib, which not every environment with PyTorch has, and imports no PyTorch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.gpu_peers.report import Row, rows_of
from benchmarks.peers.picture import LIMIT, OURS, THEIRS


def draw(rows: list[Row], about: str, path: Path) -> None:
    """Bars are best rounds; the line is what the measured bandwidth, or matmul rate, would allow."""
    mpl.rcParams["font.family"] = "DejaVu Sans"
    shapes = list(dict.fromkeys(row.shape for row in rows))
    cases = list(dict.fromkeys(row.case for row in rows))
    figure = Figure(figsize=(1.0 + 4.4 * len(cases), 0.7 + 3.0 * len(shapes)), layout="constrained")
    axes = figure.subplots(len(shapes), len(cases), squeeze=False)
    for line, shape in zip(axes, shapes, strict=True):
        for axis, case in zip(line, cases, strict=True):
            found = [row for row in rows if (row.shape, row.case) == (shape, case)]
            axis.set_title(f"Llama {shape.upper()}: {case}, tokens a second", loc="left", fontsize=9)
            _bars(axis, found)
    figure.suptitle(about, fontsize=9, color="#555555")
    figure.savefig(path, dpi=130)


def _bars(axis: Any, rows: list[Row]) -> None:
    if not rows:
        axis.set_axis_off()
        return
    places = range(len(rows))
    rates = [row.rate(row.best) for row in rows]
    limits = [row.rate(row.floor) for row in rows]
    widest = max([*rates, *limits])
    axis.barh(places, rates, color=[OURS if row.peer == "slim" else THEIRS for row in rows], height=0.68)
    axis.set_yticks(places, [row.name for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    for place, rate, limit in zip(places, rates, limits, strict=True):
        axis.text(rate + 0.01 * widest, place, f"{rate:,.0f}", va="center", fontsize=7)
        axis.vlines(limit, place - 0.42, place + 0.42, color=LIMIT, linewidth=1.6)
    axis.set_xlim(0, 1.15 * widest)


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    data = json.loads(source.read_text())
    about = f"{data['machine']['device']}, best of {data['options']['rounds']} rounds, {data['date'][:10]}"
    draw(rows_of(data), about, target)


if __name__ == "__main__":
    main()
