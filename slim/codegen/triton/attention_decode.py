"""Attention of one query a row: the context is read by many programs side by side, and the last one joins them.

A program works on the query heads of one kv head, as the rows of a product, and on a part of the context.
"""

from __future__ import annotations

from collections.abc import Sequence

from slim.codegen.regions.schedule import Attention
from slim.codegen.regions.views import View
from slim.codegen.triton.attention_cache import less_offset, page, stored
from slim.codegen.triton.attention_choices import Bounds, Choices, block_size, no_bounds
from slim.codegen.triton.attention_mass import level
from slim.codegen.triton.attention_parts import (
    LOG2E,
    Nearer,
    Softmax,
    across,
    address,
    column,
    geometry,
    held,
    inside,
    key_mask,
    masked,
    padded,
    start,
)
from slim.codegen.triton.attention_pattern import Kept
from slim.codegen.triton.attention_top import choose_of_one
from slim.codegen.triton.kernel import Config, Kernel
from slim.codegen.triton.rotation import Turn
from slim.codegen.triton.writer import Target, Writer, indented, power_of_two

_ROWS = 64  # query heads that one program takes at most


def decode(region: Attention, target: Target, choices: Choices, levels: View | None) -> list[Kernel]:
    """The kernels for one query in each row of the batch.

    Args:
        choices: where the query notes what it chooses.
        levels: where it notes what its weights add up to, if anyone asks; see ``attention_mass``.
    """
    choosing = [] if choices.listed is None else [choose_of_one(region, target, choices)]
    return [*choosing, _Decode(region, target, choices.listed, levels).kernel()]


class _Decode:
    def __init__(self, region: Attention, target: Target, listed: View | None, levels: View | None) -> None:
        self.region, self.target, self.listed, self.levels = region, target, listed, levels
        self.writer = Writer(region, target)
        self.g = geometry(region)
        self.cached = region.k_cache is not None
        widest = max(padded(self.g.width), padded(self.g.value_width))
        self.share = min(self.g.share, max(16, min(_ROWS, 16384 // widest)))  # query heads of a program
        self.parts = -(-self.g.share // self.share)
        self.rows = max(16, power_of_two(self.share))
        self.softmax = Softmax(self.writer, region, "start")
        self.kept = Kept(self.writer, region, "u", "head[:, None]", self._works_on)
        self.turn = Turn(self.writer, region.rope, inside("d", self.g.width), padded(self.g.width))
        self.nearer = Nearer(self.writer, region, self.g)
        self.k, self.v = stored(self.writer, region, self.g.dtype, {}, scattered=listed is not None)

    def kernel(self) -> Kernel:
        pairs = f"{self.writer.size(self.region.q.shape[0])} * {self.g.kv_heads * self.parts}"
        # no more parts of a context than keep the machine busy: a large batch does that by itself
        splits = f"max(1, min(SPLITS, {4 * self.target.processors} // ({pairs})))"
        body = [
            *self._program(), *self._span(), "if split < busy:",
            *indented([*self._queries(), *self._context(), *self._end()]),
        ]  # fmt: skip
        scratch = f"(SPLITS > 1) * {pairs} * {splits} * {self.share * (self.g.value_width + 2)}"
        return self.writer.kernel(
            "attention_decode", body, self._configs(), [pairs, splits], scratch, f"(SPLITS > 1) * {pairs}"
        )

    def _configs(self) -> list[Config]:
        """The first fills the machine with a batch of one."""
        size = max(padded(self.g.width), padded(self.g.value_width)) * self.g.bytes
        block = max(16, min(64, 16384 // size))
        fills = 2 * self.target.processors // (self.g.kv_heads * self.parts)
        splits = max(1, min(64, power_of_two(fills + 1) // 2))
        found: list[Config] = []
        for tokens, many, warps, stages in (
            (block, splits, 4, 3), (block, splits, 4, 2), (block // 2, splits, 4, 3), (block, splits // 2, 4, 3),
            (block, splits // 2, 8, 3), (block, splits * 2, 4, 3), (block // 2, splits * 2, 2, 3),
        ):  # fmt: skip
            config = dict(BLOCK_T=max(16, tokens), SPLITS=max(1, many), num_warps=warps, num_stages=stages)
            if config not in found:
                found.append(config)
        return found

    # -- what a program is for -----------------------------------------------------------------------------------------

    def _program(self) -> list[str]:
        """Whose queries it works on, and how many tokens there are."""
        region, kv_heads, parts = self.region, self.g.kv_heads, self.parts
        group = "pair" if parts == 1 else f"pair // {parts}"
        rest = [f"part * {self.share} + row < {self.g.share}"] if self.g.share % self.share else []
        row_in = " & ".join(f"({condition})" for condition in [f"row < {self.share}", *rest])
        return [
            "pair = tl.program_id(0)", "split = tl.program_id(1)", *([f"part = pair % {parts}"] if parts > 1 else []),
            f"g = {group} % {kv_heads}", f"b = (pair // {parts * kv_heads}).to(tl.int64)",
            f"start = tl.cast({held(self.writer, region)}, tl.int32)", f"row = tl.arange(0, {self.rows})",
            f"row_in = {row_in}", f"head = {self._head('row')}", *self.g.channels(),
        ]  # fmt: skip

    def _span(self) -> list[str]:
        """The keys [lo, end) that are read from memory, in how many tiles, and how many programs share them."""
        region = self.region
        lines = ["lo = tl.zeros((), tl.int32)", "end = start"]
        if not self.cached:
            keys = f"tl.cast({self.writer.size(region.k.shape[2])}, tl.int32)"
            limit = 1 if region.causal else region.window
            lines[1] = f"end = {keys}" if limit is None else f"end = tl.minimum({keys}, {limit})"
        elif region.window is not None:
            lines[0] = f"lo = tl.maximum(start - {region.window - 1}, 0)"
        tiles = ["tiles = tl.cdiv(end - lo, BLOCK_T)"]
        if self.listed is not None:
            size = block_size(region)
            lines = [
                lines[1], "keys = start + 1", *self.kept.begin(), "u = start - origin",
                f"listed_at = {address(self.writer, self.listed, 'listed', ['b', 'g'])}",
                f"many = tl.load(listed_at) * {size}",
            ]  # fmt: skip
            tiles = ["tiles = tl.cdiv(many, BLOCK_T)"]
        elif self.kept:
            keys = "keys = start + 1" if self.cached else "keys = end"
            lines = [
                lines[1], keys, *self.kept.begin(), "u = start - origin", "u_first = u", "u_last = u",
                *self.kept.bounds("BLOCK_T"),
            ]  # fmt: skip
            before = "tl.minimum(ahead // BLOCK_T, tl.cdiv(end, BLOCK_T))"
            tiles = [f"tiles = {before} + tl.cdiv(tl.maximum(tl.minimum(end, until) - lo, 0), BLOCK_T)"]
        return [
            *lines, *tiles, "each = tl.maximum(tl.cdiv(tiles, tl.num_programs(1)), 1)",
            "busy = tl.maximum(tl.cdiv(tiles, each), 1)",
        ]  # fmt: skip

    def _works_on(self, first: int, last: int) -> str:
        head = "g" if self.g.share == 1 else f"g * {self.g.share}"
        return f"({head} <= {last}) & ({head} + {self.g.share} > {first})"

    def _queries(self) -> list[str]:
        return [
            *self.turn.begin(), *self.turn.angles(None),
            *self.turn.load("q_new", self.region.q, "q", ["b", "head[:, None]", None], "row_in[:, None]"),
            *self.nearer.load(["b", "head[:, None]", None], "row_in[:, None]"),
            *self.softmax.begin("head", "[:, None]", "row_in"), *start(str(self.rows), self.g),
            *self.softmax.limit("start + 1" if self.cached else "end"),
            *self.k.begin("BLOCK_T"), *self.v.begin("BLOCK_T"),
        ]  # fmt: skip

    # -- the context ---------------------------------------------------------------------------------------------------

    def _context(self) -> list[str]:
        """All keys; every head keeps the newest one, so that a tile can be skipped for it."""
        return [*self._newest(), *self._loop()] if self.region.skip else [*self._loop(), *self._newest()]

    def _loop(self) -> list[str]:
        region, begin, end = self.region, "split * each", "tl.minimum((split + 1) * each, tiles)"
        first = "first = lo + tile * BLOCK_T"
        if self.kept:
            first = "first = tl.where(tile * BLOCK_T < ahead, tile * BLOCK_T, lo + tile * BLOCK_T - ahead)"
        keys, there = [first, "t = first + tl.arange(0, BLOCK_T)"], "t < end"
        if self.listed is not None:
            keys, there = self._listed_keys(), "(place < many) & (t < end)"
        if self.kept and region.window is not None:
            there = f"({there}) & (t > start - {region.window})"
        tile = [f"tile = {end} - 1 - back"] if region.skip else []  # what scores high early lets more be skipped
        visit = self._visit()
        if self.kept.is_tested:
            visit = [f"if {self.kept.worth()}:", *indented(visit)]
        body = [
            *tile, *keys, f"there = {there}", *self.kept.tile("BLOCK_T"), *visit
        ]  # fmt: skip
        span = f"back in range(0, {end} - {begin})" if region.skip else f"tile in range({begin}, {end})"
        return [f"for {span}:", *indented(body)]

    def _listed_keys(self) -> list[str]:
        """``t``: keys of blocks that lie side by side in the list, not in memory."""
        size = block_size(self.region)
        return [
            "place = tile * BLOCK_T + tl.arange(0, BLOCK_T)",
            f"entry = tl.load(listed_at + 1 + place // {size}, mask=place < many, other=0)",
            f"t = origin + (entry >> 1) * {size} + place % {size}", "best = (entry & 1) != 0",
        ]  # fmt: skip

    def _visit(self) -> list[str]:
        """One tile of keys, and of values where they may count."""
        values = [
            *self.softmax.step(guarded=True), *self.v.load("there"),
            *([] if self.v.scale is None else ["p = p * v_scales[None, :]"]),
            f"acc = tl.dot(p.to({self.g.dtype}), value, acc{self.g.precision})",
        ]  # fmt: skip
        if self.region.skip:
            values = [*self.softmax.enough(), "if enough:", *indented(values)]
        return [
            *page(self.writer, self.region, "t", "there"), *self.k.load("there"),
            f"s = tl.dot(q_new, tl.trans(key){self.g.precision})", *self.nearer.scores(),
            *([] if self.k.scale is None else ["s = s * k_scales[None, :]"]),
            *self._scores(["there[None, :]", *self.kept.seen()], "there"), *values,
        ]  # fmt: skip

    def _scores(self, seen: Sequence[str], mask: str | None) -> list[str]:
        region = self.region
        counts = [] if region.key_mask is None else ["counts[None, :]"]
        bias = None
        if region.bias is not None:
            place = address(self.writer, region.bias, "bias", ["b", "head[:, None]", None, "t[None, :]"])
            bias = f"tl.load({place}{masked('row_in[:, None]', across(mask), other='0.0')})"
        return [*key_mask(self.writer, region, mask), *self.softmax.scores([*seen, *counts], bias)]

    def _newest(self) -> list[str]:
        """The key and the value of this step: into the cache, and scored from registers, by the last program."""
        if not self.cached:
            return []
        region = self.region
        writes = "(part == 0)" if self.parts > 1 else None
        place = address(self.writer, region.v, "v", ["b", "g", None, "e[None, :]"])
        body = [
            *self._own_block(),
            "at = start.to(tl.int64) + tl.arange(0, 1)", "t = start + tl.arange(0, 1)",
            *page(self.writer, region, "t", None),
            *self.turn.load("k_new", region.k, "k", ["b", "g", None], None),
            *less_offset(self.writer, region, self.g.width),
            f"v_new = tl.load({place}{masked(across(inside('e', self.g.value_width)), other='0.0')})",
            *self.k.append("1", None, writes), *self.v.append("1", None, writes),
            *self._newest_score(), *self._own_bounds(writes),
            *self._scores([], None), *self.softmax.step(guarded=True), "acc += p * v_new.to(tl.float32)",
        ]  # fmt: skip
        return ["if split == busy - 1:", *indented(body)]

    def _own_block(self) -> list[str]:
        """``low_of`` and ``high_of`` of the block ``c`` that the new key belongs to, without that key."""
        if self.listed is None:
            return []
        size = block_size(self.region)
        return [
            f"own = tl.maximum(u, 0) // {size}", "c = own + tl.zeros((1,), tl.int32)", f"begin = origin + own * {size}",
            *no_bounds(padded(self.g.width)), *Bounds(self.writer, self.region).grow(self.k, "start", "BLOCK_T"),
        ]  # fmt: skip

    def _own_bounds(self, writes: str | None) -> list[str]:
        """The same with the new key, into memory."""
        if self.listed is None:
            return []
        ends = [f"{n}_of = tl.{m}({n}_of, k_new.to(tl.float32))" for n, m in (("low", "minimum"), ("high", "maximum"))]
        return [*ends, *Bounds(self.writer, self.region).store(inside("d", self.g.width), writes)]

    def _newest_score(self) -> list[str]:
        q = "q_new"
        if self.nearer:
            q = f"tl.where(start < {self.region.first}, q_near, q_new)"
        return [f"s = tl.sum({q}.to(tl.float32) * k_new.to(tl.float32), 1, keep_dims=True)"]

    # -- the end -------------------------------------------------------------------------------------------------------

    def _end(self) -> list[str]:
        """One program writes its values; several leave them in scratch, and the last to arrive joins all of them."""
        region, width = self.region, self.g.value_width
        out = address(self.writer, region.out, "out", ["b", "head[:, None]", None, "e[None, :]"])
        channels = across(inside("e", width))
        alone = [
            *self.softmax.finish(),
            *self._level("head", level("top", "total"), "row_in"),
            f"tl.store({out}, acc{masked('row_in[:, None]', channels)})",
        ]
        scratch, counters = self.writer.pointer("scratch"), self.writer.pointer("counters")
        stored_rows = f"row < {self.share}"
        share = [
            f"part_of = (pair * splits + split) * {self.share} + row",
            f"tl.store(sums_at + part_of[:, None] * {width} + e[None, :], acc"
            f"{masked(column(f'({stored_rows})'), channels)})",
            f"tl.store(tops_at + part_of, top, mask={stored_rows})",
            f"tl.store(totals_at + part_of, total, mask={stored_rows})",
            "tl.debug_barrier()", f'arrived = tl.atomic_add({counters} + pair, 1, sem="acq_rel")',
            "if arrived == busy - 1:", *indented([f"tl.store({counters} + pair, 0)", *self._join()]),
        ]  # fmt: skip
        size = f"tl.num_programs(0) * splits * {self.share}"
        places = [
            "splits = tl.num_programs(1)", f"sums_at = {scratch}", f"tops_at = {scratch} + {size} * {width}",
            f"totals_at = tops_at + {size}",
        ]  # fmt: skip
        return ["if busy == 1:", *indented(alone), "else:", *indented([*places, *share])]

    def _join(self) -> list[str]:
        """All parts of the context, in their order: ``column`` runs over the heads and channels of the program."""
        width, size = self.g.value_width, self.share * self.g.value_width
        rest = [f"(part * {self.share} + r < {self.g.share})"] if self.g.share % self.share else []
        out = address(self.writer, self.region.out, "out", ["b", "of", None, f"(column % {width})"])
        held = "mask=held, other="
        body = [
            "column = chunk + tl.arange(0, COLUMNS)", f"here = column < {size}", f"r = column // {width}",
            f"of = {self._head('r')}", f"parts = (pair * splits + i) * {self.share} + r[None, :]",
            "held = (i < busy) & here[None, :]", f'tops = tl.load(tops_at + parts, {held}float("-inf"))',
            f"totals = tl.load(totals_at + parts, {held}0.0)",
            f"sums = tl.load(sums_at + (pair * splits + i) * {size} + column[None, :], {held}0.0)",
            "peak = tl.max(tops, 0)", 'peak = tl.where(peak == float("-inf"), 0.0, peak)',
            "weight = tl.exp2(tops - peak[None, :])", "divisor = tl.sum(totals * weight, 0)", *self._joined_sinks(),
            *self._level("of", level("peak", "divisor"), " & ".join(["here", f"(column % {width} == 0)", *rest])),
            "joined = tl.sum(sums * weight, 0) / tl.where(divisor == 0.0, 1.0, divisor)",
            f"tl.store({out}, joined{masked('here', *rest)})",
        ]  # fmt: skip
        return [
            # as many at once as registers hold
            "COLUMNS: tl.constexpr = 4096 // SPLITS", "i = tl.arange(0, SPLITS)[:, None]",
            f"for chunk in range(0, {size}, COLUMNS):", *indented(body),
        ]  # fmt: skip

    def _level(self, head: str, level: str, mask: str) -> list[str]:
        if self.levels is None:
            return []
        return [f"tl.store({address(self.writer, self.levels, 'level', ['b', head])}, {level}, mask={mask})"]

    def _joined_sinks(self) -> list[str]:
        if self.region.sinks is None:
            return []
        place = address(self.writer, self.region.sinks, "sinks", ["of"])
        mask = f"here & (of < {self.g.heads})"
        return [
            f"logit = tl.load({place}{masked(mask, other='0.0')}).to(tl.float32) * {LOG2E}",
            "divisor += tl.exp2(logit - peak)",
        ]  # fmt: skip

    def _head(self, row: str) -> str:
        """The query head of a row of the program."""
        parts = [f"g * {self.g.share}"] if self.g.kv_heads > 1 else []
        parts += [f"part * {self.share}"] if self.parts > 1 else []
        return " + ".join([*parts, row])
