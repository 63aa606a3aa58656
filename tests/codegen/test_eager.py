"""The eager target means what the dialect means, and reads quantised weights as they are stored."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slim.codegen import eager_ops
from slim.codegen.eager import EagerExecutable, lower
from slim.compiler.dialect.quant import NF4, pack_int3, pack_int4
from slim.compiler.text import parse
from slim.compiler.weights import Weights

slim = torch.ops.slim
SIZES = st.integers(1, 70)


def quantised(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[:-1]) * 0.01 + 1e-3


KINDS = (None, "int4", "int3", "nf4", "int4 zeros", "int3 zeros")  # number formats by groups; None: int8


def grouped(*shape: int, group: int, kind: str | None) -> tuple[tuple[Any, ...], Tensor]:
    """A weight with scales by group: (as ``grouped_linear`` takes it, what it stands for)."""
    name, _, zeros = kind.partition(" ") if kind else (None, "", "")
    limit = {None: 128, "int4": 8, "int3": 4, "nf4": 8}[name]
    q = torch.randint(-limit, limit, shape).to(torch.int8)
    grid = (*shape[:-1], shape[-1] // group)
    scale = (torch.rand(grid) * 0.01 + 1e-3).half()
    zero = torch.randint(-8, 8, grid, dtype=torch.int8) if zeros else None
    stored = q if name is None else {"int4": pack_int4, "int3": pack_int3, "nf4": pack_int4}[name](q)
    steps = torch.tensor(NF4)[q.int() + 8] if name == "nf4" else q
    if zero is not None:
        steps = steps - zero.int().repeat_interleave(group, -1)
    return (stored, scale, zero, name), steps.float() * scale.float().repeat_interleave(group, -1)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max().clamp_min(1e-9))


# -- quantised weights -------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(tokens=st.sampled_from([1, 3, 8, 9, 40]), rows=SIZES, columns=SIZES, bias=st.booleans())
def test_an_int8_linear_is_the_linear_of_its_dequantised_weight(tokens, rows, columns, bias):
    q, scale = quantised(rows, columns)
    x, b = torch.randn(2, tokens, columns), torch.randn(rows) if bias else None
    expected = torch.nn.functional.linear(x, slim.dequantize(q, scale, axis=0), b)
    assert close(eager_ops.int8_linear(x, q, scale, torch.float32, b), expected, 1e-5)


@pytest.mark.parametrize("tokens", [1, 30])
def test_a_wide_int8_linear_is_widened_block_by_block(tokens):
    q, scale = quantised(900, 1700)  # several blocks of both sizes
    x = torch.randn(tokens, 1700)
    expected = torch.nn.functional.linear(x, slim.dequantize(q, scale, axis=0))
    assert close(eager_ops.int8_linear(x, q, scale, torch.float32, None), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (37, 51)])
def test_an_int8_linear_of_a_narrow_type_is_as_exact_as_that_type(dtype, shape):
    q, scale = quantised(*shape)
    x = torch.randn(5, shape[1]).to(dtype)
    exact = torch.nn.functional.linear(x.float(), slim.dequantize(q, scale, axis=0))
    y = eager_ops.int8_linear(x, q, scale, dtype, None)
    assert y.dtype == dtype
    assert close(y, exact, 2 * torch.finfo(dtype).eps)


def test_an_int8_embedding_widens_only_its_rows():
    q, scale = quantised(50, 16)
    tokens = torch.randint(0, 50, (3, 7))
    expected = torch.nn.functional.embedding(tokens, slim.dequantize(q, scale, axis=0))
    assert torch.equal(eager_ops.int8_embedding(q, scale, torch.float32, tokens), expected)


def test_int8_experts_are_the_experts_of_their_dequantised_weights():
    q, scale = quantised(4, 24, 16)
    x, bias, expert = torch.randn(9, 16), torch.randn(4, 24), torch.randint(0, 4, (9,))
    expected = slim.expert_linear(x, slim.dequantize(q, scale, axis=1), bias, expert)
    assert close(eager_ops.int8_expert_linear(x, q, scale, torch.float32, bias, expert), expected, 1e-5)


IR = """# slim IR 1: test
def forward(weights, input_ids: i64[B, S]):
    table: f32[20, 8] = slim.dequantize.default(weights["e"], weights["e_scale"], axis=0, dtype=torch.float32)
    x: f32[B, S, 8] = aten.embedding.default(table, input_ids)
    y: f32[B, S, 20] = aten.linear.default(x, table)
    return (y,)
"""


def test_a_tied_table_is_read_as_int8_by_both_its_readers():
    q, scale = quantised(20, 8)
    program = parse(IR, Weights({"e": q, "e_scale": scale}))
    executable = EagerExecutable(program)
    assert "dequantize" not in executable.code["forward.py"]
    tokens = torch.randint(0, 20, (2, 5))
    assert close(executable(tokens)[0], program.run(tokens)[0], 1e-5)


def test_lowering_leaves_the_program_as_it_was():
    program = parse(IR, Weights(dict(zip(("e", "e_scale"), quantised(20, 8), strict=True))))
    text = str(program)
    lower(program)
    assert str(program) == text


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.sampled_from([1, 3, 40]), rows=SIZES, groups=st.integers(1, 5), group=st.sampled_from([8, 24, 32]),
    bias=st.booleans(), kind=st.sampled_from(KINDS),
)  # fmt: skip
def test_a_grouped_linear_is_the_linear_of_its_dequantised_weight(tokens, rows, groups, group, bias, kind):
    stored, w = grouped(rows, groups * group, group=group, kind=kind)
    x, b = torch.randn(2, tokens, groups * group), torch.randn(rows) if bias else None
    expected = torch.nn.functional.linear(x, w, b)
    assert close(eager_ops.grouped_linear(x, *stored, torch.float32, b), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wide_grouped_linear_goes_block_by_block(kind, dtype):
    stored, w = grouped(900, 1728, group=32, kind=kind)
    x = torch.randn(3, 1728).to(dtype)
    y = eager_ops.grouped_linear(x, *stored, dtype)
    assert y.dtype == dtype
    assert close(y, torch.nn.functional.linear(x.float(), w), max(1e-5, 4 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("kind", KINDS)
def test_a_grouped_embedding_widens_only_its_rows(kind):
    stored, w = grouped(50, 16, group=4, kind=kind)
    tokens = torch.randint(0, 50, (3, 7))
    expected = torch.nn.functional.embedding(tokens, w)
    assert torch.equal(eager_ops.grouped_embedding(*stored, torch.float32, tokens), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_experts_are_the_experts_of_their_dequantised_weights(kind):
    stored, w = grouped(4, 24, 16, group=8, kind=kind)
    x, bias, expert = torch.randn(9, 16), torch.randn(4, 24), torch.randint(0, 4, (9,))
    expected = slim.expert_linear(x, w, bias, expert)
    found = eager_ops.grouped_expert_linear(x, *stored, torch.float32, bias, expert)
    assert close(found, expected, 1e-5)


UNPACKED = """    q: i8[20, 8] = slim.unpack_int4.default(weights["e"])
    table: f32[20, 8] = slim.dequantize.default(q, weights["e_scale"], axis=1, group_size=4, dtype=torch.float32)
"""


def test_a_packed_tied_table_is_read_packed_by_both_its_readers():
    lines = IR.splitlines(keepends=True)
    (stored, scale, *_), _ = grouped(20, 8, group=4, kind="int4")
    program = parse("".join([*lines[:2], UNPACKED, *lines[3:]]), Weights({"e": stored, "e_scale": scale}))
    executable = EagerExecutable(program)
    assert "dequantize" not in executable.code["forward.py"]
    assert "unpack" not in executable.code["forward.py"]
    tokens = torch.randint(0, 20, (2, 5))
    assert close(executable(tokens)[0], program.run(tokens)[0], 1e-5)


def test_a_dequantize_without_a_kernel_of_its_own_is_run_as_it_stands():
    text = IR.replace("axis=0", "axis=0, group_size=4")
    q = torch.randint(-127, 128, (20, 8), dtype=torch.int8)
    program = parse(text, Weights({"e": q, "e_scale": torch.rand(5, 8)}))
    executable = EagerExecutable(program)
    assert "dequantize" in executable.code["forward.py"]
    tokens = torch.randint(0, 20, (2, 5))
    assert torch.equal(executable(tokens)[0], program.run(tokens)[0])


# -- rotation and norms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [16, 8])
def test_a_rotation_by_widened_angles_is_the_rotation(interleaved, width):
    x = torch.randn(2, 3, 5, 16)
    cos, sin = slim.rope_table(torch.arange(5).repeat(2, 1), torch.rand(width // 2))
    expected = slim.rope(x, cos, sin, interleaved=interleaved)
    factors = eager_ops.widen_angles(cos, sin, interleaved)
    assert torch.allclose(eager_ops.rotate(x, factors, interleaved), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("has_gain", [False, True])
def test_the_norm_is_the_norm(dtype, offset, has_gain):
    x, gain = torch.randn(2, 3, 48).to(dtype), torch.randn(48).to(dtype) if has_gain else None
    expected = slim.rms_norm(x, gain, eps=1e-5, offset=offset)
    assert close(eager_ops.rms_norm(x, gain, eps=1e-5, offset=offset), expected, 1e-6)


# -- attention ---------------------------------------------------------------------------------------------------------

LOOKS = [
    {},
    {"window": 3},
    {"softcap": 2.0},
    {"sinks": True},
    {"slopes": True},
    {"window": 4, "softcap": 2.0, "sinks": True, "slopes": True},
]


def extras(look: dict) -> tuple[list[Tensor | None], dict]:
    tensors = [torch.randn(4) if look.get(name) else None for name in ("sinks", "slopes")]
    return tensors, {name: look.get(name) for name in ("window", "softcap")}


@pytest.mark.parametrize("look", LOOKS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_attention(look, padded, causal):
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]).bool() if padded else None
    (sinks, slopes), options = extras(look)
    expected = slim.attention(q, k, v, mask, None, sinks, slopes, layer=0, scale=0.3, causal=causal, **options)
    seen = eager_ops.seen_keys(q, k, mask, causal, options["window"])
    found = eager_ops.attention(seen, q, k, v, None, sinks, slopes, 0.3, options["softcap"], causal)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("look", LOOKS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("start", "new"), [(0, 6), (0, 1), (5, 1), (5, 3), (2, 6)])
def test_cached_attention_is_cached_attention(look, padded, start, new):
    q, k, v = torch.randn(2, 4, new, 8), torch.randn(2, 2, new, 8), torch.randn(2, 2, new, 6)
    caches = [torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 6)]
    expected_caches = [cache.clone() for cache in caches]
    mask = torch.ones(2, start + new, dtype=torch.bool) if padded else None
    if mask is not None and start + new > 1:
        mask[0, 0] = False
    (sinks, slopes), options = extras(look)
    expected = slim.cached_attention(
        q, k, v, *expected_caches, start, mask, sinks, slopes, layer=0, scale=0.3, **options
    )
    seen = eager_ops.seen_cached_keys(q, mask, start, options["window"])
    found = eager_ops.cached_attention(
        seen, q, k, v, *caches, None, None, start, options["window"], sinks, slopes, 0.3, options["softcap"]
    )
    assert torch.allclose(found, expected, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected_caches, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_of_fp8_is_the_linear_of_its_dequantised_weight(dtype):
    q, scale = torch.randn(40, 64).to(torch.float8_e4m3fn), torch.rand(40)
    x = torch.randn(3, 64).to(dtype)
    y = eager_ops.int8_linear(x, q, scale, dtype)
    expected = torch.nn.functional.linear(x.float(), q.float() * scale[:, None])
    assert close(y, expected, max(1e-5, 4 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("start", "queries"), [(0, 4), (5, 1), (5, 3)])
@pytest.mark.parametrize("kind", [torch.int8, torch.uint8], ids=str)
def test_cached_attention_over_numbers_is_the_same_over_what_they_stand_for(kind, start, queries, window):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, queries, 8), torch.randn(2, 2, queries, 8), torch.randn(2, 2, queries, 6)
    widths = [size if kind == torch.int8 else size // 2 for size in (8, 6)]
    caches = [torch.randint(0, 100, (2, 2, 9, width)).to(kind) for width in widths]
    scales = [torch.rand(2, 2, 9) * 0.1 for _ in widths]
    others = [tensor.clone() for tensor in (*caches, *scales)]
    expected = slim.cached_attention(
        q, k, v, *others[:2], start, None, None, None, *others[2:], layer=0, scale=0.3, window=window
    )
    seen = eager_ops.seen_cached_keys(q, None, start, window)
    found = eager_ops.cached_attention(seen, q, k, v, *caches, *scales, start, window, None, None, 0.3, None)
    assert torch.allclose(found, expected, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip((*caches, *scales), others, strict=True))
