"""What every target makes of a Program, and what a caller may ask of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from slim.codegen.regions.provenance import Stage
from slim.compiler.report import Form


@dataclass(frozen=True)
class Feedback:
    """How what a step of a language model gives becomes what the next one takes, by the places in its call.

    Attributes:
        logits: the output that tokens are chosen by, [B, 1, V].
        tokens: the input [B, 1] that is the chosen token.
        positions: the input [B, 1] that is one more than before, if there is one.
        mask: the input [B, T] that grows by a key; None over pages.
        lengths: over pages, the input [B] that says how many keys each row has; it is written. Else None.
    """

    logits: int
    tokens: int
    positions: int | None
    mask: int | None = None
    lengths: int | None = None


@dataclass(frozen=True)
class Ends:
    """When rows end.

    Attributes:
        tokens: those that end a row, int64.
        finished: bool [B], which rows have; kept up to date.
        pad: the token that goes on in their place.
    """

    tokens: Tensor
    finished: Tensor
    pad: int


class GreedySteps(Protocol):
    """Steps of greedy decoding, bound to their cache."""

    def __call__(self, steps: int, held: int) -> Tensor:
        """Tokens [steps, B] after the ``held`` ones in the cache; fewer steps where every row has ended.

        Over pages ``held`` says nothing: each row's length does.
        """
        ...


class Bound(Protocol):
    """An executable with its inputs at hand, for a caller that changes few of them from call to call."""

    def set(self, index: int, value: Tensor) -> None: ...
    def __call__(self) -> tuple[Any, ...]: ...
    def greedy(self, feedback: Feedback, mask: Tensor | None, ends: Ends) -> GreedySteps | None:
        """The call as a loop of decoding steps that needs no Python in between; None where there is no such thing.

        ``mask`` is that of all keys there is room for, [B, capacity]; None over pages.
        """
        ...


class Executable(Protocol):
    """A lowered Program.

    Attributes:
        code: name -> source of everything that was generated for it, and binaries that were made ahead of time.
        form: what it is made of, for the report.
        stages: the regions in the order they run, each with its nodes, its weights and its kernels; for people.
    """

    @property
    def code(self) -> Mapping[str, str | bytes]: ...
    @property
    def form(self) -> Form: ...
    @property
    def stages(self) -> Sequence[Stage]: ...
    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        """The flat outputs for one tensor an input, in the order of the Program's inputs."""
        ...

    def bind(self, *inputs: Tensor) -> Bound:
        """The same call, to be repeated."""
        ...


@runtime_checkable
class Timed(Protocol):
    """An executable whose regions can be timed."""

    def timed(self) -> AbstractContextManager[list[float]]:
        """Inside, calls run region by region, all threads waiting for the last after each.

        Their seconds add up in what this gives, in the order of ``stages``.
        """
        ...
