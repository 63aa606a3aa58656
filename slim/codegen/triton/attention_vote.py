"""Columns and slashes: the last queries of a prompt vote with their attention (Jiang et al. 2024, "MInference")."""

from __future__ import annotations

from slim.codegen.regions.schedule import Attention
from slim.codegen.regions.views import View
from slim.codegen.triton.attention_cache import page, stored
from slim.codegen.triton.attention_choices import Choices, most_keys
from slim.codegen.triton.attention_parts import LOG2E, address, geometry, held, inside, key_mask, padded
from slim.codegen.triton.attention_pattern import Kept
from slim.codegen.triton.kernel import Config, Kernel
from slim.codegen.triton.rotation import Turn
from slim.codegen.triton.text import number
from slim.codegen.triton.writer import Target, Writer, indented
from slim.compiler.patterns.choose import VOTERS

_CONFIGS: tuple[Config, ...] = tuple(
    dict(BLOCK_N=keys, num_warps=warps, num_stages=2) for keys, warps in ((64, 8), (64, 4), (32, 4), (128, 8))
)
_PIECE = 1024  # keys whose sums are looked at together


def vote(region: Attention, target: Target, choices: Choices, kept: dict[str, View]) -> Kernel:
    """A program takes one head: the weights of its voters, their sums, and what is highest among them."""
    return _Vote(region, target, kept).kernel(choices)


class _Vote:
    def __init__(self, region: Attention, target: Target, kept: dict[str, View]) -> None:
        self.region = region
        self.writer, self.g = Writer(region, target), geometry(region)
        self.k, _ = stored(self.writer, region, self.g.dtype, kept)
        self.turn = Turn(self.writer, region.rope, inside("d", self.g.width), padded(self.g.width))
        self.room = self.writer.size(most_keys(region))

    def kernel(self, choices: Choices) -> Kernel:
        assert self.region.pattern is not None
        assert self.region.pattern.vote is not None
        assert choices.columns is not None
        assert choices.slashes is not None
        term, batch = self.region.pattern.vote, self.writer.size(self.region.q.shape[0])
        barrier = "tl.debug_barrier()  # what follows is read by other threads than wrote it"
        body = [
            *self._program(), *self._statistics(), *self._weights(), barrier, *self._slashes(), barrier,
            *Kept(self.writer, self.region, "u", "h", lambda first, last: "True").begin(),
            *self._highest("column", term.columns, choices.columns, f"(keys - origin < {VOTERS})"),
            *self._highest("slash", term.slashes, choices.slashes, "(place == 0)"),
        ]  # fmt: skip
        grid = [str(self.g.heads), batch]
        return self.writer.kernel(
            "vote", body, _CONFIGS, grid, f"{self.g.heads} * {batch} * {VOTERS + 2} * {self.room}"
        )

    def _program(self) -> list[str]:
        region, writer = self.region, self.writer
        queries = writer.size(region.q.shape[2])
        keys = f"start + {queries}" if region.k_cache is not None else writer.size(region.k.shape[2])
        row = "tl.cast(i, tl.int64)[:, None]"
        scratch = writer.pointer("scratch")
        return [
            "h = tl.program_id(0)", "b = tl.program_id(1).to(tl.int64)",
            f"g = h // {self.g.share}" if self.g.share > 1 else "g = h",
            f"start = tl.cast({held(writer, region)}, tl.int32)", f"keys = tl.cast({keys}, tl.int32)",
            f"voter = tl.arange(0, {VOTERS})", f"i = {queries} - {VOTERS} + voter", "index = start + i",
            *self.g.channels(), *self.turn.begin(), *self.turn.angles(row),
            *self.turn.load("q_new", region.q, "q", ["b", "h", row], None), *self.k.begin("BLOCK_N"),
            f"weights = {scratch} + (b * {self.g.heads} + h) * {VOTERS + 2} * {self.room}",
            f"column_sums = weights + {VOTERS} * {self.room}", f"slash_sums = column_sums + {self.room}",
        ]  # fmt: skip

    def _scores(self) -> list[str]:
        """``s`` of the tile that begins with key ``first``, in units of log 2."""
        region = self.region
        seen = ["there[None, :]"]
        if region.causal:
            seen.append("(t[None, :] <= index[:, None])")
        if region.window is not None:
            seen.append(f"(index[:, None] - t[None, :] < {region.window})")
            if not region.causal:
                seen.append(f"(t[None, :] - index[:, None] < {region.window})")
        if region.key_mask is not None:
            seen.append("counts[None, :]")
        return [
            "t = first + tl.arange(0, BLOCK_N)", "there = t < keys", *page(self.writer, region, "t", "there"),
            *self.k.load("there"), f"s = tl.dot(q_new, tl.trans(key){self.g.precision})",
            *([] if self.k.scale is None else ["s = s * k_scales[None, :]"]), f"s = s * {number(region.scale * LOG2E)}",
            *key_mask(self.writer, region, "there"), f's = tl.where({" & ".join(seen)}, s, float("-inf"))',
        ]  # fmt: skip

    def _statistics(self) -> list[str]:
        body = [
            *self._scores(), "most = tl.maximum(top, tl.max(s, 1))",
            'base = tl.where(most == float("-inf"), 0.0, most)',
            "total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)", "top = most",
        ]  # fmt: skip
        return [
            f'top = tl.full(({VOTERS},), float("-inf"), tl.float32)', f"total = tl.zeros(({VOTERS},), tl.float32)",
            "for first in range(0, keys, BLOCK_N):", *indented(body),
            'top = tl.where(top == float("-inf"), 0.0, top)', "total = tl.where(total == 0.0, 1.0, total)",
        ]  # fmt: skip

    def _weights(self) -> list[str]:
        """Each voter's weights into scratch, and their sums by keys; ``later`` is what goes to keys after a voter."""
        later = [] if self.region.causal else [
            "later += tl.sum(tl.sum(tl.where(t[None, :] > index[:, None], p, 0.0), 1), 0)"
        ]  # fmt: skip
        body = [
            *self._scores(), "p = tl.exp2(s - top[:, None]) / total[:, None]",
            f"tl.store(weights + voter[:, None] * {self.room} + t[None, :], p, mask=there[None, :])",
            "tl.store(column_sums + t, tl.sum(p, 0), mask=there)", *later,
        ]  # fmt: skip
        begin = [] if self.region.causal else ["later = tl.zeros((), tl.float32)"]
        return [*begin, "for first in range(0, keys, BLOCK_N):", *indented(body)]

    def _slashes(self) -> list[str]:
        """The sums by distances; keys after a voter are at none."""
        later = [] if self.region.causal else ["total_of = tl.where(apart == 0, total_of + later, total_of)"]
        each = [
            f"t = keys - {VOTERS} + one - apart",
            f"total_of += tl.load(weights + one * {self.room} + t, mask=(t >= 0) & (apart < keys), other=0.0)",
        ]  # fmt: skip
        body = [
            f"apart = first + tl.arange(0, {_PIECE})", f"total_of = tl.zeros(({_PIECE},), tl.float32)",
            f"for one in range(0, {VOTERS}):", *indented(each), *later,
            "tl.store(slash_sums + apart, total_of, mask=apart < keys)",
        ]  # fmt: skip
        return [f"for first in range(0, keys, {_PIECE}):", *indented(body)]

    def _highest(self, name: str, count: int, out: View, always: str) -> list[str]:
        """The ``count`` highest sums, and all that equal the last of them: floats of no sign order as their bits do."""
        nth = self.writer.function("nth_highest")
        to = address(self.writer, out, f"{name}s", ["b", "h"])
        kept = f"((x >= limit) | {always}) & (place < keys)"
        body = [
            f"place = first + tl.arange(0, {_PIECE})", f"x = tl.load({name}_bits + place, mask=place < keys, other=-1)",
            f"kept = ({kept}).to(tl.int32)", "before = many + tl.cumsum(kept, 0) - kept",
            f"tl.store({to} + place, before * 2 + kept, mask=place < keys)", "many += tl.sum(kept, 0)",
        ]  # fmt: skip
        one = f"{name}_bits + tl.zeros((1, 1), tl.int32)"
        return [
            f"{name}_bits = {name}_sums.to(tl.pointer_type(tl.int32), bitcast=True)",
            f"limit = {nth}({one}, keys, tl.full((1,), {count}, tl.int32), {_PIECE})",
            "many = tl.zeros((), tl.int32)", f"for first in range(0, keys, {_PIECE}):", *indented(body),
        ]  # fmt: skip
