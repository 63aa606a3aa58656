"""Draws a run: decode and prefill by engine, a pair of charts a shape.

    python picture.py results/cpu.json results/cpu.png

It wants matplotlib, which slim does not, and so has an environment of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

OURS, THEIRS, LIMIT = "#d1495b", "#9aa5b1", "#2f4858"


def draw(run: dict[str, Any]) -> Figure:
    """Bars are best rounds; the line is what the bandwidth would allow the engine's own bytes."""
    shapes = list(dict.fromkeys(row["shape"] for row in run["rows"]))
    plain = {
        shape: [r for r in run["rows"] if r["shape"] == shape and (r["prompt"], r["batch"]) == (128, 1)]
        for shape in shapes
    }
    heights = [0.8 + 0.27 * len(plain[shape]) for shape in shapes]
    figure = Figure(figsize=(11, sum(heights) + 0.7), layout="constrained")
    axes = figure.subplots(len(shapes), 2, squeeze=False, height_ratios=heights)
    for index, shape in enumerate(shapes):
        bandwidth = run["bandwidth"][shape]["best"]
        _bars(axes[index][0], plain[shape], "decodes", bandwidth)
        _bars(axes[index][1], plain[shape], "prefills", None)
        axes[index][0].set_ylabel(f"Llama {shape.upper()}", fontsize=12, fontweight="bold")
    axes[0][0].set_title("decode, tokens a second", loc="left")
    axes[0][1].set_title("prefill of 128, tokens a second", loc="left")
    about = f"{run['machine']['processor']}, {run['threads']} threads, batch 1, best of {run['rounds']}, {run['date']}"
    figure.suptitle(about, fontsize=9, color="#555555")
    return figure


def _bars(axis: Any, rows: list[dict[str, Any]], field: str, bandwidth: float | None) -> None:
    rates = [max(row[field]) for row in rows]
    colours = [OURS if row["engine"].startswith("slim") else THEIRS for row in rows]
    places = range(len(rows))
    axis.barh(places, rates, color=colours, height=0.68)
    axis.set_yticks(places, [row["engine"] for row in rows], fontsize=9)
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    limits = [1e9 * bandwidth / row["nbytes"] for row in rows] if bandwidth else []
    widest = max([*rates, *limits])
    for place, rate in zip(places, rates, strict=True):
        text = f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
        axis.text(rate + 0.01 * widest, place, text, va="center", fontsize=8)
    for place, limit in zip(places, limits, strict=False):
        label = "read bandwidth" if place == 0 else None
        axis.vlines(limit, place - 0.42, place + 0.42, color=LIMIT, linewidth=1.6, label=label)
    if limits:
        axis.legend(loc="lower right", fontsize=8, frameon=False)
    axis.set_xlim(0, 1.12 * widest)


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    mpl.rcParams["font.family"] = "DejaVu Sans"
    draw(json.loads(source.read_text())).savefig(target, dpi=130)


if __name__ == "__main__":
    main()
