"""One prompt on its way through a scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from slim import errors
from slim.compiler.inputs import checked_tokens
from slim.runtime.detokenize import Pieces, Text
from slim.runtime.pages import Row
from slim.runtime.sampling import Sampler, Sampling


class Works(Protocol):
    """What a request needs of its scheduler."""

    def advance(self) -> bool: ...
    def cancel(self, request: Request) -> None: ...


class Request:
    """One prompt on its way; iterate over it for its new tokens as they come, over ``stream()`` for their text.

    Attributes:
        scheduler: whose it is.
        prompt: token ids. tokens: new ones so far. limit: how many there may be.
        state: "waiting", "running", "finished" or "cancelled".
        preempted: how often it gave its pages back and was computed again.
        row: its pages, while it runs.
        sampler: what draws its tokens; None where the likeliest is taken.
        writing: its text so far, and what makes it; None where the scheduler has no tokenizer.
    """

    def __init__(
        self, scheduler: Works, number: int, prompt: list[int], limit: int, sampling: Sampling | None = None
    ) -> None:
        self.scheduler = scheduler
        self.number, self.prompt, self.limit = number, prompt, limit
        self.tokens: list[int] = []
        self.state = "waiting"
        self.preempted = 0
        self.row: Row | None = None
        self.sampler = None if sampling is None else Sampler(sampling)
        self.writing: tuple[Text, Pieces] | None = None

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
            self.scheduler.advance()

    def stream(self) -> Iterator[str]:
        """The text of its new tokens, a piece at a time; no piece ends within a character.

        Raises:
            BadInput: where the scheduler has no tokenizer.
        """
        text, given = self._text(), 0
        while True:
            while given < len(text.pieces):
                yield text.pieces[given]
                given += 1
            if text.complete and given == len(text.pieces):
                text.wait(given)  # which raises what went wrong
                return
            if self.done or not self.scheduler.advance():
                text.wait(given)

    @property
    def text(self) -> str:
        """All of its text, once the last token is there."""
        return "".join(self.stream())

    def _text(self) -> Text:
        if self.writing is None:
            reason = "to get text, give the scheduler one: Scheduler(model, tokenizer=...)"
            raise errors.BadInput(argument="tokenizer", reason=reason, of="slim.Scheduler")
        return self.writing[0]

    def result(self) -> list[int]:
        """All new tokens, once the last is there."""
        return list(self)

    def cancel(self) -> None:
        """Stops it where it is; its pages are free at once."""
        self.scheduler.cancel(self)

    @property
    def known(self) -> list[int]:
        """The prompt and what came after it."""
        return self.prompt + self.tokens


def prompt_tokens(input_ids: Tensor | Sequence[int], vocabulary: int | None) -> list[int]:
    """One prompt, [S] or [1, S], as a list.

    Raises:
        EmptyPrompt, TokenOutOfRange, BadInput.
    """
    given = _as_tensor(input_ids)
    tokens = checked_tokens(given[None] if given.dim() == 1 else given, vocabulary)
    if tokens.shape[0] != 1:
        reason = f"a request is one prompt, and these are {tokens.shape[0]}"
        raise errors.BadInput(argument="input_ids", reason=reason, of="slim.Scheduler.submit")
    listed: list[int] = tokens[0].tolist()
    return listed


def _as_tensor(tokens: Tensor | Sequence[int]) -> Tensor:
    if isinstance(tokens, Tensor):
        return tokens
    listed = isinstance(tokens, Sequence) and not isinstance(tokens, str)
    if not listed or not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        reason = f"it must be a tensor or a list of token ids, not {tokens!r:.40}"
        raise errors.BadInput(argument="input_ids", reason=reason, of="slim.Scheduler.submit")
    return torch.tensor(tokens, dtype=torch.int64)


def end_tokens(given: int | Sequence[int] | None, vocabulary: int | None) -> Tensor:
    """The tokens that end a request, int64; none for None.

    Raises:
        BadInput: for what is no token of the model.
    """
    tokens: list[Any] = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    for token in tokens:
        whole = isinstance(token, int) and not isinstance(token, bool) and token >= 0
        if not whole or (vocabulary is not None and token >= vocabulary):
            raise errors.BadInput(argument="eos_token_id", reason=f"{token!r} is no token", of="slim.Scheduler")
    return torch.tensor(tokens, dtype=torch.int64)
