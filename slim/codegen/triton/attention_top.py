"""The best blocks of keys: bounds of what a block can score, and the blocks that each query chooses by them.

What a query could at most score in a block is a product with the highest numbers where it is positive, and with the
lowest where it is negative (Tang et al. 2024, "Quest"). Heads that share keys choose together: a block ranks by how
near it comes to a head's best.
"""

from __future__ import annotations

from slim.codegen.regions.schedule import Attention
from slim.codegen.regions.views import View
from slim.codegen.triton.attention_cache import stored
from slim.codegen.triton.attention_choices import (
    Bounds,
    Choices,
    block_size,
    keeps_bounds,
    most_blocks,
    no_bounds,
)
from slim.codegen.triton.attention_parts import address, geometry, held, inside, padded
from slim.codegen.triton.attention_pattern import Kept
from slim.codegen.triton.kernel import Config, Kernel
from slim.codegen.triton.rotation import Turn
from slim.codegen.triton.text import number
from slim.codegen.triton.writer import Target, Writer, indented, power_of_two

_ROWS = 64  # query heads that are scored at once, at most


def note_bounds(region: Attention, target: Target, kept: dict[str, View]) -> Kernel:
    """A program takes one of the blocks that new keys belong to."""
    writer, g, size = Writer(region, target), geometry(region), block_size(region)
    assert region.k_bounds is not None
    k, _ = stored(writer, region, g.dtype, kept)
    pattern = Kept(writer, region, "u", "h", lambda first, last: "True")
    bounds, block = Bounds(writer, region), min(64, power_of_two(size))
    channels = inside("d", g.width)
    queries = writer.size(region.q.shape[2])
    grown, blocks = "tl.zeros((), tl.int32)", writer.size(most_blocks(region))
    if keeps_bounds(region):
        grown, blocks = f"tl.maximum(start - origin, 0) // {size}", f"triton.cdiv({queries}, {size}) + 1"
    body = [
        "g = tl.program_id(1)", "b = tl.program_id(2).to(tl.int64)",
        f"start = tl.cast({held(writer, region)}, tl.int32)", _keys(writer, region), *pattern.begin(),
        f"grown = {grown}", "c = grown + tl.program_id(0) + tl.arange(0, 1)",
        f"begin = origin + (grown + tl.program_id(0)) * {size}", f"until = tl.minimum(begin + {size}, keys)",
        "if begin < keys:",
        *indented([
            *g.channels(), *k.begin("BLOCK_T"), *no_bounds(padded(g.width)), *bounds.grow(k, "until", "BLOCK_T"),
            *bounds.store(channels),
        ]),
    ]  # fmt: skip
    grid = [blocks, str(g.kv_heads), writer.size(region.k.shape[0])]
    return writer.kernel("note_bounds", body, [dict(BLOCK_T=max(16, block), num_warps=4)], grid)


def _keys(writer: Writer, region: Attention) -> str:
    if region.k_cache is None:
        return f"keys = tl.cast({writer.size(region.k.shape[2])}, tl.int32)"
    return f"keys = start + {writer.size(region.q.shape[2])}"


class _Chooser:
    """What the kernels of one query and of many share."""

    def __init__(self, region: Attention, target: Target) -> None:
        assert region.pattern is not None
        assert region.pattern.top is not None
        self.region, self.target = region, target
        self.writer, self.g = Writer(region, target), geometry(region)
        self.size, self.share = region.pattern.top.size, region.pattern.top.share
        self.blocks = self.writer.size(most_blocks(region))
        self.bounds = Bounds(self.writer, region)
        self.turn = Turn(self.writer, region.rope, inside("d", self.g.width), padded(self.g.width))
        self.order, self.nth = self.writer.function("descent"), self.writer.function("nth_highest")

    def scored(self) -> list[str]:
        """``s`` [queries, blocks], the most that ``q_up`` and ``q_down`` can score in the blocks ``c``."""
        dot = f"tl.dot({{}}, tl.trans({{}}){self.g.precision})"
        return [
            *self.bounds.load(self.g.dtype, "there", inside("d", self.g.width)),
            f"s = {dot.format('q_up', 'high_of')} + {dot.format('q_down', 'low_of')}",
            f"s = s * {number(self.region.scale)}",
        ]  # fmt: skip

    def signs(self) -> list[str]:
        return ["q_up = tl.maximum(q_new, 0.0).to(q_new.dtype)", "q_down = tl.minimum(q_new, 0.0).to(q_new.dtype)"]


class _ChooseMany(_Chooser):
    """A program takes BLOCK_Q queries of one kv head after the other; ranks of all their blocks lie in its scratch."""

    def kernel(self, choices: Choices) -> Kernel:
        assert choices.tops is not None
        region, writer = self.region, self.writer
        queries, batch = writer.size(region.q.shape[2]), writer.size(region.q.shape[0])
        units = f"triton.cdiv({queries}, BLOCK_Q) * {batch} * {self.g.kv_heads}"
        grid = f"min({units}, {4 * self.target.processors})"
        pattern = Kept(writer, region, "u", "h", lambda first, last: "True")
        pairs = f"({batch} * {self.g.kv_heads})"
        program = [
            f"pair = unit % {pairs}", f"m = unit // {pairs} * BLOCK_Q", f"g = pair % {self.g.kv_heads}",
            f"b = (pair // {self.g.kv_heads}).to(tl.int64)", f"start = tl.cast({held(writer, region)}, tl.int32)",
            _keys(writer, region), *pattern.begin(), "i = m + tl.arange(0, BLOCK_Q)", f"row_in = i < {queries}",
            f"own = tl.maximum(start + i - origin, 0) // {self.size}",
            f"last = tl.maximum(start + tl.minimum(m + BLOCK_Q, {queries}) - 1 - origin, 0) // {self.size}",
            *self.turn.begin(), *self.turn.angles("tl.cast(i, tl.int64)[:, None]", "row_in[:, None]"),
        ]  # fmt: skip
        body = [
            f"ranks = {writer.pointer('scratch')}.to(tl.pointer_type(tl.int32), bitcast=True)",
            f"ranks += tl.program_id(0).to(tl.int64) * (BLOCK_Q * {self.blocks})",
            f"ranks += tl.arange(0, BLOCK_Q)[:, None] * {self.blocks}", *self.g.channels(),
            f"for unit in range(tl.program_id(0), tl.cdiv({queries}, BLOCK_Q) * {pairs}, tl.num_programs(0)):",
            *indented([*program, *self._ranks(), *self._chosen(choices.tops)]),
        ]  # fmt: skip
        configs: list[Config] = [
            dict(BLOCK_Q=rows, BLOCK_C=blocks, num_warps=warps, num_stages=2)
            for rows, blocks, warps in ((16, 32, 8), (32, 32, 8), (16, 32, 4), (64, 32, 8))
        ]
        return writer.kernel("choose_blocks", body, configs, [grid], f"{grid} * BLOCK_Q * {self.blocks}")

    def _ranks(self) -> list[str]:
        """For each head its best block, then how near to it the others come."""
        row = "tl.cast(i, tl.int64)[:, None]"
        tile = [
            "c = first + tl.arange(0, BLOCK_C)", "there = c < last", *self.scored(),
            's = tl.where((c[None, :] < own[:, None]) & there[None, :], s, float("-inf"))',
        ]  # fmt: skip
        store = [
            f"x = {self.order}(s - best[:, None])", "if h > 0:",
            "    x = tl.maximum(x, tl.load(ranks + c[None, :], mask=there[None, :], other=0))",
            "tl.store(ranks + c[None, :], x, mask=there[None, :])",
        ]  # fmt: skip
        body = [
            f"head = g * {self.g.share} + h",
            *self.turn.load("q_new", self.region.q, "q", ["b", "head", row], "row_in[:, None]"), *self.signs(),
            'best = tl.full((BLOCK_Q,), float("-inf"), tl.float32)', "for first in range(0, last, BLOCK_C):",
            *indented([*tile, "best = tl.maximum(best, tl.max(s, 1))"]),
            'best = tl.where(best == float("-inf"), 0.0, best)', "for first in range(0, last, BLOCK_C):",
            *indented([*tile, *store]), "tl.debug_barrier()  # ranks are read by other threads than wrote them",
        ]  # fmt: skip
        return [f"for h in range(0, {self.g.share}):", *indented(body)]

    def _chosen(self, tops: View) -> list[str]:
        """The blocks that rank high enough, as bits."""
        row = address(self.writer, tops, "tops", ["b", "g", "tl.cast(i, tl.int64)[:, None]", "word[None, :]"])
        body = [
            "c = first + tl.arange(0, BLOCK_C)", "there = c < last",
            "x = tl.load(ranks + c[None, :], mask=there[None, :], other=-1)",
            "bits = (x >= limit[:, None]) & (c[None, :] < own[:, None])",
            "bits = tl.reshape(bits.to(tl.int64) << (c % 32)[None, :], (BLOCK_Q, BLOCK_C // 32, 32))",
            "word = first // 32 + tl.arange(0, BLOCK_C // 32)",
            f"tl.store({row}, tl.sum(bits, 2).to(tl.int32), mask=row_in[:, None] & (word <= last // 32)[None, :])",
        ]  # fmt: skip
        return [
            f"limit = {self.nth}(ranks, last, (own + {self.share - 1}) // {self.share}, BLOCK_C)",
            "for first in range(0, last + 1, BLOCK_C):", *indented(body),
            "tl.debug_barrier()  # the next ranks are written where these were read",
        ]  # fmt: skip


class _ChooseOne(_Chooser):
    """Programs score blocks side by side; the last one of a kv head ranks them and lists those to be looked at."""

    def __init__(self, region: Attention, target: Target) -> None:
        super().__init__(region, target)
        self.rows = min(_ROWS, max(16, power_of_two(self.g.share)))
        self.parts = -(-self.g.share // self.rows)

    def kernel(self, choices: Choices) -> Kernel:
        assert choices.listed is not None
        region, writer = self.region, self.writer
        pairs = f"{writer.size(region.q.shape[0])} * {self.g.kv_heads}"
        splits = f"max(1, min(SPLITS, {4 * self.target.processors} // ({pairs})))"
        each_head = power_of_two(self.g.share)
        self.kept = Kept(writer, region, "u", "head[:, None]", self._works_on)
        scratch, counters = writer.pointer("scratch"), writer.pointer("counters")
        body = [
            "pair = tl.program_id(0)", "split = tl.program_id(1)", f"g = pair % {self.g.kv_heads}",
            f"b = (pair // {self.g.kv_heads}).to(tl.int64)", f"start = tl.cast({held(writer, region)}, tl.int32)",
            "keys = start + 1", *self.kept.begin(), "u = start - origin", "u_first = u", "u_last = u",
            f"own = tl.maximum(u, 0) // {self.size}", *self.g.channels(), f"row = tl.arange(0, {self.rows})",
            f"room = {scratch} + pair.to(tl.int64) * ({self.g.share + 1} * {self.blocks})",
            f"ranks = (room + {self.g.share} * {self.blocks}).to(tl.pointer_type(tl.int32), bitcast=True)",
            *self._scores(), "tl.debug_barrier()  # all of this program's scores are stored before it is counted",
            f'arrived = tl.atomic_add({counters} + pair, 1, sem="acq_rel")',
            "if arrived == tl.num_programs(1) - 1:",
            *indented([
                f"tl.store({counters} + pair, 0)", *self._ranks(),
                f"head = g * {self.g.share} + tl.arange(0, {each_head})", *self._list(choices.listed),
            ]),
        ]  # fmt: skip
        configs: list[Config] = [
            dict(BLOCK_C=blocks, SPLITS=many, num_warps=4, num_stages=stages)
            for blocks, many, stages in ((32, 16, 2), (64, 16, 2), (32, 32, 2), (32, 8, 3), (16, 32, 2))
        ]
        room = f"{pairs} * {self.g.share + 1} * {self.blocks}"
        return writer.kernel("choose_blocks_of_one", body, configs, [pairs, splits], room, pairs)

    def _works_on(self, first: int, last: int) -> str:
        head = f"g * {self.g.share}"
        return f"({head} <= {last}) & ({head} + {self.g.share} > {first})"

    def _parts(self, body: list[str]) -> list[str]:
        """``body`` for the heads ``of`` of each part of the group, of which those ``row_in`` are there."""
        lines = [f"of = part * {self.rows} + row", f"row_in = of < {self.g.share}", *body]
        return [f"for part in range(0, {self.parts}):", *indented(lines)]

    def _scores(self) -> list[str]:
        tile = [
            "c = first + tl.arange(0, BLOCK_C)", "there = c < own", *self.scored(),
            f"tl.store(room + of[:, None] * {self.blocks} + c[None, :], s, mask=row_in[:, None] & there[None, :])",
        ]  # fmt: skip
        head = f"(g * {self.g.share} + of)[:, None]"
        body = [
            *self.turn.load("q_new", self.region.q, "q", ["b", head, None], "row_in[:, None]"), *self.signs(),
            "for first in range(split * BLOCK_C, own, tl.num_programs(1) * BLOCK_C):", *indented(tile),
        ]  # fmt: skip
        return [*self.turn.begin(), *self.turn.angles(None), *self._parts(body)]

    def _ranks(self) -> list[str]:
        tile = [
            "c = first + tl.arange(0, 128)", "there = c < own",
            f"s = tl.load(room + of[:, None] * {self.blocks} + c[None, :], mask=row_in[:, None] & there[None, :], "
            'other=float("-inf"), cache_modifier=".cg")',
        ]  # fmt: skip
        store = [
            f"x = tl.max({self.order}(s - best[:, None]), 0)", "if part > 0:",
            "    x = tl.maximum(x, tl.load(ranks + c, mask=there, other=0))", "tl.store(ranks + c, x, mask=there)",
        ]  # fmt: skip
        body = [
            f'best = tl.full(({self.rows},), float("-inf"), tl.float32)', "for first in range(0, own, 128):",
            *indented([*tile, "best = tl.maximum(best, tl.max(s, 1))"]),
            'best = tl.where(best == float("-inf"), 0.0, best)', "for first in range(0, own, 128):",
            *indented([*tile, *store]), "tl.debug_barrier()  # ranks are read by other threads than wrote them",
        ]  # fmt: skip
        return self._parts(body)

    def _list(self, listed: View) -> list[str]:
        """Blocks that some head keeps keys of, in their order."""
        body = [
            "c = first + tl.arange(0, 512)", "x = tl.load(ranks + c, mask=c < own, other=-1)",
            "best = ((x >= limit) & (c < own)) | (c == own)", f"j_first = c * {self.size}",
            f"j_last = j_first + {self.size - 1}", f"visited = (c <= own) & {self.kept.worth()}",
            "place = visits + tl.cumsum(visited.to(tl.int32), 0)",
            "tl.store(listed_at + place, c * 2 + best.to(tl.int32), mask=visited)",
            "visits += tl.sum(visited.to(tl.int32), 0)",
        ]  # fmt: skip
        wanted = f"tl.zeros((1,), tl.int32) + (own + {self.share - 1}) // {self.share}"
        return [
            f"limit = {self.nth}(ranks + tl.zeros((1, 1), tl.int32), own, {wanted}, 512)",
            f"listed_at = {address(self.writer, listed, 'listed', ['b', 'g'])}", "visits = tl.zeros((), tl.int32)",
            "for first in range(0, own + 1, 512):", *indented(body), "tl.store(listed_at, visits)",
        ]  # fmt: skip


def choose(region: Attention, target: Target, choices: Choices) -> Kernel:
    """The kernel that fills ``choices.tops``."""
    return _ChooseMany(region, target).kernel(choices)


def choose_of_one(region: Attention, target: Target, choices: Choices) -> Kernel:
    """The kernel that fills ``choices.listed``."""
    return _ChooseOne(region, target).kernel(choices)
