"""One prompt on its way through a scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from slim.runtime.pages import Row


class Works(Protocol):
    """What a request needs of its scheduler."""

    def advance(self) -> bool: ...
    def cancel(self, request: Request) -> None: ...


class Request:
    """One prompt on its way; iterate over it for its new tokens as they come.

    Attributes:
        prompt: token ids. tokens: new ones so far. limit: how many there may be.
        state: "waiting", "running", "finished" or "cancelled".
        preempted: how often it gave its pages back and was computed again.
        row: its pages, while it runs.
    """

    def __init__(self, scheduler: Works, number: int, prompt: list[int], limit: int) -> None:
        self._scheduler = scheduler
        self.number, self.prompt, self.limit = number, prompt, limit
        self.tokens: list[int] = []
        self.state = "waiting"
        self.preempted = 0
        self.row: Row | None = None

    def __repr__(self) -> str:
        return f"Request({self.number}, {len(self.prompt)} + {len(self.tokens)} tokens, {self.state})"

    @property
    def done(self) -> bool:
        return self.state in ("finished", "cancelled")

    def __iter__(self) -> Iterator[int]:
        """New tokens, one by one; the scheduler works while there is none."""
        given = 0
        while True:
            done = self.done  # asked first: another thread may add the last tokens meanwhile
            while given < len(self.tokens):
                yield self.tokens[given]
                given += 1
            if done:
                return
            self._scheduler.advance()

    def result(self) -> list[int]:
        """All new tokens, once the last is there."""
        return list(self)

    def cancel(self) -> None:
        """Stops it where it is; its pages are free at once."""
        self._scheduler.cancel(self)

    @property
    def known(self) -> list[int]:
        """The prompt and what came after it."""
        return self.prompt + self.tokens
