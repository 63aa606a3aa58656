"""The terms of a sparsity pattern: each says of a query which keys it keeps.

Tokens are counted from the first that is no padding. A query is token ``t``, a key token ``j``; what causality, a
window of the model's own or a mask forbid stays forbidden.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slim import errors


@dataclass(frozen=True)
class Term:
    """A rule that keeps some keys. Its fields are whole numbers; its repr is its text in the IR.

    Attributes:
        sees_itself: whether every query keeps its own token.
    """

    sees_itself: ClassVar[bool] = False

    @classmethod
    def name(cls) -> str:
        return cls.__name__.lower()

    def __repr__(self) -> str:
        return f"{self.name()}({', '.join(repr(value) for value in dataclasses.astuple(self))})"

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (option.name != "seed"):
                raise errors.BadInput(
                    argument=option.name, reason=f"{self.name()} takes numbers of tokens, not {value!r}"
                )

    def kept(self, t: Tensor, j: Tensor, heads: int) -> Tensor:
        """bool, over t [..., S, 1] and j [..., 1, T]; where heads differ, [..., heads, S, T]."""
        raise NotImplementedError

    def keys_kept(self, keys: Any) -> Any:
        """About how many of ``keys``, a number or an expression, a query keeps; more than there are stands for all."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Window(Term):
    """The newest ``tokens`` keys, the query's own among them; and as many after it where attention looks ahead."""

    sees_itself = True
    tokens: int

    def kept(self, t: Tensor, j: Tensor, heads: int) -> Tensor:
        return (t - j).abs() < self.tokens

    def keys_kept(self, keys: Any) -> Any:
        return self.tokens


@dataclass(frozen=True, repr=False)
class Columns(Term):
    """The first ``tokens`` keys: sinks, or global tokens as all others see them."""

    tokens: int

    def kept(self, t: Tensor, j: Tensor, heads: int) -> Tensor:
        return (j < self.tokens).expand(torch.broadcast_shapes(t.shape, j.shape))

    def keys_kept(self, keys: Any) -> Any:
        return self.tokens


@dataclass(frozen=True, repr=False)
class Rows(Term):
    """Every key, for the first ``tokens`` queries: global tokens as they see all others."""

    tokens: int

    def kept(self, t: Tensor, j: Tensor, heads: int) -> Tensor:
        return (t < self.tokens).expand(torch.broadcast_shapes(t.shape, j.shape))

    def keys_kept(self, keys: Any) -> Any:
        return 0


@dataclass(frozen=True, repr=False)
class Stride(Term):
    """Every ``step``-th key, counted from the query."""

    sees_itself = True
    step: int

    def kept(self, t: Tensor, j: Tensor, heads: int) -> Tensor:
        return (t - j) % self.step == 0

    def keys_kept(self, keys: Any) -> Any:
        return keys / self.step


@dataclass(frozen=True, repr=False)
class Blocks(Term):
    """The query's own block of ``size`` tokens and its neighbours, less than ``count`` blocks away."""

    sees_itself = True
    size: int
    count: int

    def kept(self, t: Tensor, j: Tensor, heads: int) -> Tensor:
        return (_block(t, self.size) - _block(j, self.size)).abs() < self.count

    def keys_kept(self, keys: Any) -> Any:
        return self.size * self.count


@dataclass(frozen=True, repr=False)
class Summary(Term):
    """The last ``count`` keys of every block of ``size``."""

    size: int
    count: int

    def kept(self, t: Tensor, j: Tensor, heads: int) -> Tensor:
        return (j % self.size >= self.size - self.count).expand(torch.broadcast_shapes(t.shape, j.shape))

    def keys_kept(self, keys: Any) -> Any:
        return keys * self.count / self.size


@dataclass(frozen=True, repr=False)
class Random(Term):
    """``count`` blocks of ``size``, drawn for each head and block of queries from those before it.

    Every target draws the same ones: ``draw`` is a formula over the numbers of head and block.
    """

    size: int
    count: int
    seed: int

    def kept(self, t: Tensor, j: Tensor, heads: int) -> Tensor:
        query, key = _block(t, self.size), _block(j, self.size)
        shape = torch.broadcast_shapes(t.shape, j.shape)
        found = torch.zeros(*shape[:-2], heads, *shape[-2:], dtype=torch.bool, device=t.device)
        before = query.clamp_min(1)
        for head in range(heads):
            for number in range(self.count):
                chosen = draw(query, head, number, self.seed) % before
                found[..., head, :, :] |= (chosen == key) & (query > 0)
        return found

    def keys_kept(self, keys: Any) -> Any:
        return self.size * self.count


@dataclass(frozen=True, repr=False)
class Top(Term):
    """The query's own block of ``size`` keys, and of those before it the 1 in ``share`` that may matter most.

    How much a block may matter is what a query could at most score in it, from the lowest and the highest number that
    its keys have in each channel (Tang et al. 2024, "Quest"); heads that share keys choose together. At least one
    block is chosen. See ``choose.top_blocks``.
    """

    sees_itself = True
    size: int
    share: int

    def keys_kept(self, keys: Any) -> Any:
        return keys / self.share + self.size


@dataclass(frozen=True, repr=False)
class VerticalSlash(Term):
    """``columns`` keys that all queries keep and ``slashes`` distances at which they look, chosen from the prompt.

    The last 64 queries of a call vote with their attention (Jiang et al. 2024, "MInference"). A call of fewer queries
    sees all keys: decoding stays dense.
    """

    sees_itself = True
    columns: int
    slashes: int

    @classmethod
    def name(cls) -> str:
        return "vertical_slash"

    def keys_kept(self, keys: Any) -> Any:
        return self.columns + self.slashes


TERMS: dict[str, type[Term]] = {
    kind.name(): kind for kind in (Window, Columns, Rows, Stride, Blocks, Summary, Random, Top, VerticalSlash)
}


def _block(tokens: Tensor, size: int) -> Tensor:
    return torch.div(tokens, size, rounding_mode="floor")


_WORD = 0xFFFFFFFF


def draw(block: Tensor, head: int, number: int, seed: int) -> Tensor:
    """A number below 2^32 for every block: the ``number``-th draw of a head. kernels/attention_pattern.h has it too."""
    start = (seed * 0x9E3779B1 + head * 0x85EBCA77 + number * 0x27D4EB2F) & _WORD
    x = (block * 0xC2B2AE3D + start) & _WORD
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & _WORD
    x = ((x ^ (x >> 12)) * 0x297A2D39) & _WORD
    return x ^ (x >> 15)
