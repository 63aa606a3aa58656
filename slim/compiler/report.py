"""What a pipeline did, as data, as JSON, and as a table that people can read."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from slim import errors
from slim.compiler.charts import Chart
from slim.compiler.difference import AllGone, Changes, Gone, Names
from slim.compiler.near import near_misses
from slim.compiler.program import Program
from slim.compiler.rules import Count, Counts

VERSION = 1


class Skip(NamedTuple):
    """A place that a pass looked at and left alone."""

    site: str
    reason: str


@dataclass(frozen=True)
class Size:
    """How large a Program is."""

    nodes: int
    parameters: int
    nbytes: int

    @classmethod
    def of(cls, program: Program) -> Size:
        return cls(len(program.graph.nodes), program.parameters, program.nbytes)


@dataclass
class Report:
    """What one pass did. The pass fills in the first five; the pipeline measures the others.

    Attributes:
        matched: the sites it changed, by the name of a weight or node.
        skipped: the sites it left alone, each with the reason.
        notes: what else the user should know.
        charts: what is easier seen than read: losses of layers, spectra.
        rules: how often each rewrite rule was tried and matched.
        text: the pass as pipeline text.
        lossless: it promised the same function.
        before, after: the Program's size around it.
        seconds: stage ("run", "verify", "probe") -> time.
        error: how far the probe's output moved, against the Program before it; see Probe.
        drift: the same against the lifted Program.
        changes: the nodes and weights that it made, changed and removed, by name.
        gone: what those that it removed were.
    """

    matched: list[str] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    rules: Counts = field(default_factory=dict)
    text: str = ""
    lossless: bool = False
    before: Size | None = None
    after: Size | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    drift: float | None = None
    changes: Changes = field(default_factory=Changes)
    gone: AllGone = field(default_factory=AllGone)

    @property
    def tried(self) -> int:
        return len(self.matched) + len(self.skipped)


@dataclass
class Form:
    """One executable that was made of the Program: the whole of it, or a step over a cache.

    Attributes:
        regions: kernels that a call runs; 0 where nothing was generated.
        kernels: different ones among them.
        segments: stretches of generated code, with PyTorch between them.
        foreign: nodes that PyTorch runs, each with the reason.
        seconds: what making it took, compilation included.
    """

    regions: int = 0
    kernels: int = 0
    segments: int = 0
    foreign: list[Skip] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class PipelineReport:
    """What became of a model on its way: one Report a pass, and the seconds of the stages around them.

    Attributes:
        passes: what each pass did.
        seconds: stage ("lift", "probe", "lower", "check": what the target computes of the probe) -> time.
        notes: what the lift wants the user to know.
        rules: how often each rule of the lift was tried and matched, and where it just missed.
        target: what the Program was lowered to.
        forms: the executables made so far, by name; those over a cache come when they are first used.
        error: how far the target's output is from the Program's own on the probe, relative to its largest; of
            quantised weights this is the rounding of activations that their kernels do. None where nothing was probed.

    Example:
        >>> print(compiled.report)
    """

    passes: list[Report] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rules: Counts = field(default_factory=dict)
    target: str = ""
    forms: dict[str, Form] = field(default_factory=dict)
    error: float | None = None

    @property
    def charts(self) -> list[Chart]:
        """The charts of all passes."""
        return [chart for item in self.passes for chart in item.charts]

    def rules_table(self) -> str:
        """The rewrite rules of the lift and of each pass, a line each: how often it matched, and was tried."""
        stages = [("the lift", self.rules), *((item.text, item.rules) for item in self.passes)]
        return "\n".join(line for stage, rules in stages for line in _rules(stage, rules))

    def to_json(self) -> str:
        """One JSON document that ``from_json`` reads back as an equal report."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> PipelineReport:
        """Raises ArtifactVersion where ``text`` was written in another format."""
        data = json.loads(text)
        found = data.pop("version", None)
        if found != VERSION:
            raise errors.ArtifactVersion(path="report.json", found=found, expected=VERSION)
        forms = {name: _form(item) for name, item in data.pop("forms", {}).items()}
        passes = [_report(item) for item in data.pop("passes")]
        return cls(passes=passes, rules=_counts(data.pop("rules")), forms=forms, **data)

    def __str__(self) -> str:
        return "\n".join([*_table(self), *_remarks(self)])

    def _repr_html_(self) -> str:
        """For notebooks."""
        from slim.compiler.notebook import report_html

        return report_html(self)


def _counts(data: dict[str, Any]) -> Counts:
    return {name: Count(**count) for name, count in data.items()}


def _form(data: dict[str, Any]) -> Form:
    return Form(**{**data, "foreign": [Skip(*pair) for pair in data["foreign"]]})


def _changes(data: dict[str, Any]) -> Changes:
    return Changes(**{kind: Names(**names) for kind, names in data.items()})


def _gone(data: dict[str, Any]) -> AllGone:
    return AllGone(**{kind: {name: _known(item) for name, item in items.items()} for kind, items in data.items()})


def _known(data: dict[str, Any]) -> Gone:
    return Gone(**{**data, "origins": [(module, place) for module, place in data["origins"]]})


def _report(data: dict[str, Any]) -> Report:
    return Report(
        **{
            **data,
            "skipped": [Skip(*pair) for pair in data["skipped"]],
            "charts": [Chart(**chart) for chart in data.get("charts", [])],  # reports from before there were any
            "rules": _counts(data["rules"]),
            "changes": _changes(data.get("changes", {})),  # likewise
            "gone": _gone(data.get("gone", {})),
            "before": data["before"] and Size(**data["before"]),
            "after": data["after"] and Size(**data["after"]),
        }
    )


# -- for people --------------------------------------------------------------------------------------------------------

COLUMNS = ("pass", "sites", "rules", "nodes", "parameters", "bytes", "output\nmoved", "since\nlift", "ms")
_WIDTH, _LONGEST_WORD = 100, 48  # of the table, where that is enough; in the first column, without a break
_ALIKE = 3  # further notes of one form that are still printed


def _table(report: PipelineReport) -> Iterator[str]:
    """A line for the model as it came, then one a pass with the sizes after it."""
    if not report.passes:
        rules = matched_of_tried(report.rules)
        said = [f"ms: {_spent(report.seconds)}"] * bool(report.seconds) + [f"rules of the lift: {rules}"] * bool(rules)
        yield f"no passes ({'; '.join(said)})" if said else "no passes"
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    rows = list(table_rows(report))
    word = min(_LONGEST_WORD, max(len(word) for row in rows for word in row[0].split()))
    for index, column in enumerate(COLUMNS):
        first = index == 0
        table.add_column(
            column, justify="left" if first else "right", no_wrap=not first, overflow="fold", min_width=word * first
        )
    for row in rows:
        table.add_row(*row)
    page = io.StringIO()
    width = max(_WIDTH, word + 1 + _numbers_width(rows))
    Console(file=page, width=width, color_system=None, highlight=False, markup=False).print(table)
    yield from (line.rstrip() for line in page.getvalue().strip("\n").splitlines())
    around = {stage: value for stage, value in report.seconds.items() if stage != "lift"}
    if around:
        yield f"ms around the passes: {_spent(around)}"


def _numbers_width(rows: list[tuple[str, ...]]) -> int:
    """Characters of all columns but the first, and what is between them."""
    columns = [[*column.split("\n"), *(row[i] for row in rows)] for i, column in enumerate(COLUMNS)]
    return sum(2 + max(map(len, column)) for column in columns[1:])


def table_rows(report: PipelineReport) -> Iterator[tuple[str, ...]]:
    """The cells below COLUMNS: the model as it came, then each pass with the sizes after it."""
    if report.passes:
        spent = _milliseconds(report.seconds["lift"]) if "lift" in report.seconds else ""
        rules = matched_of_tried(report.rules)
        yield "(as lifted)", "", rules, *_sizes(report.passes[0].before), "", "", spent
    yield from map(_row, report.passes)


def _row(item: Report) -> tuple[str, ...]:
    sites = f"{len(item.matched)} of {item.tried}"
    spent = _milliseconds(sum(item.seconds.values()))
    rules = matched_of_tried(item.rules)
    return item.text, sites, rules, *_sizes(item.after), _moved(item.error), _moved(item.drift), spent


def matched_of_tried(rules: Counts) -> str:
    """ "38 of 971" of all rules together; empty where none was tried."""
    tried = sum(count.tried for count in rules.values())
    return f"{sum(count.matched for count in rules.values()):,} of {tried:,}" if tried else ""


def _rules(stage: str, rules: Counts) -> Iterator[str]:
    """A title, then the tried rules, the busiest first."""
    tried = {name: count for name, count in rules.items() if count.tried}
    if tried:
        yield f"{'matched':>7} {'tried':>7}  rules of {stage}"
    for name, count in sorted(tried.items(), key=lambda item: -item[1].matched):
        yield f"{count.matched:>7,} {count.tried:>7,}  {name}"


def _sizes(size: Size | None) -> tuple[str, str, str]:
    return ("", "", "") if size is None else (f"{size.nodes:,}", short_count(size.parameters), short_bytes(size.nbytes))


def _moved(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def _spent(seconds: dict[str, float]) -> str:
    return ", ".join(f"{stage} {_milliseconds(value)}" for stage, value in seconds.items())


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}"


def _remarks(report: PipelineReport) -> Iterator[str]:
    yield from (f"note: {note}" for note in report.notes)
    yield from near_misses(report.rules)
    yield from _lowered(report)
    for index, item in enumerate(report.passes):
        yield from (f"{item.text}: {note}" for note in _folded(item.notes, f"report.passes[{index}].notes"))
        yield from (f"{item.text}: {miss}" for miss in near_misses(item.rules))
        yield from (f"{item.text} left {sites}: {reason}" for sites, reason in by_reason(item.skipped))


def _folded(notes: list[str], place: str) -> Iterator[str]:
    """Notes in their order; of many that differ in names and numbers alone, the first and how many more there are."""
    for _, alike in itertools.groupby(notes, key=_form_of):
        first, *rest = alike
        yield first
        if len(rest) < _ALIKE:
            yield from rest
        else:
            yield f"and {len(rest)} more such lines in {place}"


def _form_of(note: str) -> str:
    """What is left of a note without names of weights and numbers."""
    return re.sub(r"(# ?)+", "#", re.sub(r"\S*[\d.]\S+|\d", "#", note))


def by_reason(skips: list[Skip]) -> Iterator[tuple[str, str]]:
    """(the first sites in words, their common reason)."""
    found: dict[str, list[str]] = defaultdict(list)
    for site, reason in skips:
        found[reason].append(site)
    for reason, sites in found.items():
        yield ", ".join(sites[:3]) + (f" and {len(sites) - 3} more" if len(sites) > 3 else ""), reason


def _lowered(report: PipelineReport) -> Iterator[str]:
    """What was generated, and what PyTorch runs in between."""
    for name, form in report.forms.items():
        if form.regions == 0:
            continue
        parts = f"in {form.segments} segment{'s' * (form.segments != 1)}" if form.foreign else "in one piece"
        made = f"{form.regions} regions by {form.kernels} kernels"
        yield f"{report.target}: {name} runs {made}, {parts} ({form.seconds:.1f} s)"
    yield from left_to_pytorch(report)
    if report.error is not None:
        yield f"{report.target}: the probe's output is off by {report.error:.1e} of its largest"


def left_to_pytorch(report: PipelineReport) -> Iterator[str]:
    """What no code was generated for, and why."""
    for name, form in report.forms.items():
        for sites, reason in by_reason(form.foreign):
            yield f"{report.target}: {name} leaves {sites} to PyTorch: {reason}"


def short_count(number: int) -> str:
    """1,236,000,000 -> 1.24B; small numbers whole."""
    for size, suffix in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.2f}{suffix}"
    return f"{number:,}"


def short_bytes(number: int) -> str:
    """1,500,000 -> 1.50 MB (powers of ten)."""
    for size, suffix in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= size:
            return f"{number / size:.2f} {suffix}"
    return f"{number} B"
