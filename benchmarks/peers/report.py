"""What a run found: rates, the table, and the goals, from the rows that the JSON file holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.random_llama import SHAPES

INT8_PEERS = ("llama.cpp q8_0", "ORT-genai int8", "CTranslate2 int8", "torchao int8")
INT4_PEERS = ("llama.cpp q4_0", "ORT-genai int4")
COMPILE = ("torch.compile f32", "torch.compile bf16")


@dataclass
class Row:
    """One engine in one case: tokens a second, a number a round.

    Attributes:
        nbytes: of the matrices that a new token reads.
        tokens: the first ones it wrote, in the last round.
    """

    shape: str
    engine: str
    prompt: int
    batch: int
    nbytes: int
    prefills: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, answer: dict[str, Any]) -> None:
        """A round, as a worker answers it."""
        self.prefills.append(self.batch * self.prompt / answer["prefill"])
        self.decodes.append(self.batch * len(answer["decode"]) / sum(answer["decode"]))
        self.tokens = answer["tokens"][:8]

    @property
    def prefill(self) -> float:
        return max(self.prefills)

    @property
    def decode(self) -> float:
        return max(self.decodes)

    @property
    def read(self) -> float:
        """GB/s of stored matrices in the best round of decoding."""
        return self.nbytes * self.decode / self.batch / 1e9


@dataclass(frozen=True)
class Goal:
    """A ratio of best rounds, beside what it should be at least; None where there is no threshold."""

    shape: str
    name: str
    measured: float
    wanted: float | None

    @property
    def passed(self) -> bool | None:
        return None if self.wanted is None else self.measured >= self.wanted


class Found:
    """The rows of one shape by engine, prompt and batch, and the best bandwidth of the run."""

    def __init__(self, rows: list[Row], shape: str, bandwidth: float) -> None:
        self.shape = shape
        self.bandwidth = bandwidth
        self._rows = {(row.engine, row.prompt, row.batch): row for row in rows if row.shape == shape}

    def get(self, engine: str, prompt: int = 128, batch: int = 1) -> Row | None:
        return self._rows.get((engine, prompt, batch))

    def best(self, engines: tuple[str, ...], of: Callable[[Row], float]) -> float | None:
        """The best rate of the engines that ran."""
        return max((of(row) for engine in engines if (row := self.get(engine))), default=None)


# (int8 against the best int8 peer, int4 against the best int4 peer, share of bandwidth at int8, at int4)
_DECODE: dict[str, tuple[float, float, float | None, float | None]] = {
    "15m": (1.5, 1.5, None, None),
    "135m": (1.35, 1.3, 0.75, 0.65),
    "1b": (1.15, 1.1, 0.88, 0.80),
}


def goals(found: Found) -> Iterator[Goal]:
    """What can be said of the shape; a goal whose engines did not run is left out."""
    int8, int4 = found.get("slim int8"), found.get("slim int4")
    against8, against4, share8, share4 = _DECODE[found.shape]
    if int8 and (best := found.best(INT8_PEERS, _decode)):
        yield Goal(found.shape, "decode int8 / best int8 peer", int8.decode / best, against8)
    if int4 and (best := found.best(INT4_PEERS, _decode)):
        yield Goal(found.shape, "decode int4 / best int4 peer", int4.decode / best, against4)
    for precision, row, share in (("int8", int8, share8), ("int4", int4, share4)):
        if row:
            yield Goal(found.shape, f"decode {precision} / read bandwidth", row.read / found.bandwidth, share)
    yield from _prefill_goals(found, int8, int4)
    against: dict[str, tuple[str, ...]] = {"torch.compile": COMPILE, "torchao int8": ("torchao int8",)}
    for name, peers in against.items():
        if int8 and (best := found.best(peers, _decode)):
            wanted = 5.0 if found.shape == "135m" else None
            yield Goal(found.shape, f"decode int8 / {name}", int8.decode / best, wanted)
    yield from _case_goals(found)


def _prefill_goals(found: Found, int8: Row | None, int4: Row | None) -> Iterator[Goal]:
    if int8 and (best := found.best(("CTranslate2 int8",), _prefill)):
        wanted = None if found.shape == "15m" else 1.0
        yield Goal(found.shape, "prefill int8 / CTranslate2", int8.prefill / best, wanted)
    if int8 and int4:
        yield Goal(found.shape, "prefill int4 / int8", int4.prefill / int8.prefill, 0.9)


def _case_goals(found: Found) -> Iterator[Goal]:
    for engine in ("slim int8", "slim int4"):
        one, eight, long = found.get(engine), found.get(engine, batch=8), found.get(engine, prompt=2048)
        if one and eight:
            yield Goal(found.shape, f"{engine[5:]} batch 8 / batch 1, decode", eight.decode / one.decode, 4.0)
        if one and long:
            grown = _moved(long) / _moved(one) * long.decode / one.decode
            yield Goal(found.shape, f"{engine[5:]} context 2048 / 128, growth of bytes / of cost", grown, None)


def _moved(row: Row) -> float:
    """Bytes read for a token: the weights, and the keys and values of the prompt."""
    return row.nbytes + SHAPES[row.shape].cached * row.prompt


def _decode(row: Row) -> float:
    return row.decode


def _prefill(row: Row) -> float:
    return row.prefill


# -- text --------------------------------------------------------------------------------------------------------------


def table(rows: list[Row], bandwidth: float) -> str:
    """Rows of one shape as a table in Markdown."""
    lines = [
        "| engine | case | MB a token | prefill tok/s | median | decode tok/s | median | GB/s | % of bandwidth |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = f"{row.prompt}" + (f" x {row.batch}" if row.batch > 1 else "")
        rates = (row.prefill, statistics.median(row.prefills), row.decode, statistics.median(row.decodes))
        cells = [row.engine, case, f"{row.nbytes / 1e6:.1f}", *map(_rate, rates), f"{row.read:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{100 * row.read / bandwidth:.0f}"]) + " |")
    return "\n".join(lines)


def first_tokens(rows: list[Row]) -> str:
    """Which engines wrote which token first: those that run the same model choose among the same few."""
    wrote: dict[int, list[str]] = {}
    for row in rows:
        if (row.prompt, row.batch) == (128, 1):
            wrote.setdefault(row.tokens[0], []).append(row.engine)
    parts = (f"{token} by {', '.join(engines)}" for token, engines in wrote.items())
    return f"First token written, where random weights leave the likeliest close together: {'; '.join(parts)}."


def goal_table(found: list[Goal]) -> str:
    """The goals as a table in Markdown."""
    lines = ["| shape | goal | measured | at least | |", "|---|---|---|---|---|"]
    for goal in found:
        wanted = "" if goal.wanted is None else f"{goal.wanted:.2f}"
        verdict = {None: "", True: "pass", False: "FAIL"}[goal.passed]
        lines.append(f"| {goal.shape} | {goal.name} | {goal.measured:.2f} | {wanted} | {verdict} |")
    return "\n".join(lines)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
