"""Charts that passes put into their reports: data first, and from it text for a terminal, or a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from slim import errors
from slim.errors.base import StrPath

Kind = Literal["bars", "lines"]

_BAR = 40  # columns for the longest bar
_SPARK = 60  # columns for a line
_EIGHTHS = " ▏▎▍▌▋▊▉"  # the end of a bar
_HEIGHTS = "▁▂▃▄▅▆▇█"
_INCHES = (7.0, 4.0)


@dataclass
class Chart:
    """A few series of numbers, one a layer or site, and how to draw them.

    Attributes:
        title, x_label, y_label: what they say in words; the unit belongs to ``y_label``.
        series: name -> numbers. Bars: one number for each of ``ticks``. Lines: any length, over 0, 1, 2, ...
        ticks: what each place along x is; numbers from 0 on where there are none.
        marks: series name -> a place along x to mark: the rank that was chosen in a spectrum, for instance.
        kind: "bars" or "lines".
        log: a logarithmic y axis, for lines; what is not above 0 is then drawn at the bottom.
        style: how numbers are written, as in f-strings: ".1%", ".3g".

    Example:
        >>> print(compiled.report.charts[0])
        >>> compiled.report.charts[0].save("losses.svg")
    """

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[float]]
    ticks: list[str] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)
    kind: Kind = "bars"
    log: bool = False
    style: str = ".3g"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise errors.BadInput(argument="kind", reason=f"{self.kind!r} is none of {', '.join(get_args(Kind))}")
        for name, values in self.series.items():
            if not all(map(math.isfinite, values)):
                raise errors.BadInput(argument="series", reason=f"{name} holds a number that is not finite")
            if self.kind == "bars" and len(values) != len(self.ticks):
                raise errors.BadInput(
                    argument="series", reason=f"{name} has {len(values)} numbers for {len(self.ticks)} ticks"
                )
        for name in self.marks:
            if name not in self.series:
                raise errors.BadInput(argument="marks", reason=f"{name} is no series")

    # -- as text ---------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        lines = self._bars() if self.kind == "bars" else self._lines()
        return "\n".join([f"{self.title} ({self.y_label} by {self.x_label})", *(line.rstrip() for line in lines)])

    def _bars(self) -> Iterator[str]:
        """A row for each tick and series: names, a bar, the number."""
        longest = max((value for values in self.series.values() for value in values), default=0.0)
        place, name = _width(self.ticks), _width(self.series)
        for index, tick in enumerate(self.ticks):
            for row, (title, values) in enumerate(self.series.items()):
                value = values[index]
                bar = _bar(value / longest if longest > 0.0 else 0.0)
                yield f"{tick if row == 0 else '':>{place}}  {title:<{name}}  {bar} {value:{self.style}}"

    def _lines(self) -> Iterator[str]:
        """A row for each series: its name, its course on an axis of its own, first and last number, and its mark."""
        name = _width(self.series)
        for title, values in self.series.items():
            if not values:
                continue
            ends = f"{values[0]:{self.style}} to {values[-1]:{self.style}}"
            marked = f", {self.x_label} {self._tick(self.marks[title])} marked" if title in self.marks else ""
            yield f"{title:<{name}}  {self._spark(values, self.marks.get(title))}  {ends}{marked}"

    def _spark(self, values: Sequence[float], mark: int | None) -> str:
        """One column for a few values each, by their mean; the mark stands before its own."""
        columns = min(len(values), _SPARK)
        cuts = [len(values) * column // columns for column in range(columns + 1)]
        drawn = _logs(values) if self.log else list(values)
        means = [sum(drawn[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
        low, high = min(means) if self.log else min(0.0, *means), max(means)
        steps = [(mean - low) / (high - low) if high > low else 0.0 for mean in means]
        line = [_HEIGHTS[round(step * (len(_HEIGHTS) - 1))] for step in steps]
        if mark is not None:
            line.insert(min(columns, mark * columns // len(values)), "|")
        return "".join(line)

    def _tick(self, place: int) -> str:
        return self.ticks[place] if place < len(self.ticks) else str(place)

    # -- as a picture ----------------------------------------------------------------------------------------------

    def save(self, path: StrPath) -> None:
        """Draws the chart into a file; the ending says in which format: .svg, .png, .pdf.

        Raises:
            MissingPackage: without matplotlib, which ``pip install 'slim-compiler[charts]'`` brings.
            BadInput: for an ending that matplotlib does not know.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise errors.MissingPackage(what="drawing a chart", package="matplotlib", extra="charts") from None
        figure = Figure(figsize=_INCHES, layout="constrained")  # not through pyplot, which keeps figures
        axes = figure.add_subplot(title=self.title, xlabel=self.x_label, ylabel=self.y_label)
        if self.kind == "bars":
            self._draw_bars(axes)
        else:
            self._draw_lines(axes)
        if self.series:
            axes.legend(fontsize="small", ncols=1 + len(self.series) // 12)
        known, ending = figure.canvas.get_supported_filetypes(), str(path).rpartition(".")[2].lower()
        if ending not in known:
            raise errors.BadInput(argument="path", reason=f"{path} ends in none of {', '.join(sorted(known))}")
        figure.savefig(path)

    def _draw_bars(self, axes: Any) -> None:
        width = 0.8 / max(len(self.series), 1)
        for row, (title, values) in enumerate(self.series.items()):
            shift = (row - (len(self.series) - 1) / 2) * width
            axes.bar([place + shift for place in range(len(values))], values, width, label=title)
        turned = 90 if _width(self.ticks) > 3 else 0
        axes.set_xticks(range(len(self.ticks)), self.ticks, rotation=turned)

    def _draw_lines(self, axes: Any) -> None:
        for title, values in self.series.items():
            (line,) = axes.plot(values, label=title)
            if title in self.marks:
                axes.axvline(self.marks[title], color=line.get_color(), linestyle=":")
        if self.ticks:
            axes.set_xticks(range(len(self.ticks)), self.ticks)
        if self.log:
            axes.set_yscale("log", nonpositive="clip")


def _width(names: Sequence[str] | dict[str, list[float]]) -> int:
    return max(map(len, names), default=0)


def _bar(share: float) -> str:
    """A bar of ``share`` of the longest, filled up with blanks."""
    eighths = round(max(share, 0.0) * _BAR * 8)
    whole, part = divmod(eighths, 8)
    return f"{'█' * whole + _EIGHTHS[part] * (part > 0):<{_BAR}}"


def _logs(values: Sequence[float]) -> list[float]:
    """Logarithms; what has none lies as low as the smallest that has."""
    floor = min((value for value in values if value > 0.0), default=1.0)
    return [math.log(max(value, floor)) for value in values]
