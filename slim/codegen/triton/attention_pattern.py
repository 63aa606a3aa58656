"""Which keys a pattern keeps, as Triton source: conditions on the keys of a tile, and the tiles that are worth a visit.

Names in a kernel's text: ``u`` the tokens of the queries and ``j`` those of a tile's keys, counted from the first that
is no padding, of which ``origin`` come before; ``u_first``, ``u_last``, ``j_first`` and ``j_last`` their ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

from slim.codegen.regions.schedule import Attention
from slim.codegen.triton.attention_choices import Choices, block_size
from slim.codegen.triton.attention_parts import address
from slim.codegen.triton.writer import Writer, indented
from slim.compiler.patterns.terms import (
    Blocks,
    Columns,
    Random,
    Rows,
    Stride,
    Summary,
    Term,
    Top,
    VerticalSlash,
    Window,
)

_FAR = str(1 << 30)  # beyond all keys
_CHOSEN = (Top, VerticalSlash)
_TILES = 32  # that are asked at once whether they are worth a visit


class Kept:
    """What the heads of a program keep.

    Args:
        query: ``u`` as a column or a scalar. head: the heads, likewise.
        works_on: the condition, a scalar, on which a program has one of the heads from the first to the last of two.
        choices: what a kernel of many queries reads of what they chose. One query's is ``best``, whether the best
            blocks hold a key of the tile.
    """

    def __init__(
        self, writer: Writer, region: Attention, query: str, head: str, works_on: Callable[[int, int], str],
        choices: Choices | None = None,
    ) -> None:  # fmt: skip
        self._writer, self._region, self._choices = writer, region, choices or Choices()
        self._query, self._head, self._works_on = query, head, works_on
        self._groups = () if region.pattern is None else region.pattern.groups

    def __bool__(self) -> bool:
        return bool(self._groups)

    def begin(self) -> list[str]:
        """``origin``; it takes ``b``, and ``keys``, how many there are."""
        if not self or self._region.key_mask is None:
            return ["origin = tl.zeros((), tl.int32)"] if self else []
        place = address(self._writer, self._region.key_mask, "key_mask", ["b", "o"])
        body = [
            "o = piece + tl.arange(0, 1024)", f"real = tl.load({place}, mask=o < keys, other=0) != 0",
            "origin = tl.minimum(origin, tl.min(tl.where(real, o, keys), 0))",
        ]  # fmt: skip
        return ["origin = keys", "for piece in range(0, keys, 1024):", *indented(body)]

    # -- tiles ---------------------------------------------------------------------------------------------------------

    def bounds(self, block: str) -> list[str]:
        """Tiles with a key that is kept begin below ``ahead``, or from ``lo`` on below ``until``.

        ``ahead`` and ``lo`` are multiples of ``block``, and ``ahead`` is no more than ``lo``. Keys that are looked at
        with queries of their own lie below ``ahead``.
        """
        lows, aheads, untils = zip(*(self._ends(terms) for _, _, terms in self._groups), strict=True)
        lines = [
            f"lo = {self._any(lows, _FAR, 'tl.minimum')}", f"ahead = {self._any(aheads, '0', 'tl.maximum')}",
            f"until = {self._any(untils, '0', 'tl.maximum')}",
        ]  # fmt: skip
        if self._region.window is not None:
            lines.append(f"lo = tl.maximum(lo, u_first + origin - {self._region.window - 1})")
        return [
            *lines, f"ahead = tl.cdiv(tl.maximum(ahead, {self._region.first}), {block}) * {block}",
            f"lo = tl.maximum(tl.maximum(lo, 0) // {block} * {block}, ahead)",
        ]  # fmt: skip

    def _ends(self, terms: tuple[Term, ...]) -> tuple[str, str, str]:
        """(lo, ahead, until) of a head that keeps ``terms``."""
        lows, aheads, untils = [_FAR], ["0"], ["0"]
        for term in terms:
            match term:
                case Columns(tokens):
                    aheads.append(f"origin + {tokens}")
                    untils.append(f"origin + {tokens}")
                    continue
                case Window(tokens):
                    lows.append(f"u_first + origin - {tokens - 1}")
                    untils.append(f"u_last + origin + {tokens}")
                case Blocks(size, count):
                    lows.append(f"(u_first // {size} - {count - 1}) * {size} + origin")
                    untils.append(f"(u_last // {size} + {count}) * {size} + origin")
                case Rows(tokens):
                    lows.append(f"tl.where(u_first < {tokens}, 0, {_FAR})")
                    untils.append(f"tl.where(u_first < {tokens}, {_FAR}, 0)")
                case _:
                    return "0", "0", _FAR
        if not terms:
            return "0", "0", _FAR
        return _fold("tl.minimum", lows), _fold("tl.maximum", aheads), _fold("tl.maximum", untils)

    def _any(self, values: Sequence[str], none: str, join: str) -> str:
        if len(values) == 1:
            return values[0]
        held = [
            f"tl.where({self._works_on(first, last)}, {value}, {none})"
            for (first, last, _), value in zip(self._groups, values, strict=True)
        ]
        return _fold(join, held)

    @property
    def is_tested(self) -> bool:
        """Whether some tiles between the bounds may hold no key that is kept, and are asked when they come."""
        tested = (Stride, Summary, Random)
        return not self.is_listed and any(isinstance(term, tested) for _, _, terms in self._groups for term in terms)

    @property
    def is_listed(self) -> bool:
        """Whether the tiles that are worth a visit are listed before the first is read: few are, anywhere."""
        return any(isinstance(term, _CHOSEN) for _, _, terms in self._groups for term in terms)

    def tile(self, block: str) -> list[str]:
        """The tokens of the tile that begins with key ``first``."""
        if not self:
            return []
        tested = ["j_first = first - origin", f"j_last = j_first + {block} - 1"] if self.is_tested else []
        return ["j = t - origin", *tested, *self._choices_of_tile()]

    def worth(self) -> str:
        """A scalar: whether some query may keep a key of the tile."""
        return self._joined(self._worth, self._works_on)

    def _worth(self, term: Term) -> str:
        match term:
            case Window(tokens):
                return f"(j_last > u_first - {tokens}) & (j_first < u_last + {tokens})"
            case Columns(tokens):
                return f"j_first < {tokens}"
            case Rows(tokens):
                return f"u_first < {tokens}"
            case Stride(step):
                return f"(u_last - j_first) // {step} * {step} >= u_first - j_last"
            case Blocks(size, count):
                before = f"j_last // {size} > u_first // {size} - {count}"
                return f"({before}) & (j_first // {size} < u_last // {size} + {count})"
            case Summary(size, count):
                return f"(j_last % {size} >= {size - count}) | (j_last // {size} > j_first // {size})"
            case Random(size) if self.is_listed:
                found = self._drawn(term, f"(j_first // {size})[None, :]", f"(j_last // {size})[None, :]")
                return f"tl.max({found}.to(tl.int32), 0) > 0"
            case Random(size):
                found = self._drawn(term, f"j_first // {size}", f"j_last // {size}")
                return f"tl.max(tl.max({found}.to(tl.int32), 1), 0) > 0"
            case Top():
                return "best"
            case VerticalSlash():
                return "voted"
        raise AssertionError(term)

    # -- what was chosen -----------------------------------------------------------------------------------------------

    def begin_choices(self) -> list[str]:
        """Where the choices of many queries, whose numbers in the call are ``i``, lie."""
        choices, lines = self._choices, []
        if choices.tops is not None:
            rows = address(self._writer, choices.tops, "tops", ["b", "g", "tl.cast(i, tl.int64)"])
            lines += [f"tops_of = {rows}", f"u_own = tl.maximum(u, 0) // {self._size}"]
        for name, view in (("columns", choices.columns), ("slashes", choices.slashes)):
            if view is not None:
                lines.append(f"{name}_of = {address(self._writer, view, name, ['b', 'h'])}")
        return lines

    def listing(self, tiles: str, end: str, block: str) -> list[str]:
        """The numbers of the ``count`` tiles from ``lo`` on, below ``end``, that are worth a visit, to ``tiles``."""
        body = [
            f"tile = piece + tl.arange(0, {_TILES})", f"first = tile * {block}", "j_first = first - origin",
            f"j_last = j_first + {block} - 1", *self._worth_of_choices(block),
            f"visited = (first < {end}) & {self.worth()}",
            f"tl.store({tiles} + count + tl.cumsum(visited.to(tl.int32), 0) - 1, tile, mask=visited)",
            "count += tl.sum(visited.to(tl.int32), 0)",
        ]  # fmt: skip
        return [
            "count = tl.zeros((), tl.int32)", f"for piece in range(lo // {block}, tl.cdiv({end}, {block}), {_TILES}):",
            *indented(body), "tl.debug_barrier()  # the list is read by other threads than wrote it",
        ]  # fmt: skip

    def _worth_of_choices(self, block: str) -> list[str]:
        """``best`` and ``voted``: which tiles hold a key that some query chose, of tiles that begin with ``first``."""
        lines = []
        if self._choices.tops is not None:
            size, bits = self._size, self._writer.function("bits_from")
            lines += [
                f"low = tl.maximum(j_first, 0) // {size}", f"high = tl.maximum(j_last, 0) // {size}",
                f"newest = tl.maximum(u_last, 0) // {size}",
                "span = (1 << tl.maximum(tl.minimum(high, newest) - low + 1, 0).to(tl.int64)) - 1",
                f"held = {bits}(tops_of[:, None], low[None, :], row_in[:, None] & (first < keys)[None, :])",
                "best = tl.max(((held & span[None, :]) != 0).to(tl.int32), 0) > 0",
                f"best = best | ((low <= newest) & (high >= tl.maximum(u_first, 0) // {size}))",
            ]  # fmt: skip
        if self._choices.columns is not None:
            lines += [
                f"last = tl.minimum(first + {block}, keys) - 1", "near = tl.maximum(u_first + origin - last, 0)",
                "far = tl.maximum(u_last + origin - first, 0)", "voted = first < 0",
            ]  # fmt: skip
            for name, low, high in (("columns", "first", "last"), ("slashes", "near", "far")):
                ends = (f"tl.load({name}_of + {end}, mask=first < keys, other=0)" for end in (low, high))
                lines += [f"before, upto = {', '.join(ends)}"]
                lines.append("voted = voted | ((upto >> 1) + (upto & 1) > (before >> 1))")
        return lines

    def _choices_of_tile(self) -> list[str]:
        lines = []
        if self._choices.tops is not None:
            size, bits = self._size, self._writer.function("bits_from")
            lines += [
                f"j_block = tl.maximum(j, 0) // {size}", f"low = tl.maximum(first - origin, 0) // {size}",
                f"bits = {bits}(tops_of, low, row_in)",
            ]  # fmt: skip
        if self._choices.columns is not None:
            apart = "tl.maximum(index[:, None] - t[None, :], 0)"
            lines += [
                "column = tl.load(columns_of + t, mask=there, other=0) & 1",
                f"slash = tl.load(slashes_of + {apart}, mask=row_in[:, None] & there[None, :], other=0) & 1",
            ]  # fmt: skip
        return lines

    @property
    def _size(self) -> int:
        return block_size(self._region)

    # -- keys ----------------------------------------------------------------------------------------------------------

    def seen(self) -> list[str]:
        """Conditions, over the tile, on which a key is kept."""
        if not self:
            return []
        return [self._joined(self._keeps, lambda first, last: f"({self._head} >= {first}) & ({self._head} <= {last})")]

    def _keeps(self, term: Term) -> str:
        u, j = self._query, "j[None, :]"
        match term:
            case Window(tokens):
                return f"{u} - {j} < {tokens}" if self._region.causal else f"tl.abs({u} - {j}) < {tokens}"
            case Columns(tokens):
                return f"{j} < {tokens}"
            case Rows(tokens):
                return f"{u} < {tokens}"
            case Stride(step):
                return f"({u} - {j}) % {step} == 0"
            case Blocks(size, count):
                return f"tl.abs({u} // {size} - {j} // {size}) < {count}"
            case Summary(size, count):
                return f"{j} % {size} >= {size - count}"
            case Random(size):
                return self._drawn(term, f"{j} // {size}", f"{j} // {size}")
            case Top() if self._choices.tops is None:
                return "best[None, :]"
            case Top():
                chosen = "((bits[:, None] >> (j_block - low)[None, :].to(tl.int64)) & 1) != 0"
                before, own = (f"(j_block[None, :] {sign} u_own[:, None])" for sign in ("<", "=="))
                return f"(({chosen}) & {before}) | {own}"
            case VerticalSlash():
                return "(column[None, :] | slash) != 0"
        raise AssertionError(term)

    def _drawn(self, term: Random, low: str, high: str) -> str:
        query = f"{self._query} // {term.size}"
        draws = self._writer.function("draws")
        return f"{draws}({query}, {self._head}, {low}, {high}, {term.count}, {term.seed})"

    def _joined(self, condition: Callable[[Term], str], own: Callable[[int, int], str]) -> str:
        parts = []
        for first, last, terms in self._groups:
            held = " | ".join(f"({condition(term)})" for term in terms)
            mine = [] if last == -1 else [f"({own(first, last)})"]
            parts.append(" & ".join([*mine, *([f"({held})"] if held else [])]))
        return f"({' | '.join(f'({part})' for part in parts)})"


def _fold(function: str, values: Sequence[str]) -> str:
    return reduce(lambda one, other: f"{function}({one}, {other})", values)
