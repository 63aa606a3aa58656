"""Triton's attention over rows of lengths of their own, in pages and rings, by patterns and with tiles left out."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slim
from slim import KVCacheConfig
from slim.codegen import Ends
from slim.codegen.eager import EagerExecutable
from slim.codegen.triton.executable import TritonExecutable
from slim.compiler.program import Program
from slim.runtime.compiled import CompiledModel
from slim.runtime.paged_steps import PagedDecoder
from tests.codegen.test_sparse_attention import BOUND, GROUPS, HEADS, PAGE, WIDTH, attention, paged, tensors
from tests.compiled import pair, prompt
from tests.patterns import PATTERNS
from tests.programs import program

STATIC = tuple(text for text in PATTERNS if "top" not in text and "vertical" not in text)


@cache
def executables(kind: str) -> tuple[EagerExecutable, TritonExecutable]:
    made: Program = {
        "tensors": lambda: attention(*STATIC),
        "pages": lambda: paged(("dense", *STATIC), None),
        "int8 pages": lambda: paged(("dense", STATIC[0]), "int8"),
    }[kind]()
    generated = TritonExecutable(made)
    assert not generated.schedule.foreign
    return EagerExecutable(made), generated


def close(got: Tensor, wanted: Tensor, what: str) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}")


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 9999), tokens=st.sampled_from([1, 5, 64, 65, 130]), padding=st.integers(0, 20))
def test_what_a_pattern_keeps_is_what_is_attended_to(seed: int, tokens: int, padding: int) -> None:
    q, k, v = tensors(seed, 2, tokens)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0, : min(padding, tokens - 1)] = False
    eager, generated = executables("tensors")
    for text, wanted, got in zip(STATIC, eager(q, k, v, mask), generated(q, k, v, mask), strict=True):
        wanted, got = (x.transpose(1, 2)[mask] for x in (wanted, got))  # what padding sees is nobody's business
        close(got, wanted, text)


@pytest.mark.parametrize("kind", ["pages", "int8 pages"])
@settings(max_examples=3, deadline=None)
@given(
    seed=st.integers(0, 9999), held=st.lists(st.integers(1, 90), min_size=2, max_size=2),
    calls=st.lists(st.sampled_from([1, 1, 3, 20]), min_size=1, max_size=1),
)  # fmt: skip
def test_rows_of_any_length_lie_in_pages_of_any_order(kind: str, seed: int, held: list[int], calls: list[int]) -> None:
    eager, generated = executables(kind)
    columns = -(-(max(held) + sum(calls)) // PAGE)
    pages = columns * len(held)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).reshape(len(held), columns).int()
    caches = [torch.zeros(pages, *b.shape[1:], dtype=b.dtype) for b in generated.schedule.inputs[5:]]
    both = [caches, [held.clone() for held in caches]]
    lengths = torch.zeros(len(held), dtype=torch.int64)
    for step, new in enumerate([max(held), *calls]):
        inputs = (*tensors(seed + step, len(held), new), table, lengths)
        for index, (wanted, got) in enumerate(zip(eager(*inputs, *both[0]), generated(*inputs, *both[1]), strict=True)):
            close(got, wanted, f"output {index}")
        lengths = torch.tensor(held) if step == 0 else lengths + new


@cache
def skipping() -> TritonExecutable:
    options = f"layer=0, scale=0.5, skip={BOUND}"
    text = f"""
        a = slim.attention.default(q, k, v, {options})
        b = slim.attention.default(q, k, v, {options}, pattern="window(100) | columns(2)")
        return (a, b)
    """
    shapes = f"q: f32[B, {HEADS}, S, {WIDTH}], k: f32[B, {GROUPS}, S, {WIDTH}], v: f32[B, {GROUPS}, S, {WIDTH}]"
    return TritonExecutable(program(text, {}, shapes))


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99999), tokens=st.sampled_from([70, 129, 200]), sharpness=st.floats(0.5, 40))
def test_what_is_skipped_stays_within_the_bound(seed: int, tokens: int, sharpness: float) -> None:
    q, k, v = tensors(seed, 1, tokens)
    q *= sharpness
    for got, pattern in zip(skipping()(q, k, v), (None, "window(100) | columns(2)"), strict=True):
        exact = torch.ops.slim.attention.default(q, k, v, layer=0, scale=0.5, pattern=pattern)
        assert float((got - exact).abs().max()) <= 2 * BOUND * float(v.abs().max()) + 1e-4


def test_a_tile_that_cannot_count_is_left_out() -> None:
    """The oldest keys have values that would ruin the result; their scores are far below all others."""
    q, k, v = tensors(3, 1, 200)
    q[..., 0], k[..., 0] = 8.0, 8.0
    k[:, :, :64, 0] = -8.0
    v[:, :, :64] = float("nan")
    got = skipping()(q, k, v)[0][:, :, 192:]
    assert bool(got.isfinite().all())


def test_what_queries_choose_holds_from_call_to_call() -> None:
    """Bounds of blocks grow beside keys, whoever writes them: a prompt, a step, a few tokens."""
    made = paged(("top(8, 3) | columns(2)",), "int8")
    eager, generated = EagerExecutable(made), TritonExecutable(made)
    assert not generated.schedule.foreign
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    both = [[torch.zeros(4, *b.shape[1:], dtype=b.dtype) for b in generated.schedule.inputs[5:]] for _ in range(2)]
    lengths = torch.tensor([0, 0])
    for step, new in enumerate([55, 1, 3, 1]):
        inputs = (*tensors(step, 2, new), table, lengths)
        wanted, got = (run(*inputs, *c)[0] for run, c in zip((eager, generated), both, strict=True))
        close(got, wanted, f"call {step}")
        for one, other, buffer in zip(*both, generated.schedule.inputs[5:], strict=True):
            assert torch.equal(one, other), buffer.name
        lengths = torch.tensor([55, 21]) if step == 0 else lengths + new


@pytest.mark.parametrize("text", ["window(3) | columns(2)", "top(4, 2)"])
def test_keys_and_values_that_the_program_rounds_are_read_as_they_are_rounded(text: str) -> None:
    lines = []
    for name in ("k", "v"):
        lines += [
            f"{name}s = slim.token_scale.default({name}, bits=8)",
            f"{name}n = slim.quantize.default({name}, {name}s, axis=2)",
            f"{name}r = slim.dequantize.default({name}n, {name}s, axis=2)",
        ]
    lines += [f'a = slim.attention.default(q, kr, vr, layer=0, scale=0.5, pattern="{text}")', "return (a,)"]
    shapes = f"q: f32[B, {HEADS}, S, {WIDTH}], k: f32[B, {GROUPS}, S, {WIDTH}], v: f32[B, {GROUPS}, S, {WIDTH}]"
    made = program("\n".join(lines), {}, shapes)
    generated = TritonExecutable(made)
    assert not generated.schedule.foreign
    operands = tensors(2, 2, 21)
    close(generated(*operands)[0], EagerExecutable(made)(*operands)[0], text)


def test_a_ring_keeps_its_sinks_near_when_its_pages_take_turns() -> None:
    """Six pages of 8 tokens, of which the first stays: after 57 tokens others have been written twice."""
    new, held = (f"f32[B, {GROUPS}, S, {WIDTH}]", f"f32[N, {GROUPS}, 8, {WIDTH}]")
    options = 'layer=0, scale=0.5, pattern="window(9) | columns(3)", fixed=1, first=3'
    text = f"a = slim.paged_attention.default(q, k, v, kc, vc, table, lengths, q_first=near, {options})\nreturn (a,)"
    queries = ", ".join(f"{name}: f32[B, {HEADS}, S, {WIDTH}]" for name in ("q", "near"))
    rest = f"k: {new}, v: {new}, table: i32[B, P], lengths: i64[B], kc: {held}, vc: {held}"
    made = program(text, {}, f"{queries}, {rest}")
    eager, generated = EagerExecutable(made), TritonExecutable(made)
    assert not generated.schedule.foreign
    table = torch.randperm(12, generator=torch.Generator().manual_seed(1)).reshape(2, 6).int()
    both = [[torch.zeros(12, GROUPS, 8, WIDTH) for _ in range(2)] for _ in range(2)]
    lengths = torch.zeros(2, dtype=torch.int64)
    for step, count in enumerate([1, 30, 24, 1, 1]):
        q, k, v = tensors(step, 2, count)
        near = tensors(step + 99, 2, count)[0]
        wanted, got = (run(q, near, k, v, table, lengths, *c) for run, c in zip((eager, generated), both, strict=True))
        close(got[0], wanted[0], f"call {step}")
        lengths += count


@pytest.mark.parametrize(
    "config",
    [
        KVCacheConfig(layout="paged"),
        KVCacheConfig(eviction="h2o", budget=8, dtype="int8"),
        KVCacheConfig(layout="paged", window=8, sinks=2),
    ],
    ids=["pages", "int8 of which some are evicted", "ring"],
)
def test_a_model_writes_what_eager_writes(config: KVCacheConfig) -> None:
    tokens, mask = prompt()
    options = dict(attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    eager, generated = (CompiledModel(pair("llama")[1].program.copy(), t, kv_cache=config) for t in ("eager", "cuda"))
    assert torch.equal(generated.generate(tokens, **options).cpu(), eager.generate(tokens, **options))


def test_bursts_over_pages_keep_the_lengths_of_rows() -> None:
    model = slim.compile(pair("llama")[0], target="cuda", kv_cache=KVCacheConfig(layout="paged"), verify=False)
    tokens, mask = (x.to(model.device) for x in prompt())
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def decoder() -> tuple[PagedDecoder, Tensor]:
        cache = model.new_cache(tokens.shape[0])
        made = PagedDecoder(model.step(masked=False, last_only=True), cache)  # type: ignore[arg-type]
        return made, made.prefill(tokens, mask, positions).argmax(-1)

    single, last = decoder()
    wanted = []
    for _ in range(3):
        last = single.step(last).argmax(-1)
        wanted.append(last)
    burst, last = decoder()
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=model.device)
    chosen = burst.greedy(last, 3, Ends(torch.tensor([], dtype=torch.int64, device=model.device), finished, 0))
    assert chosen is not None
    assert torch.equal(chosen, torch.stack(wanted))
    assert torch.equal(burst.cache.lengths, single.cache.lengths)
