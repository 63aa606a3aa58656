"""The terms of a sparsity pattern: each says of a query which keys it keeps.

Tokens are counted from the first that is no padding. A query is token ``t``, a key token ``j``; what causality, a
window of the model's own or a mask forbid stays forbidden.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from sympy import Rational
from torch import Tensor

from slim import errors
from slim.compiler.patterns.choose import VOTERS, top_blocks, voted

_NONE = Rational(0)
_MOST = 2**31  # kernels hold the numbers of a term in 32 bits


@dataclass(frozen=True)
class Call:
    """One call of attention, as terms see it.

    Attributes:
        q, k: scaled queries [B, H, S, D] and keys [B, G, T, D].
        t, j: tokens of queries [B or 1, 1, S, 1] and of keys [B or 1, 1, 1, T].
        seen: bool [B or 1, 1, S, T], what may be seen at all; None for everything.
    """

    q: Tensor
    k: Tensor
    t: Tensor
    j: Tensor
    seen: Tensor | None

    def full(self, value: bool) -> Tensor:
        """[1, 1, S, T] of one value."""
        return torch.full((1, 1, self.q.shape[2], self.k.shape[2]), value, device=self.q.device)


@dataclass(frozen=True)
class Term(ABC):
    """A rule that keeps some keys. Its fields are whole numbers; its repr is its text in the IR.

    Attributes:
        sees_itself: whether every query keeps its own token.
        looks_back: whether it draws from, or chooses among, the keys before a query.
    """

    sees_itself: ClassVar[bool] = False
    looks_back: ClassVar[bool] = False

    @classmethod
    def name(cls) -> str:
        return cls.__name__.lower()

    def __repr__(self) -> str:
        return f"{self.name()}({', '.join(repr(value) for value in dataclasses.astuple(self))})"

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            least = 0 if option.name == "seed" else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _MOST:
                reason = f"{self.name()} takes numbers of tokens, not {value!r}"
                raise errors.BadInput(argument=option.name, reason=reason)

    @abstractmethod
    def kept(self, call: Call) -> Tensor:
        """bool, broadcast over [B, H, S, T]."""
        ...

    @abstractmethod
    def keys_kept(self, *, causal: bool) -> tuple[Rational, Rational]:
        """(a, b): a query that sees n keys keeps about a + b n of them, if there are as many."""
        ...

    def keys_to_choose(self, keys: float) -> float:
        """What a query reads to choose among ``keys``, as so many keys and their values."""
        return 0.0


@dataclass(frozen=True, repr=False)
class Window(Term):
    """The newest ``tokens`` keys, the query's own among them; and as many after it where attention looks ahead."""

    sees_itself = True
    tokens: int

    def kept(self, call: Call) -> Tensor:
        return (call.t - call.j).abs() < self.tokens

    def keys_kept(self, *, causal: bool) -> tuple[Rational, Rational]:
        return Rational(self.tokens if causal else 2 * self.tokens - 1), _NONE


@dataclass(frozen=True, repr=False)
class Columns(Term):
    """The first ``tokens`` keys: sinks, or global tokens as all others see them."""

    tokens: int

    def kept(self, call: Call) -> Tensor:
        return call.j < self.tokens

    def keys_kept(self, *, causal: bool) -> tuple[Rational, Rational]:
        return Rational(self.tokens), _NONE


@dataclass(frozen=True, repr=False)
class Rows(Term):
    """Every key, for the first ``tokens`` queries: global tokens as they see all others."""

    tokens: int

    def kept(self, call: Call) -> Tensor:
        return call.t < self.tokens

    def keys_kept(self, *, causal: bool) -> tuple[Rational, Rational]:
        return _NONE, _NONE  # of some queries alone


@dataclass(frozen=True, repr=False)
class Stride(Term):
    """Every ``step``-th key, counted from the query."""

    sees_itself = True
    step: int

    def kept(self, call: Call) -> Tensor:
        return (call.t - call.j) % self.step == 0

    def keys_kept(self, *, causal: bool) -> tuple[Rational, Rational]:
        return _NONE, Rational(1, self.step)


@dataclass(frozen=True, repr=False)
class Blocks(Term):
    """The query's own block of ``size`` tokens and its neighbours, less than ``count`` blocks away."""

    sees_itself = True
    size: int
    count: int

    def kept(self, call: Call) -> Tensor:
        return (_block(call.t, self.size) - _block(call.j, self.size)).abs() < self.count

    def keys_kept(self, *, causal: bool) -> tuple[Rational, Rational]:
        before = self.size * (self.count - 1)
        own = Rational(self.size + 1, 2) if causal else Rational(self.size)
        return (before if causal else 2 * before) + own, _NONE


@dataclass(frozen=True, repr=False)
class Summary(Term):
    """The last ``count`` keys of every block of ``size``."""

    size: int
    count: int

    def kept(self, call: Call) -> Tensor:
        return call.j % self.size >= self.size - self.count

    def keys_kept(self, *, causal: bool) -> tuple[Rational, Rational]:
        return _NONE, Rational(min(self.count, self.size), self.size)


@dataclass(frozen=True, repr=False)
class Random(Term):
    """``count`` blocks of ``size``, drawn for each head and block of queries from those before it.

    Every target draws the same ones: ``draw`` is a formula over the numbers of head and block.
    """

    looks_back = True
    size: int
    count: int
    seed: int

    def kept(self, call: Call) -> Tensor:
        query, key = _block(call.t, self.size), _block(call.j, self.size)
        heads = torch.arange(call.q.shape[1], device=call.q.device)[None, :, None, None]
        found = call.full(False)
        for number in range(self.count):
            drawn = draw(query, heads, number, self.seed) % query.clamp_min(1)
            found = found | (drawn == key) & (query > 0)
        return found

    def keys_kept(self, *, causal: bool) -> tuple[Rational, Rational]:
        return Rational(self.size * self.count), _NONE


@dataclass(frozen=True, repr=False)
class Top(Term):
    """The query's own block of ``size`` keys, and of those before it the 1 in ``share`` that may matter most.

    How much a block may matter is what a query could at most score in it, from the lowest and the highest number that
    its keys have in each channel (Tang et al. 2024, "Quest"); heads that share keys choose together. At least one
    block is chosen. See ``choose.top_blocks``.
    """

    sees_itself = True
    looks_back = True
    size: int
    share: int

    def kept(self, call: Call) -> Tensor:
        batch, heads, queries, _ = call.q.shape
        real, tokens = (call.j >= 0)[:, 0, 0].expand(batch, -1), call.t[:, 0, :, 0].expand(batch, queries)
        best = top_blocks(call.q, call.k, real, tokens, self.size, self.share)
        own = _block(call.t, self.size) == _block(call.j, self.size)
        return best.repeat_interleave(heads // call.k.shape[1], 1) | own

    def keys_kept(self, *, causal: bool) -> tuple[Rational, Rational]:
        return Rational(self.size), Rational(1, self.share)  # half of its own block, and half of one by rounding up

    def keys_to_choose(self, keys: float) -> float:
        return keys / self.size  # of each block two bounds of its keys, as much as a key and a value


@dataclass(frozen=True, repr=False)
class VerticalSlash(Term):
    """``columns`` keys that all queries keep and ``slashes`` distances at which they look, chosen from the prompt.

    The last 64 queries of a call vote with their attention (Jiang et al. 2024, "MInference"). A call of fewer queries
    sees all keys, as does a row of fewer tokens: decoding stays dense.
    """

    sees_itself = True
    looks_back = True
    columns: int
    slashes: int

    @classmethod
    def name(cls) -> str:
        return "vertical_slash"

    def kept(self, call: Call) -> Tensor:
        if call.q.shape[2] < VOTERS:
            return call.full(True)
        k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
        few = (call.j >= 0).sum(-1, keepdim=True) < VOTERS
        return few | voted(call.q, k, call.full(True) if call.seen is None else call.seen, self.columns, self.slashes)

    def keys_kept(self, *, causal: bool) -> tuple[Rational, Rational]:
        return Rational(self.columns + self.slashes), _NONE


TERMS: dict[str, type[Term]] = {
    kind.name(): kind for kind in (Window, Columns, Rows, Stride, Blocks, Summary, Random, Top, VerticalSlash)
}


def _block(tokens: Tensor, size: int) -> Tensor:
    return torch.div(tokens, size, rounding_mode="floor")


_WORD = 0xFFFFFFFF


def draw(block: Tensor, head: Tensor, number: int, seed: int) -> Tensor:
    """A number below 2^32 for every block: the ``number``-th draw of a head. kernels/attention_pattern.h has it too."""
    start = (seed * 0x9E3779B1 + number * 0x27D4EB2F) & _WORD
    x = (block * 0xC2B2AE3D + head * 0x85EBCA77 + start) & _WORD
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & _WORD
    x = ((x ^ (x >> 12)) * 0x297A2D39) & _WORD
    return x ^ (x >> 15)
