"""What the attention of each layer and head sees, as small pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.patterns import DENSE, read_pattern
from slim.compiler.patterns.picture import kept_by_head, sees
from slim.compiler.rules import argument

CELLS = 32  # along a side
_MOST = 2048  # tokens that a picture shows
# How many times over a picture shows each option of a term: distances twice, and of what repeats a few turns.
_TIMES = {"tokens": 2, "columns": 2, "slashes": 2, "step": 8, "size": 8}


@dataclass(frozen=True)
class Heads:
    """Heads of one layer that see the same.

    Attributes:
        first, last: their numbers.
        picture: its number in the gallery.
        share: of what causality and the model's own window let them see, how much they keep.
    """

    first: int
    last: int
    picture: int
    share: float


@dataclass(frozen=True)
class Mask:
    """What one attention sees.

    Attributes:
        text: in words: "causal, window(64) | columns(4)".
        tokens: that the pictures show along each side.
        heads: in order; one entry where all are alike.
    """

    text: str
    tokens: int
    heads: tuple[Heads, ...]


@dataclass
class Gallery:
    """Pictures, each different one once.

    Attributes:
        pictures: CELLS * CELLS digits each, row by row, queries down and keys across: 0 where nothing of a cell is
            kept, 9 where everything is.
    """

    pictures: list[str] = field(default_factory=list)
    _known: dict[tuple[Any, ...], Mask] = field(default_factory=dict)

    def of(self, node: fx.Node, tokens: int) -> Mask:
        """The mask of an attention over at least ``tokens`` tokens; more where its pattern needs them to be seen.

        What a pattern chooses by looking is shown for random queries and keys.
        """
        heads, kv_heads = (int(argument(node, name).meta["val"].shape[1]) for name in ("q", "k"))
        pattern, causal = argument(node, "pattern") or DENSE, bool(argument(node, "causal"))
        key = (pattern, causal, argument(node, "window"), heads, kv_heads, _words(node))
        if key not in self._known:
            extent = _extent(pattern, key[2], tokens)
            found = tuple(self._heads(pattern, extent, heads, sees(extent, causal=causal, window=key[2])))
            self._known[key] = Mask(_words(node), extent, found)
        return self._known[key]

    def _heads(self, pattern: str, tokens: int, heads: int, seen: Tensor) -> Iterator[Heads]:
        kept = kept_by_head(pattern, tokens, heads, seen)
        drawn = [(self._number(_drawn(one)), int(one.sum()) / int(seen.sum())) for one in kept]
        if len(drawn) == 1:
            drawn *= heads
        first = 0
        for (picture, share), alike in groupby(drawn):
            last = first + len(list(alike)) - 1
            yield Heads(first, last, picture, share)
            first = last + 1

    def _number(self, picture: str) -> int:
        if picture not in self.pictures:
            self.pictures.append(picture)
        return self.pictures.index(picture)


def _drawn(kept: Tensor) -> str:
    """Digits of cells; one that keeps anything at all is not 0."""
    size = len(kept) // CELLS
    shares = kept.view(CELLS, size, CELLS, size).float().mean((1, 3))
    return "".join(map(str, torch.ceil(9 * shares).int().flatten().tolist()))


def _extent(pattern: str, window: int | None, tokens: int) -> int:
    """A power of two of tokens in which what the pattern leaves out can be seen."""
    wanted = [tokens, 2 * (window or 0)]
    for term in read_pattern(pattern).terms:
        options = {option.name: getattr(term, option.name) for option in dataclasses.fields(term)}
        wanted += [times * options[name] for name, times in _TIMES.items() if name in options]
    extent = CELLS
    while extent < min(max(wanted), _MOST):
        extent *= 2
    return extent


def _words(node: fx.Node) -> str:
    window, pattern = argument(node, "window"), argument(node, "pattern")
    known = {"layer", "scale", "causal", "window", "softcap", "pattern"}
    more = [
        f"{key}={value}"
        for key, value in node.kwargs.items()
        if key not in known and value is not None and not _has_nodes(value)
    ]
    words = ["causal" if argument(node, "causal") else "both ways", "" if window is None else f"window {window}"]
    return ", ".join(filter(None, [*words, pattern, *more]))


def _has_nodes(value: Any) -> bool:
    return isinstance(value, fx.Node) or (isinstance(value, (list, tuple)) and any(map(_has_nodes, value)))
