"""Attention in Triton, interpreted, against the dialect's own: with and without caches, in every format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from slim.codegen.regions.schedule import Attention
from slim.codegen.regions.views import Buffer, View, contiguous_strides
from slim.codegen.triton.kernel import Config, Kernel
from slim.codegen.triton.writer import WRITERS, Target
from slim.compiler.dialect.attention import attend
from slim.compiler.dialect.kv import add_mass
from slim.compiler.patterns import read_pattern
from slim.compiler.patterns.mask import note_bounds
from tests.codegen.triton.run import run

B, S, T = (sympy.Symbol(name, integer=True, positive=True) for name in "BST")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SPARE = 5  # tokens that a cache has room for and no call fills


@dataclass(frozen=True)
class Case:
    """What a call is given. ``held`` tokens are in the cache before; None is a call without a cache."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    width: int = 24
    value_width: int | None = None
    queries: int = 1
    held: int | None = 21
    keys: int | None = None  # of cross attention
    dtype: torch.dtype = F32
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    rope: str | None = None  # "half", "interleaved", "partial"
    padding: int = 0  # how many of the first keys row 0 does not see
    sinks: bool = False
    slopes: bool = False
    bias: bool = False
    offset: bool = False  # taken off the keys that a cache holds
    quantised: int = 0  # bits of the cache's numbers; 0 are floats
    page: int | None = None  # tokens of a page
    pattern: str | None = None
    votes: int | None = None  # queries whose weights are counted; 0 for all of them
    first: int = 0  # keys that are looked at with queries of their own
    splits: int = 2
    scale: float = 0.3

    @property
    def total(self) -> int:
        return self.keys or (self.held or 0) + self.queries

    @property
    def config(self) -> Config:
        if self.queries == 1 and (self.held is not None or self.rope is None):
            return dict(BLOCK_T=16, SPLITS=self.splits, num_warps=4, num_stages=1)
        return dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)


@dataclass
class Call:
    """A region, its memory, and what should come out of it."""

    region: Attention
    tensors: dict[Buffer, Tensor]
    q: Tensor
    k: Tensor  # as a later step reads them: rotated, through the cache's format, [B, G, T, D]
    v: Tensor
    case: Case
    options: dict[str, Tensor] = field(default_factory=dict)
    pages: Tensor | None = None
    kernels: list[Kernel] = field(default_factory=list)

    @property
    def out(self) -> Tensor:
        return strided(self.region.out, self.tensors, self.case)

    @property
    def expected(self) -> Tensor:
        """The dialect's attention in float32."""
        case, options = self.case, self.options
        q, k = self.q, self.k
        if case.first:  # pairs of keys, of which each query meets one
            near = (torch.arange(case.total) < case.first)[:, None]
            q, k = torch.cat([q, options["q_first"]], -1), torch.cat([k.masked_fill(near, 0.0), k * near], -1)
        return attend(
            q, k, self.v, options.get("key_mask"), options.get("bias"), options.get("sinks"),
            options.get("slopes"), scale=case.scale, causal=case.causal, window=case.window, softcap=case.softcap,
            pattern=case.pattern, offset=case.held or 0,
        )  # fmt: skip

    @property
    def mass(self) -> Tensor:
        """What keys have got before, and what the call gives them."""
        case, options = self.case, self.options
        units = torch.eye(case.total).expand(case.batch, case.kv_heads, -1, -1)
        more = (options.get(name) for name in ("key_mask", "bias", "sinks", "slopes"))
        look: dict[str, Any] = dict(scale=case.scale, causal=case.causal, window=case.window, softcap=case.softcap)
        weights = attend(self.q, self.k, units, *more, **look, offset=case.held or 0)
        mass = torch.arange(float(case.total)).expand(case.batch, case.kv_heads, -1).clone()
        add_mass(mass, weights, case.held or 0, case.votes or 0)
        return mass

    def cache(self, name: str) -> Tensor:
        """What the cache holds, as floats [B, G, T, width]."""
        read = {kind: self._unpaged(f"{name}_{kind}") for kind in ("cache", "scale")}
        held = read["cache"]
        assert held is not None
        if held.dtype == torch.uint8:
            held = torch.stack([held & 15, held >> 4], -1).flatten(-2).int() - 8
        return held.float() if read["scale"] is None else held.float() * read["scale"].float()[..., None]

    def _unpaged(self, name: str) -> Tensor | None:
        view = getattr(self.region, name)
        if view is None:
            return None
        tensor = self.tensors[view.buffer]
        if self.pages is None:
            return tensor[:, :, : self.case.total]
        rows = [torch.cat([tensor[int(page)] for page in row], 1) for row in self.pages]
        return torch.stack(rows)[:, :, : self.case.total]


def strided(view: View, tensors: Mapping[Buffer, Tensor], case: Case) -> Tensor:
    """The numbers of a view."""
    bound = {B: case.batch, S: case.queries, T: case.total}
    whole = [int(sympy.sympify(s).subs(bound)) for s in (*view.shape, *view.strides, view.offset)]
    rank = len(view.shape)
    return tensors[view.buffer].as_strided(whole[:rank], whole[rank : 2 * rank], whole[-1])


def called(case: Case, seed: int = 0) -> Call:
    """Random operands."""
    torch.manual_seed(seed)
    batch, heads, kv, width, queries = case.batch, case.heads, case.kv_heads, case.width, case.queries
    values, held = case.value_width or width, case.held
    tensors: dict[Buffer, Tensor] = {}

    def given(name: str, shape: tuple[Any, ...], tensor: Tensor, dtype: torch.dtype | None = None) -> View:
        tensor = tensor if dtype is None else tensor.to(dtype)
        buffer = Buffer("input", name, tensor.dtype, shape)
        tensors[buffer] = tensor.contiguous()
        return buffer.view()

    def rows(name: str, many: int, channels: int, tokens: int, size: Any) -> View:
        """[B, many, tokens, channels] inside wider rows of a projection."""
        wide = given(name, (B, size, many * channels + 8), torch.randn(batch, tokens, many * channels + 8), case.dtype)
        inner = wide.slice(2, 8, many * channels).reshape((B, size, many, channels))
        assert inner is not None
        return inner.permute((0, 2, 1, 3))

    new, fresh = (queries, S) if case.keys is None else (case.keys, T)
    q, k, v = rows("q", heads, width, queries, S), rows("k", kv, width, new, fresh), rows("v", kv, values, new, fresh)
    out = given("out", (B, S, heads, values), torch.full((batch, queries, heads, values), 9.0), case.dtype)
    region = Attention(
        fx.Graph().placeholder("x"), q, k, v, out.permute((0, 2, 1, 3)), case.scale, case.causal, case.window,
        case.softcap, pattern=None if case.pattern is None else read_pattern(case.pattern),
    )  # fmt: skip
    q_now, k_now, v_now = (strided(view, tensors, case).float() for view in (q, k, v))
    if case.rope is not None:
        half = (width // 2 if case.rope != "partial" else width // 4) // 2 * 2
        angles = torch.randn(batch, queries, half)
        interleaved = case.rope == "interleaved"
        cos, sin = (given(n, (B, S, half), f(angles), case.dtype) for n, f in (("cos", torch.cos), ("sin", torch.sin)))
        region.rope = (cos, sin, interleaved)
        turns = [tensors[view.buffer].float() for view in (cos, sin)]
        q_now, k_now = (
            torch.ops.slim.rope(x, *turns, interleaved=interleaved).to(case.dtype).float() for x in (q_now, k_now)
        )
    if case.offset:
        offset = torch.randn(kv, 1, width)
        region.k_offset = given("k_offset", (kv, 1, width), offset)
        k_now = (k_now - offset).to(case.dtype).float()
    call = Call(region, tensors, q_now, k_now, v_now, case)
    if held is not None:
        region.start = T - S
        call.pages = _cached(call, given)
    call.options = _options(case, region, given)
    if case.votes is not None:
        before = torch.arange(float(case.total + SPARE)).expand(batch, kv, -1)
        region.mass, region.votes = given("mass", (B, kv, case.total + SPARE), before), case.votes
    if region.pattern is not None and region.pattern.top is not None:
        _bounded(call, region.pattern.top.size)
    return call


def _bounded(call: Call, size: int) -> None:
    """Gives the region the bounds of blocks that hold the first tokens; without a cache, memory for them."""
    case, region = call.case, call.region
    blocks = -(-(case.total + SPARE) // size)
    bounds = torch.full((case.batch, case.kv_heads, blocks, 2, case.width), 77.0)
    mask = call.options.get("key_mask")
    if case.held:
        old = None if mask is None else mask[:, : case.held]
        note_bounds(case.pattern, call.k[:, :, : case.held], old, bounds)
    shape: tuple[Any, ...] = (B, *bounds.shape[1:])
    if case.page is not None and call.pages is not None:
        each = case.page // size
        whole = torch.full((case.batch, case.kv_heads, call.pages.shape[1] * each, 2, case.width), 77.0)
        whole[:, :, :blocks] = bounds[:, :, : whole.shape[2]]
        bounds = torch.full((call.pages.numel() + 1, case.kv_heads, each, 2, case.width), 77.0)
        bounds[call.pages.flatten().long()] = whole.unflatten(2, (-1, each)).transpose(1, 2).flatten(0, 1)
        shape = tuple(bounds.shape)
    buffer = Buffer("temp" if case.held is None else "input", "k_bounds", F32, shape)
    call.tensors[buffer] = bounds
    region.k_bounds = buffer.view()


def _cached(call: Call, given: Any) -> Tensor | None:
    """Gives the region caches that hold the first tokens, and the call all keys and values as they will be read."""
    case, pages, row = call.case, None, None
    room = case.total + SPARE
    if case.page is not None:
        most = -(-room // case.page)
        pages = torch.randperm(case.batch * most + 1)[: case.batch * most].reshape(case.batch, most).int()
        call.region.pages = given("pages", (B, most), pages)
        call.region.lengths = given("lengths", (B,), torch.full((case.batch,), case.held))
        call.region.start = None
        room, row = most * case.page, case.page
    for name in ("k", "v"):
        new = getattr(call, name)
        old = torch.randn(case.batch, case.kv_heads, case.held, new.shape[3]).to(case.dtype).float()
        everything = torch.cat([old, new], 2)
        numbers, scale = quantised(everything, case.quantised)
        setattr(call, name, everything if scale is None else unpacked(numbers).float() * scale[..., None])
        for kind, tensor in (("cache", numbers if scale is not None else numbers.to(case.dtype)), ("scale", scale)):
            if tensor is None:
                continue
            rest = tensor.shape[3:]
            memory = torch.full((case.batch, case.kv_heads, room, *rest), 77, dtype=tensor.dtype)
            memory[:, :, : case.held] = tensor[:, :, : case.held]
            shape: tuple[Any, ...] = (B, *memory.shape[1:])
            if pages is not None:
                cut = memory.unflatten(2, (-1, row)).transpose(1, 2).flatten(0, 1)
                paged = torch.full((cut.shape[0] + 1, *cut.shape[1:]), 77, dtype=tensor.dtype)
                paged[pages.flatten().long()] = cut
                memory, shape = paged, tuple(paged.shape)
            setattr(call.region, f"{name}_{kind}", given(f"{name}_{kind}", shape, memory))
    return pages


def quantised(x: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """(numbers as a cache keeps them, the scale of each token in each head)."""
    if not bits:
        return x, None
    scale = torch.ops.slim.token_scale(x, bits=bits)
    numbers = (x / scale[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
    if bits == 8:
        return numbers, scale
    plus = (numbers + 8).to(torch.uint8)
    return plus[..., 0::2] | (plus[..., 1::2] << 4), scale


def unpacked(numbers: Tensor) -> Tensor:
    if numbers.dtype != torch.uint8:
        return numbers
    return torch.stack([numbers & 15, numbers >> 4], -1).flatten(-2).int() - 8


def _options(case: Case, region: Attention, given: Any) -> dict[str, Tensor]:
    """The operands that only some calls have."""
    options: dict[str, Tensor] = {}
    if case.padding:
        mask = torch.ones(case.batch, case.total, dtype=torch.bool)
        mask[0, : case.padding] = False
        options["key_mask"] = mask
        region.key_mask = given("key_mask", (B, T), mask)
    if case.first:
        near = torch.randn(case.batch, case.heads, case.queries, case.width).to(case.dtype)
        options["q_first"] = near.float()
        region.q_first, region.first = given("q_first", (B, case.heads, S, case.width), near), case.first
    for name in ("sinks", "slopes"):
        if getattr(case, name):
            options[name] = torch.rand(case.heads)
            setattr(region, name, given(name, (case.heads,), options[name]))
    if case.bias:
        bias = torch.randn(1, case.heads, case.queries, case.total)
        bias[:, :, :, 1] = float("-inf")
        options["bias"] = bias.expand(case.batch, -1, -1, -1)
        region.bias = given("bias", (1, case.heads, S, T), bias).expand((B, case.heads, S, T))
    return options


def check(case: Case, seed: int = 0) -> Call:
    """Runs the region and compares all that it wrote."""
    call = called(case, seed)
    dims = {"B": case.batch, "S": case.queries, "T": case.total}
    call.kernels = run(call.region, call.tensors, dims, Target(["T"]), case.config)
    if case.held is not None:
        for name in ("k", "v"):
            torch.testing.assert_close(call.cache(name), getattr(call, name), **_near(case, call))
            setattr(call, name, call.cache(name))  # a number that was rounded the other way is what is attended to
    tolerance = {F32: 1e-4, F16: 5e-3, BF16: 3e-2}[case.dtype]
    torch.testing.assert_close(call.out.float(), call.expected, rtol=tolerance, atol=tolerance)
    if call.region.mass is not None:
        got = call.tensors[call.region.mass.buffer][:, :, : case.total]
        torch.testing.assert_close(got, call.mass, rtol=tolerance, atol=tolerance)
    return call


def _near(case: Case, call: Call) -> dict[str, float]:
    """How near the numbers of a cache are: one step, where what is quantised was rotated or shifted before."""
    if case.quantised and (case.rope is not None or case.offset) and case.dtype != F32:
        return dict(rtol=0.02, atol=1.1 * float(call.k.abs().max()) / (2 ** (case.quantised - 1) - 1))
    return dict(rtol=1e-2 if case.dtype == BF16 else 1e-3, atol=1e-5 if case.dtype == F32 else 1e-2)


DECODE = {
    "first_token": Case(held=0, rope="half"),
    "one_tile": Case(held=16, rope="half"),
    "several_tiles": Case(held=70, splits=4, rope="interleaved"),
    "more_splits_than_tiles": Case(held=17, splits=4),
    "one_split": Case(held=50, splits=1, rope="partial"),
    "wide_heads": Case(width=80, heads=8, kv_heads=1, batch=1, rope="half"),
    "narrow_heads": Case(width=8, heads=3, kv_heads=3, batch=3),
    "values_of_another_width": Case(width=24, value_width=40, held=40, rope="half"),
    "padding": Case(padding=19, batch=3, held=33, rope="half"),
    "window": Case(window=20, held=61, splits=4),
    "short_window": Case(window=1, held=20),
    "sinks": Case(sinks=True, held=40),
    "sinks_alone": Case(sinks=True, held=40, padding=41, splits=1),
    "slopes": Case(slopes=True, held=40, padding=3),
    "softcap": Case(softcap=2.0, sinks=True),
    "all_at_once": Case(softcap=2.0, sinks=True, slopes=True, window=30, padding=25, held=45, rope="partial"),
    "half_precision": Case(dtype=F16, width=64, held=40, rope="half"),
    "bfloat16": Case(dtype=BF16, width=64, held=40, rope="interleaved", padding=4),
    "bytes": Case(quantised=8, held=40, rope="half"),
    "bytes_of_bfloat16": Case(quantised=8, held=40, dtype=BF16, width=64, rope="half"),
    "half_bytes": Case(quantised=4, held=40, rope="half"),
    "half_bytes_less_an_offset": Case(quantised=4, held=40, rope="half", offset=True),
    "bytes_less_an_offset": Case(quantised=8, held=20, width=20, offset=True, dtype=BF16),
    "half_bytes_of_odd_width": Case(quantised=4, width=80, value_width=24, held=20, batch=1, sinks=True),
    "pages": Case(page=8, held=40, rope="half", padding=3),
    "pages_of_bytes": Case(page=16, held=40, quantised=8),
    "pages_of_half_bytes": Case(page=4, held=30, quantised=4, window=12),
    "window_and_columns": Case(pattern="window(7) | columns(2)", held=69, rope="half"),
    "heads_that_differ": Case(pattern="0: dense; 1: window(6); 2-3: stride(9) | columns(3)", held=69, window=40),
    "blocks_in_pages": Case(pattern="blocks(16, 1) | summary(16, 3)", held=50, page=8, padding=3),
    "random_blocks": Case(pattern="window(3) | random(8, 2, 5)", held=77, padding=5),
    "nearer_sinks": Case(pattern="window(9) | columns(3)", first=3, held=60, page=8, rope="half"),
    "nearer_sinks_of_bytes": Case(pattern="window(9) | columns(3)", first=3, held=2, page=8, quantised=8),
    "best_blocks": Case(pattern="top(8, 3) | columns(2)", held=69, padding=5, rope="half", splits=4),
    "best_blocks_of_some_heads": Case(
        pattern="0: dense; 1: window(6); 2-3: top(4, 2) | random(8, 1, 3)", held=61, page=8, dtype=BF16, width=64
    ),
    "best_blocks_of_bytes": Case(pattern="top(16, 4)", heads=6, held=77, quantised=8, padding=3, window=60),
    "what_keys_get": Case(votes=0, held=40, rope="half", splits=4, sinks=True, padding=3),
    "what_bytes_get_of_the_last": Case(votes=3, held=30, quantised=8, heads=6, softcap=2.0, splits=1),
    "votes_come_of_prompts": Case(pattern="0-1: vertical_slash(3, 2); 2-3: top(8, 4)", held=40, rope="half"),
}
PREFILL = {
    "whole_prompt": Case(held=0, queries=37, rope="half"),
    "chunk": Case(held=21, queries=19, rope="interleaved"),
    "chunk_of_two": Case(held=16, queries=2, rope="half"),
    "no_cache": Case(held=None, queries=33, rope="half"),
    "half_bytes_less_an_offset": Case(held=9, queries=33, rope="half", quantised=4, offset=True),
    "no_cache_and_no_rope": Case(held=None, queries=33, dtype=BF16, width=64),
    "encoder": Case(held=None, queries=35, causal=False, padding=5),
    "encoder_window": Case(held=None, queries=70, causal=False, window=10, batch=1),
    "cross": Case(held=None, queries=19, keys=40, causal=False),
    "values_of_another_width": Case(held=5, queries=20, width=24, value_width=40, rope="half"),
    "wide_heads": Case(width=80, heads=8, kv_heads=1, batch=1, queries=17, held=3, rope="partial"),
    "narrow_heads": Case(width=8, heads=3, kv_heads=3, batch=3, queries=17, held=3),
    "padding": Case(held=0, queries=40, padding=19, rope="half"),
    "window": Case(held=10, queries=60, window=20),
    "wide_window": Case(held=10, queries=70, window=40, padding=3, batch=1),
    "short_window": Case(held=3, queries=40, window=1),
    "sinks": Case(held=7, queries=20, sinks=True, padding=9),
    "slopes": Case(held=7, queries=20, slopes=True),
    "softcap": Case(held=7, queries=20, softcap=2.0),
    "bias": Case(held=None, queries=20, causal=False, bias=True),
    "bias_of_cross": Case(held=None, queries=20, keys=37, causal=False, bias=True, slopes=True),
    "half_precision": Case(dtype=F16, width=64, queries=20, rope="half"),
    "bfloat16": Case(dtype=BF16, width=64, queries=20, rope="interleaved", padding=4),
    "bytes": Case(quantised=8, queries=20, rope="half"),
    "half_bytes": Case(quantised=4, queries=20, rope="half", value_width=40),
    "pages": Case(page=8, queries=20, rope="half", padding=3),
    "pages_of_half_bytes": Case(page=4, queries=20, quantised=4, dtype=BF16),
    "window_and_columns": Case(pattern="window(7) | columns(2)", held=None, queries=50, padding=3),
    "longformer": Case(pattern="window(5) | columns(40) | rows(3)", held=None, queries=50, causal=False),
    "bigbird": Case(pattern="blocks(8, 2) | columns(8) | random(8, 2, 5)", held=None, queries=50, causal=False),
    "heads_that_differ": Case(pattern="0: dense; 1: stride(9); 2-3: window(4)", held=21, queries=30, rope="half"),
    "bytes_in_pages": Case(pattern="stride(40)", held=37, queries=20, page=8, quantised=8, window=30),
    "random_after_padding": Case(pattern="window(3) | random(8, 2, 5)", held=41, queries=30, padding=5),
    "nearer_sinks": Case(pattern="window(9) | columns(3)", first=3, held=37, queries=20, page=8, width=20),
    "nearer_sinks_of_bytes": Case(
        pattern="window(9) | columns(3)", first=3, held=0, queries=37, page=8, quantised=8, dtype=BF16
    ),
    "nearer_keys_alone": Case(first=3, held=None, queries=20),
    "best_blocks": Case(pattern="top(8, 3) | columns(2)", held=21, queries=20, padding=5, rope="half"),
    "best_blocks_in_pages": Case(pattern="top(4, 2) | window(3)", held=30, queries=19, page=8, quantised=8),
    "best_blocks_alone": Case(pattern="top(8, 2)", heads=6, held=None, queries=30, dtype=BF16, width=64),
    "votes": Case(pattern="vertical_slash(6, 5) | columns(1)", held=13, queries=66, padding=4, rope="half", batch=1),
    "votes_of_a_short_row": Case(pattern="vertical_slash(3, 2)", held=None, queries=66, padding=9, width=16, heads=2),
    "votes_of_some_heads": Case(
        pattern="0-1: vertical_slash(6, 5); 2: top(8, 2); 3: window(3)",
        held=None,
        queries=70,
        window=50,
        batch=1,
        rope="half",
    ),
    "votes_that_look_ahead": Case(
        pattern="vertical_slash(6, 5)", held=None, queries=67, causal=False, dtype=BF16, width=16, batch=1, heads=2
    ),
    "what_keys_get": Case(votes=0, held=7, queries=20, rope="half", sinks=True, padding=3),
    "what_bytes_get_of_the_last": Case(votes=5, held=10, queries=19, heads=6, quantised=8, dtype=BF16, width=64),
    "too_few_to_vote": Case(pattern="vertical_slash(6, 5)", held=13, queries=20, quantised=8),
}


@pytest.mark.parametrize("name", DECODE)
def test_one_query_is_what_the_dialect_computes(name: str) -> None:
    call = check(DECODE[name])
    assert [kernel.name for kernel in call.kernels if kernel.name.startswith("attention")] == ["attention_decode"]


@pytest.mark.parametrize("name", PREFILL)
def test_many_queries_are_what_the_dialect_computes(name: str) -> None:
    call = check(PREFILL[name])
    assert [kernel.name for kernel in call.kernels if kernel.name.startswith("attention")] == ["attention_prefill"]


def test_one_query_of_cross_attention_needs_no_cache() -> None:
    call = check(Case(held=None, queries=1, keys=40, causal=False, bias=True, splits=2))
    assert [kernel.name for kernel in call.kernels] == ["attention_decode"]


def test_keys_are_only_put_in_place_where_they_are_not() -> None:
    assert len(check(Case(held=None, queries=5)).kernels) == 1
    assert len(check(Case(held=None, queries=5, rope="half")).kernels) == 2
    assert len(check(Case(held=3, queries=5)).kernels) == 2


@pytest.mark.parametrize("queries", [1, 6])
def test_a_row_without_any_key_is_zero(queries: int) -> None:
    case = Case(queries=queries, held=20, padding=20 + queries)
    assert not check(case).out[0].any()


def test_the_same_call_gives_the_same_bits_however_often() -> None:
    first, second = (check(Case(held=70, splits=4)).out for _ in range(2))
    assert torch.equal(first, second)


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])  # to shrink takes minutes
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 2), share=st.integers(1, 8), width=st.sampled_from([8, 24, 64]),
    held=st.integers(0, 70), queries=st.sampled_from([1, 1, 2, 20]), splits=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(1, 40), padding=st.integers(0, 10), sinks=st.booleans(), slopes=st.booleans(),
    rope=st.sampled_from([None, "half", "interleaved", "partial"]), quantised=st.sampled_from([0, 4, 8]),
    page=st.sampled_from([None, 8]), dtype=st.sampled_from([F32, BF16, F16]),
)  # fmt: skip
def test_any_mixture_is_what_the_dialect_computes(share: int, **options: Any) -> None:
    case = Case(**options)
    check(replace(case, heads=share * case.kv_heads))


@pytest.mark.parametrize("pattern", [None, "top(4, 2) | columns(1)", "vertical_slash(3, 2)"])
def test_no_grid_depends_on_what_changes_between_replays(pattern: str | None) -> None:
    call = called(Case(rope="half", padding=3, pattern=pattern, votes=None if pattern else 0))
    stage = WRITERS[Attention](call.region, Target(["T"]))
    for kernel in (kernel for form in stage.forms for kernel in form.kernels):
        assert not any(T in sympy.sympify(size).free_symbols for size in kernel.sizes.values())


def test_channels_that_are_not_side_by_side_are_refused() -> None:
    region = called(Case()).region
    region.q = View(region.q.buffer, region.q.shape, (*contiguous_strides(region.q.shape)[:3], 2))
    with pytest.raises(ValueError, match="channels of q lie 2 apart"):
        WRITERS[Attention](region, Target(["T"]))
