"""What an engine's file gives its worker: ``convert`` and ``Engine``. Standard library alone, for any interpreter."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Setup:
    """What a worker is told when it starts.

    Attributes:
        model: a transformers directory: config.json, model.safetensors and a tokenizer of made-up words.
        converted: a file or directory beside it for what the engine makes of the model.
        precision: the engine's own name for how weights are held.
        threads: how many compute.
        room: tokens a sequence may have, prompt included.
    """

    model: Path
    converted: Path
    precision: str
    threads: int
    room: int


@dataclass
class Clock:
    """When the prompt went in, and each new token of the first row came out."""

    start: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def begin(self) -> None:
        self.start = time.perf_counter()

    def token(self, value: int) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(value)

    @property
    def prefill(self) -> float:
        """Seconds until the first new token was there."""
        return self.times[0] - self.start

    @property
    def decode(self) -> list[float]:
        """Seconds of each new token after the first."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


class Engine(Protocol):
    """A loaded model.

    Attributes:
        nbytes: of the matrices that a new token reads: embedding tables, norms and keys and values are not among them.
        versions: of the packages that matter, by name.
    """

    nbytes: int
    versions: dict[str, str]

    def run(self, prompt: list[int], new: int, batch: int) -> Clock:
        """Reads ``prompt``, ``batch`` times at once, and writes ``new`` tokens greedily; nothing ends it sooner."""


class OneSequenceOnly(ValueError):
    """Asked for a batch that this benchmark does not try with the engine."""


def require_one(batch: int) -> None:
    """Raises OneSequenceOnly for any other batch."""
    if batch != 1:
        raise OneSequenceOnly("this benchmark runs this engine at batch 1 alone")
