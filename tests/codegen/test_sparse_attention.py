"""Generated attention that visits what a pattern keeps, over tensors and pages, against the IR's own meaning."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slim.codegen import build
from slim.codegen.cpp.executable import CppExecutable
from slim.codegen.eager import EagerExecutable
from slim.compiler.program import Program
from tests.patterns import PATTERNS
from tests.programs import program

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"no C++ code here: {build.missing()}")

HEADS, GROUPS, WIDTH, PAGE = 4, 2, 16, 64
_OPTIONS = "layer=0, scale=0.5"
_CACHES = {None: f"f32[N, {GROUPS}, {PAGE}, {WIDTH}]", "int8": f"i8[N, {GROUPS}, {PAGE}, {WIDTH}]"}


def _size(text: str) -> int | None:
    _, found, rest = text.partition("top(")
    return int(rest.partition(",")[0]) if found else None


def attention(*texts: str) -> Program:
    """Over tensors: one output a pattern."""
    lines = [
        f'a{i} = slim.attention.default(q, k, v, key_mask, {_OPTIONS}, pattern="{text}")'
        for i, text in enumerate(texts)
    ]
    results = ", ".join(f"a{i}" for i in range(len(texts)))
    inputs = f"q: f32[B, {HEADS}, S, {WIDTH}], k: f32[B, {GROUPS}, S, {WIDTH}], v: f32[B, {GROUPS}, S, {WIDTH}], "
    return program("\n".join([*lines, f"return ({results},)"]), {}, inputs + "key_mask: bool[B, S]")


def paged(texts: tuple[str, ...], kind: str | None) -> Program:
    """Over pages: one output, and caches of its own, for each pattern."""
    new = f"f32[B, {GROUPS}, S, {WIDTH}]"
    inputs = [f"q: f32[B, {HEADS}, S, {WIDTH}]", f"k: {new}", f"v: {new}", "table: i32[B, P]", "lengths: i64[B]"]
    lines = []
    for i, text in enumerate(texts):
        held = _CACHES[kind]
        inputs += [f"k_{i}: {held}", f"v_{i}: {held}"]
        more = []
        if kind:
            inputs += [f"ks_{i}: f32[N, {GROUPS}, {PAGE}]", f"vs_{i}: f32[N, {GROUPS}, {PAGE}]"]
            more += [f"k_scale=ks_{i}", f"v_scale=vs_{i}"]
        size = _size(text)
        if size:
            inputs.append(f"kb_{i}: f32[N, {GROUPS}, {PAGE // size}, 2, {WIDTH}]")
            more.append(f"k_bounds=kb_{i}")
        pattern = "" if text == "dense" else f', pattern="{text}"'
        arguments = ", ".join(["q", "k", "v", f"k_{i}", f"v_{i}", "table", "lengths", *more])
        lines.append(f"a{i} = slim.paged_attention.default({arguments}, {_OPTIONS}{pattern})")
    results = ", ".join(f"a{i}" for i in range(len(texts)))
    return program("\n".join([*lines, f"return ({results},)"]), {}, ", ".join(inputs))


@cache
def executables(kind: str) -> tuple[EagerExecutable, CppExecutable]:
    made = {
        "tensors": lambda: attention(*PATTERNS),
        "pages": lambda: paged(("dense", *PATTERNS), None),
        "int8 pages": lambda: paged(("dense", *PATTERNS[:1], *PATTERNS[6:8]), "int8"),
    }[kind]()
    generated = CppExecutable(made)
    assert not generated.schedule.foreign
    return EagerExecutable(made), generated


def tensors(seed: int, batch: int, tokens: int) -> list[Tensor]:
    """q, k, v whose scores are whole numbers of 512ths, in int8 too: which blocks are best hangs on no rounding."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randint(-127, 128, (batch, heads, tokens, WIDTH), generator=generator)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    k[..., 0] = v[..., 0] = 127  # so that a step of 1/64 is that of every row
    return [(q / 16).round() / 8, k / 64, v / 64]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 9999), batch=st.integers(1, 3), tokens=st.sampled_from([1, 2, 5, 63, 64, 65, 130, 200, 257]),
    padding=st.integers(0, 20),
)  # fmt: skip
def test_what_a_pattern_keeps_is_what_is_attended_to(seed: int, batch: int, tokens: int, padding: int) -> None:
    q, k, v = tensors(seed, batch, tokens)
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[0, : min(padding, tokens - 1)] = False
    eager, generated = executables("tensors")
    for text, wanted, got in zip(PATTERNS, eager(q, k, v, mask), generated(q, k, v, mask), strict=True):
        wanted, got = (x.transpose(1, 2)[mask] for x in (wanted, got))  # what padding sees is nobody's business
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, text=text: f"{text}: {m}")


@pytest.mark.parametrize("kind", ["pages", "int8 pages"])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 9999), held=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    calls=st.lists(st.sampled_from([1, 1, 1, 3, 20, 70]), min_size=1, max_size=3),
)  # fmt: skip
def test_rows_of_any_length_lie_in_pages_of_any_order(kind: str, seed: int, held: list[int], calls: list[int]) -> None:
    eager, generated = executables(kind)
    columns = -(-(max(held) + sum(calls)) // PAGE)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(columns * len(held), generator=generator).reshape(len(held), columns).int()
    pages = columns * len(held)
    caches = [torch.zeros(pages, *b.shape[1:], dtype=b.dtype) for b in generated.schedule.inputs[5:]]
    both = [caches, [cache.clone() for cache in caches]]
    lengths = torch.zeros(len(held), dtype=torch.int64)
    for step, new in enumerate([max(held), *calls]):
        if new == 0:
            continue
        inputs = (*tensors(seed + step, len(held), new), table, lengths)
        wanted, got = eager(*inputs, *both[0]), generated(*inputs, *both[1])
        for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, i=index: f"{i}: {m}")
        lengths = torch.tensor(held) if step == 0 else lengths + new


BOUND = 0.01


@cache
def skipping() -> CppExecutable:
    text = f"""
        a = slim.attention.default(q, k, v, {_OPTIONS}, skip={BOUND})
        b = slim.attention.default(q, k, v, {_OPTIONS}, pattern="window(300) | columns(2)", skip={BOUND})
        return (a, b)
    """
    shapes = f"q: f32[B, {HEADS}, S, {WIDTH}], k: f32[B, {GROUPS}, S, {WIDTH}], v: f32[B, {GROUPS}, S, {WIDTH}]"
    return CppExecutable(program(text, {}, shapes))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 99999), tokens=st.integers(65, 400), sharpness=st.floats(0.5, 40))
def test_what_is_skipped_stays_within_the_bound(seed: int, tokens: int, sharpness: float) -> None:
    q, k, v = tensors(seed, 2, tokens)
    q *= sharpness
    results = skipping()(q, k, v)
    for got, pattern in zip(results, (None, "window(300) | columns(2)"), strict=True):
        exact = torch.ops.slim.attention.default(q, k, v, layer=0, scale=0.5, pattern=pattern)
        limit = 2 * BOUND * float(v.abs().max()) + 1e-4
        assert float((got - exact).abs().max()) <= limit


def test_the_bound_of_skipping_holds_in_ten_thousand_cases() -> None:
    """A case is a head of a row, with a sharpness of its own."""
    cases = moved = 0
    for seed in range(50):
        tokens, sharpness = 65 + 4 * seed, torch.logspace(-0.5, 1.6, 200).reshape(50, HEADS, 1, 1)
        q, k, v = tensors(seed, 50, tokens)
        q *= sharpness
        off = (skipping()(q, k, v)[0] - torch.ops.slim.attention.default(q, k, v, layer=0, scale=0.5)).abs()
        off, limit = off.amax((2, 3)), 2 * BOUND * v.abs().amax((2, 3)).repeat_interleave(HEADS // GROUPS, 1)
        assert bool((off <= limit + 1e-4).all())
        cases, moved = cases + off.numel(), moved + int((off > 1e-5).sum())
    assert cases == 10_000
    assert moved > 100  # something is skipped
