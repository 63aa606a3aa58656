"""Attention of many queries: new keys and values are put in their place, then each program takes a tile of queries."""

from __future__ import annotations

from collections.abc import Sequence

from slim.codegen.regions.schedule import Attention
from slim.codegen.regions.views import Buffer, View
from slim.codegen.triton.attention_cache import less_offset, page, stored
from slim.codegen.triton.attention_choices import Choices, most_keys
from slim.codegen.triton.attention_mass import level
from slim.codegen.triton.attention_parts import (
    Nearer,
    Softmax,
    across,
    address,
    geometry,
    held,
    inside,
    key_mask,
    masked,
    padded,
    start,
)
from slim.codegen.triton.attention_pattern import Kept
from slim.codegen.triton.attention_top import choose, note_bounds
from slim.codegen.triton.attention_vote import vote
from slim.codegen.triton.kernel import Config, Kernel
from slim.codegen.triton.rotation import Turn
from slim.codegen.triton.writer import Target, Writer, indented

_APPEND: tuple[Config, ...] = tuple(
    dict(BLOCK_S=tokens, num_warps=warps) for tokens, warps in ((16, 4), (32, 4), (64, 8), (8, 2), (4, 1))
)


def prefill(
    region: Attention, target: Target, choices: Choices, levels: View | None
) -> tuple[list[Kernel], list[Buffer]]:
    """The kernels for any number of queries, in order, and the memory that is theirs alone.

    Args:
        choices: where queries note what they choose.
        levels: where they note what their weights add up to, if anyone asks; see ``attention_mass``.
    """
    kept: dict[str, View] = {}
    temps: list[Buffer] = []
    if region.rope is not None and region.k_cache is None:
        temps = [Buffer("temp", "rotated", region.k.buffer.dtype, region.k.shape)]
        kept["k"] = temps[0].view()
    kernels = []
    if kept or region.k_cache is not None:
        kernels.append(_append(region, target, kept))
    if choices.tops is not None:
        kernels += [note_bounds(region, target, kept), choose(region, target, choices)]
    if choices.columns is not None:
        kernels.append(vote(region, target, choices, kept))
    return [*kernels, _Prefill(region, target, kept, choices, levels).kernel()], temps


def _append(region: Attention, target: Target, kept: dict[str, View]) -> Kernel:
    """A program turns the keys of BLOCK_S tokens and stores them; where there is a cache, their values too."""
    writer = Writer(region, target)
    g = geometry(region)
    k, v = stored(writer, region, g.dtype, kept)
    tokens = writer.size(region.k.shape[2])
    turn = Turn(writer, region.rope, inside("d", g.width), padded(g.width))
    row, rows = "token[:, None]", "there[:, None]"
    lines = [
        "token = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)", f"there = token < {tokens}",
        "g = tl.program_id(1)", "b = tl.program_id(2).to(tl.int64)",
        f"at = token + tl.cast({held(writer, region)}, tl.int64)",
        *g.channels(), *page(writer, region, "at", "there"), *turn.begin(), *turn.angles(row, rows), *k.begin(None),
        *turn.load("k_new", region.k, "k", ["b", "g", row], rows), *less_offset(writer, region, g.width),
        *k.append("BLOCK_S", "there"),
    ]  # fmt: skip
    if region.k_cache is not None:
        place = address(writer, region.v, "v", ["b", "g", row, "e[None, :]"])
        channels = across(inside("e", g.value_width))
        lines += [
            *v.begin(None), f"v_new = tl.load({place}{masked(rows, channels, other='0.0')})",
            *v.append("BLOCK_S", "there"),
        ]  # fmt: skip
    grid = [f"triton.cdiv({tokens}, BLOCK_S)", str(g.kv_heads), writer.size(region.k.shape[0])]
    return writer.kernel("rotate_append", lines, _APPEND, grid)


class _Prefill:
    """Text of the kernel; the names of its variables are those of attention_parts."""

    def __init__(
        self, region: Attention, target: Target, kept: dict[str, View], choices: Choices, levels: View | None
    ) -> None:
        self.region, self.target, self.levels = region, target, levels
        self.writer = Writer(region, target)
        self.g = geometry(region)
        self.softmax = Softmax(self.writer, region, "index[:, None]")
        self.kept = Kept(
            self.writer, region, "u[:, None]", "h", lambda first, last: f"(h >= {first}) & (h <= {last})", choices
        )
        self.turn = Turn(self.writer, region.rope, inside("d", self.g.width), padded(self.g.width))
        self.nearer = Nearer(self.writer, region, self.g)
        self.k, self.v = stored(self.writer, region, self.g.dtype, kept)

    def kernel(self) -> Kernel:
        size = self.writer.size
        queries = size(self.region.q.shape[2])
        tiles = f"triton.cdiv({queries}, BLOCK_M)"
        grid = [tiles, str(self.g.heads), size(self.region.q.shape[0])]
        body = [*self._program(queries), *self._queries(), *self._loops(), *self._end()]
        scratch = "0"
        if self.kept.is_listed:  # the numbers of each program's tiles
            scratch = f"{tiles} * {' * '.join(grid[1:])} * triton.cdiv({size(most_keys(self.region))}, BLOCK_N)"
        return self.writer.kernel("attention_prefill", body, self._configs(), grid, scratch)

    def _configs(self) -> list[Config]:
        width = max(padded(self.g.width), padded(self.g.value_width)) * self.g.bytes // 2
        choices: tuple[tuple[int, int, int, int], ...] = next(tiles for limit, tiles in _TILES if width <= limit)
        masks = self.region.key_mask is not None and self.region.k_scale is None
        if width <= 64 and (masks or self.kept):  # masks and patterns take registers too; four warps bear scales
            first = 5 if self.nearer else 1 if self.kept.is_listed else 3
            choices = (*choices[first:], *choices[:first])
        found: list[Config] = []
        top = None if self.region.pattern is None else self.region.pattern.top
        for m, n, warps, stages in choices:
            if top is not None:
                n = min(n, 32 * top.size)  # the blocks of a tile are bits of one number
            config = dict(BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)
            if config not in found:
                found.append(config)
        return found

    # -- what a program is for -----------------------------------------------------------------------------------------

    def _program(self, queries: str) -> list[str]:
        """``i`` are its queries in the call, ``index`` in all of the tokens; those that read most keys come first."""
        region = self.region
        lines = [
            "m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M", "h = tl.program_id(1)",
            "b = tl.program_id(2).to(tl.int64)", f"g = h // {self.g.share}" if self.g.share > 1 else "g = h",
            f"start = tl.cast({held(self.writer, region)}, tl.int32)",
        ]  # fmt: skip
        if region.k_cache is None:
            lines.append(f"keys = tl.cast({self.writer.size(region.k.shape[2])}, tl.int32)")
        else:
            lines.append(f"keys = start + {queries}")
        kept = []
        if self.kept:
            last = f"tl.minimum(m + BLOCK_M, {queries}) - 1"
            kept = [
                *self.kept.begin(), "u = index - origin", "u_first = start + m - origin",
                f"u_last = start + {last} - origin",
            ]  # fmt: skip
        return [
            *lines, "i = m + tl.arange(0, BLOCK_M)", f"row_in = i < {queries}", "index = start + i", *kept,
            *self.g.channels(),
        ]  # fmt: skip

    def _queries(self) -> list[str]:
        row = "tl.cast(i, tl.int64)[:, None]"
        return [
            *self.turn.begin(), *self.turn.angles(row, "row_in[:, None]"),
            *self.turn.load("q_new", self.region.q, "q", ["b", "h", row], "row_in[:, None]"),
            *self.softmax.begin("h", ""), *start("BLOCK_M", self.g), *self.k.begin("BLOCK_N"), *self.v.begin("BLOCK_N"),
            *self.softmax.limit("keys"),
        ]  # fmt: skip

    # -- the keys ------------------------------------------------------------------------------------------------------

    def _loops(self) -> list[str]:
        """Tiles that all queries see whole are read without asking; those at the edges of what is seen with."""
        lines, edges = self._bounds()
        if self.kept.is_listed:
            return [*lines, *self._listed()]
        for begin, end, edge in reversed(edges) if self.region.skip else edges:
            body = self._tile(edge, near=begin != "lo" or not self.kept)
            if not self.region.skip:
                lines += [f"for first in range({begin}, {end}, BLOCK_N):", *indented(body)]
                continue
            # what scores high early lets more be skipped
            first = f"first = {begin} + (tl.cdiv({end} - {begin}, BLOCK_N) - 1) * BLOCK_N - back"
            lines += [f"for back in range(0, {end} - {begin}, BLOCK_N):", *indented([first, *body])]
        return lines

    def _listed(self) -> list[str]:
        """Tiles that some query has chosen a key of, or that the pattern keeps anyway."""
        memory = f"{self.writer.pointer('scratch')}.to(tl.pointer_type(tl.int32), bitcast=True)"
        number = "(tl.program_id(2).to(tl.int64) * tl.num_programs(1) + h) * tl.num_programs(0) + tl.program_id(0)"
        most = f"tl.cdiv({self.writer.size(most_keys(self.region))}, BLOCK_N)"
        step = "count - 1 - step" if self.region.skip else "step"
        body = [f"first = tl.load(tiles + {step}) * BLOCK_N", *self._tile(edge=True, near=True)]
        return [
            *self.kept.begin_choices(), f"tiles = {memory} + ({number}) * {most}",
            *self.kept.listing("tiles", "hi", "BLOCK_N"), "for step in range(0, count):", *indented(body),
        ]  # fmt: skip

    def _bounds(self) -> tuple[list[str], list[tuple[str, str, bool]]]:
        """(statements, (from, to, whether at an edge) of each loop)."""
        causal, window = self.region.causal, self.region.window
        near = "start + m"
        far = "start + m + BLOCK_M"  # one past the last query
        hi, full = ["keys"], ["keys"]
        if causal:
            hi, full = [*hi, far], [*full, f"{near} + 1"]
        elif window is not None:
            hi, full = [*hi, f"{far} - 1 + {window}"], [*full, f"{near} + {window}"]
        if self.kept:
            last = f"hi = {_least([*hi, 'until'])}"
            return [*self.kept.bounds("BLOCK_N"), last], [("0", "tl.minimum(ahead, hi)", True), ("lo", "hi", True)]
        lines = [f"hi = {_least(hi)}", f"full = {_least(full)} // BLOCK_N * BLOCK_N"]
        if window is None:
            return lines, [("0", "full", False), ("full", "hi", True)]
        lines += [
            f"lo = tl.maximum({near} - {window - 1}, 0) // BLOCK_N * BLOCK_N",
            f"whole = tl.cdiv(tl.maximum({far} - {window}, 0), BLOCK_N) * BLOCK_N",
            # where no tile is whole, one loop does all of them
            "whole = tl.where(whole < full, whole, hi)", "full = tl.maximum(whole, full)",
        ]  # fmt: skip
        return lines, [("lo", "tl.minimum(whole, hi)", True), ("whole", "full", False), ("full", "hi", True)]

    def _tile(self, edge: bool, near: bool) -> list[str]:
        """``near`` says whether it may hold keys that are looked at with queries of their own."""
        there = ["there = t < keys"] if edge else []
        visit = self._visit(edge, near)
        if self.kept.is_tested:
            visit = [f"if {self.kept.worth()}:", *indented(visit)]
        return ["t = first + tl.arange(0, BLOCK_N)", *there, *self.kept.tile("BLOCK_N"), *visit]

    def _visit(self, edge: bool, near: bool) -> list[str]:
        region = self.region
        there = "there" if edge else None
        seen = self._seen() if edge else ["counts[None, :]"] if region.key_mask is not None else []
        bias = None
        if region.bias is not None:
            row = "tl.cast(i, tl.int64)[:, None]"
            place = address(self.writer, region.bias, "bias", ["b", "h", row, "t[None, :]"])
            bias = f"tl.load({place}{masked('row_in[:, None]', across(there), other='0.0')})"
        values = [
            *self.softmax.step(guarded=bool(seen) or bias is not None), *self.v.load(there),
            *([] if self.v.scale is None else ["p = p * v_scales[None, :]"]),
            f"acc = tl.dot(p.to({self.g.dtype}), value, acc{self.g.precision})",
        ]  # fmt: skip
        if region.skip:
            values = [*self.softmax.enough(), "if enough:", *indented(values)]
        return [
            *page(self.writer, region, "t", there), *self.k.load(there),
            f"s = tl.dot(q_new, tl.trans(key){self.g.precision})", *(self._nearer() if near else []),
            *([] if self.k.scale is None else ["s = s * k_scales[None, :]"]),
            *key_mask(self.writer, region, there),
            *(["place = tl.where(counts, t, 1 << 30)"] if region.key_mask is not None and edge else []),
            *self.softmax.scores(seen, bias), *values,
        ]  # fmt: skip

    def _nearer(self) -> list[str]:
        """Loaded where they are used: few tiles hold first keys."""
        row = "tl.cast(i, tl.int64)[:, None]"
        return [*self.nearer.load(["b", "h", row], "row_in[:, None]"), *self.nearer.scores()]

    def _seen(self) -> list[str]:
        """Which keys of a tile at an edge the queries see; ``place`` is far beyond all for keys that none may see."""
        causal, window = self.region.causal, self.region.window
        place = "t" if self.region.key_mask is None else "place"
        if causal:  # no query that is stored comes after a key that is not there
            seen = [f"({place}[None, :] <= index[:, None])"]
        elif window is not None:
            seen = ["there[None, :]", f"({place}[None, :] - index[:, None] < {window})"]
        else:
            seen = ["counts[None, :]" if self.region.key_mask is not None else "there[None, :]"]
        seen += self.kept.seen()
        return seen if window is None else [*seen, f"(index[:, None] - t[None, :] < {window})"]

    def _end(self) -> list[str]:
        row = "tl.cast(i, tl.int64)[:, None]"
        out = address(self.writer, self.region.out, "out", ["b", "h", row, "e[None, :]"])
        channels = across(inside("e", self.g.value_width))
        levels = []
        if self.levels is not None:
            place = address(self.writer, self.levels, "level", ["b", "h", "tl.cast(i, tl.int64)"])
            levels = [f"tl.store({place}, {level('top', 'total')}, mask=row_in)"]
        return [*self.softmax.finish(), *levels, f"tl.store({out}, acc{masked('row_in[:, None]', channels)})"]


# widest of a key and a value, in 16-bit numbers -> (queries, keys, warps, stages)
_TILES = (
    (64, ((128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 4, 2), (64, 32, 4, 4))),
    (128, ((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (128, 32, 4, 3), (64, 32, 4, 3), (128, 64, 8, 2))),
    (256, ((64, 32, 4, 2), (64, 64, 8, 2), (32, 32, 4, 2), (128, 32, 8, 2))),
    (1 << 30, ((16, 16, 4, 1), (16, 32, 4, 1), (32, 16, 8, 1), (32, 32, 8, 1))),
)


def _least(values: Sequence[str]) -> str:
    result = values[0]
    for value in values[1:]:
        result = f"tl.minimum({result}, {value})"
    return result
