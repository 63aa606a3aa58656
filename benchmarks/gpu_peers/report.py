"""What a run found: rates, shares of what the device allows, goals, and all of it as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

WANTED = {"bf16": 0.85, "int8": 0.75, "int4": 0.65}  # share of copy bandwidth in decoding, one sequence, at 8B
WANTED_PREFILL = 0.70  # share of the matmul rate
PUBLISHED = {"bf16": 0.82, "int8": 0.63, "int4": 0.51}  # gpt-fast's README: A100-80GB, Llama-2-7B, groups of 32
RIVALS = ("torch.compile", "torchao")
DECODE, PREFILL = "decode", "prefill"
VISITS_LESS = ("window", "block_topk", "vertical_slash", "ring", "h2o")  # no share of a whole prompt's operations


@dataclass(frozen=True)
class Case:
    """What is timed: a step of ``batch`` sequences after ``prompt`` tokens, or the reading of a prompt."""

    kind: str
    batch: int
    prompt: int

    def __str__(self) -> str:
        return f"{self.kind} x {self.batch}" if self.kind == DECODE else f"{self.kind} of {self.prompt}"


@dataclass
class Row:
    """One engine in one case, a number a round.

    Attributes:
        run: when the run began; only rows of one run are held against each other.
        nbytes: of the matrices that a step reads.
        cached: bytes of keys and values that a step reads, in the middle of the steps timed.
        operations: to read the prompt.
        copy, matmul: what the device did at best just before: bytes and operations a second.
        seconds: of a step or of the prompt.
        peak: bytes of memory, weights included.
    """

    run: str
    shape: str
    peer: str
    format: str
    kind: str
    batch: int
    prompt: int
    nbytes: int
    cached: int
    operations: int
    copy: float
    matmul: float
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def name(self) -> str:
        return f"{self.peer} {self.format}"

    @property
    def case(self) -> Case:
        return Case(self.kind, self.batch, self.prompt)

    @property
    def best(self) -> float:
        return min(self.seconds)

    def rate(self, seconds: float) -> float:
        """Tokens a second, over all sequences."""
        return self.batch * (1 if self.kind == DECODE else self.prompt) / seconds

    @property
    def floor(self) -> float:
        """Seconds that the device needs at least, by its measured ceilings."""
        if self.kind == DECODE:
            return (self.nbytes + self.cached) / self.copy
        return self.operations / self.matmul

    @property
    def share(self) -> float:
        """Of the ceiling, in the best round."""
        return self.floor / self.best


@dataclass(frozen=True)
class Goal:
    """Something measured beside what it should be at least; None where it was not measured."""

    shape: str
    name: str
    measured: float | None
    wanted: float

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if self.measured >= self.wanted else "missed"


def goals(rows: list[Row]) -> list[Goal]:
    """All goals; those of the large model are named even where nothing measured them."""
    return [*_share_goals(rows), *_rival_goals(rows)]


def _share_goals(rows: list[Row]) -> Iterator[Goal]:
    ours = [row for row in rows if row.peer == "slim"]
    for form, wanted in WANTED.items():
        found = [row for row in ours if (row.shape, row.format, row.kind, row.batch) == ("8b", form, DECODE, 1)]
        yield Goal("8b", f"decode {form} x 1 / copy bandwidth", max((row.share for row in found), default=None), wanted)
    prefills = [row for row in ours if row.kind == PREFILL and row.format not in VISITS_LESS]
    for row in prefills:
        yield Goal(row.shape, f"{row.case} {row.format} / matmul rate", row.share, WANTED_PREFILL)
    if not any(row.shape == "8b" for row in prefills):
        yield Goal("8b", "prefill / matmul rate", None, WANTED_PREFILL)


def _rival_goals(rows: list[Row]) -> Iterator[Goal]:
    """slim against what torch.compile makes of the same format, and of bfloat16."""
    for row in rows:
        rival = best_rival(row, rows) if row.peer == "slim" else None
        if rival is not None:
            yield Goal(row.shape, f"{row.case} {row.format} / {rival.name}", rival.best / row.best, 1.0)


def best_rival(row: Row, rows: list[Row]) -> Row | None:
    """The fastest compiled peer in the same case of the same run; None where none was measured."""
    same = [
        other
        for other in rows
        if (other.run, other.shape, other.case) == (row.run, row.shape, row.case)
        and other.peer in RIVALS
        and other.format in ("bf16", row.format)
    ]
    return min(same, key=lambda other: other.best, default=None)


def as_data(row: Row) -> dict[str, Any]:
    """The row as the JSON file has it, with what a reader would compute first."""
    return asdict(row) | {"tokens a second": row.rate(row.best), "share": row.share}


def rows_of(data: dict[str, Any]) -> list[Row]:
    """The rows of a JSON file."""
    known = {each.name for each in fields(Row)}
    return [Row(**{name: value for name, value in row.items() if name in known}) for row in data["rows"]]


# -- text --------------------------------------------------------------------------------------------------------------


def tables(rows: list[Row]) -> Iterator[str]:
    """A heading and a table for every shape and case."""
    for shape in dict.fromkeys(row.shape for row in rows):
        here = [row for row in rows if row.shape == shape]
        for case in dict.fromkeys(row.case for row in here):
            yield f"### Llama {shape}: {case}"
            yield _table([row for row in here if row.case == case], here)


def _table(rows: list[Row], others: list[Row]) -> str:
    decodes = rows[0].kind == DECODE
    limit = "% of copy bandwidth" if decodes else "% of matmul rate"
    titles = ["engine", "tok/s", "median", "ms", "GB read" if decodes else "TFLOP", limit]
    if decodes and rows[0].batch == 1:
        titles.append("gpt-fast on A100, %")
    titles += ["x torch.compile", "peak GB", "rounds"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(_cells(row, others)) + " |" for row in rows]
    return "\n".join(lines)


def _cells(row: Row, others: list[Row]) -> list[str]:
    decodes = row.kind == DECODE
    moved = (row.nbytes + row.cached) / 1e9 if decodes else row.operations / 1e12
    cells = [row.name, _number(row.rate(row.best)), _number(row.rate(statistics.median(row.seconds)))]
    cells += [f"{1e3 * row.best:.3f}", f"{moved:.2f}", f"{100 * row.share:.0f}"]
    if decodes and row.batch == 1:
        cells.append(f"{100 * PUBLISHED[row.format]:.0f}" if row.format in PUBLISHED else "")
    rival = best_rival(row, others)
    cells.append("" if rival is None or rival is row else f"{rival.best / row.best:.2f}")
    return [*cells, f"{row.peak / 1e9:.2f}" if row.peak else "", str(len(row.seconds))]


def goal_table(found: list[Goal]) -> str:
    """The goals as a table in Markdown."""
    lines = ["| shape | goal | measured | at least | |", "|---|---|---|---|---|"]
    for goal in found:
        measured = "" if goal.measured is None else f"{goal.measured:.2f}"
        lines.append(f"| {goal.shape} | {goal.name} | {measured} | {goal.wanted:.2f} | {goal.verdict} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
