"""Every op of the dialect computes what its definition says: values, shapes and gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from slim.compiler.dialect.quant import pack_int4
from tests.compiler import formulas

slim_ops = torch.ops.slim
FAST = settings(max_examples=25, deadline=None)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
WITHIN = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(found, wanted, dtype=torch.float32, scale=1.0):
    bound = WITHIN[dtype] * max(1.0, scale, float(wanted.abs().max()) if wanted.numel() else 0.0)
    assert found.shape == wanted.shape
    assert (found.double() - wanted.double()).abs().max().item() <= bound if found.numel() else True


def fake_agrees(op, *args, **kwargs):
    """The shape function says what the reference returns."""
    real = op(*args, **kwargs)
    mode = FakeTensorMode()
    faked = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
    with mode:
        fake = op(*faked, **kwargs)
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (real, fake)), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    return real


def gradients_agree(op, formula, tensors, kwargs):
    """Gradients through the op are those autograd gives the formula; integer tensors have none."""

    def grads(function):
        leaves = [
            t.detach().clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors
        ]
        out = function(*leaves, **kwargs)
        seed = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape).to(out.dtype)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        return torch.autograd.grad(out, wanted, seed, allow_unused=True)

    for found, wanted in zip(grads(op), grads(formula), strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            close(found, wanted, scale=float(wanted.abs().max()))


def checked_by_torch(op, args, kwargs=None):
    torch.library.opcheck(
        op, args, kwargs or {}, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


# -- attention ---------------------------------------------------------------------------------------------------------


@st.composite
def attentions(draw):
    batch, groups, share = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    length, width, out = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 1 << 16))
    torch.manual_seed(seed)
    heads = groups * share
    tensors = [
        torch.randn(batch, heads, length, width),
        torch.randn(batch, groups, length, width),
        torch.randn(batch, groups, length, out),
        torch.rand(batch, length) < 0.7 if draw(st.booleans()) else None,
        draw(st.sampled_from([
            None, torch.randn(1, heads, length, length), torch.randn(batch, 1, length, length),
            torch.rand(batch, 1, length, length) < 0.8,
        ])),
        torch.randn(heads) if draw(st.booleans()) else None,
        torch.rand(heads) if draw(st.booleans()) else None,
    ]  # fmt: skip
    options = dict(
        layer=0,
        scale=draw(st.sampled_from([0.3, width**-0.5, 1.0])),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, 1, 2, 4, 100])),
        softcap=draw(st.sampled_from([None, 0.7, 5.0])),
    )
    return tensors, options


@FAST
@given(attentions())
def test_attention_is_softmax_over_the_visible_keys(case):
    tensors, options = case
    close(fake_agrees(slim_ops.attention, *tensors, **options), formulas.attention(*tensors, **options))


@FAST
@given(attentions())
def test_gradients_through_attention_are_those_of_the_formula(case):
    tensors, options = case
    gradients_agree(slim_ops.attention, formulas.attention, tensors, options)


def qkv(batch=2, heads=4, groups=2, length=6, width=8, keys=None, out=None):
    k, e = keys or length, out or width
    return (
        torch.randn(batch, heads, length, width),
        torch.randn(batch, groups, k, width),
        torch.randn(batch, groups, k, e),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_attention_keeps_its_type(dtype):
    q, k, v = (t.to(dtype) for t in qkv())
    for options in ({}, {"softcap": 2.0}, {"window": 3}):
        out = slim_ops.attention(q, k, v, layer=0, scale=0.3, **options)
        assert out.dtype == dtype
        close(
            out, formulas.attention(q, k, v, scale=0.3, **options), dtype if dtype != torch.float64 else torch.float32
        )


def test_query_heads_share_key_heads_in_consecutive_groups():
    q, k, v = qkv(heads=6, groups=2)
    wide = slim_ops.attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), layer=0, scale=0.3)
    close(slim_ops.attention(q, k, v, layer=0, scale=0.3), wide)


def test_a_row_that_sees_nothing_gives_zeros():
    q, k, v = qkv(batch=2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :3] = False  # left padding: the padded rows see no key at all
    for more in ({}, {"softcap": 2.0}, {"window": 2}):
        out = slim_ops.attention(q, k, v, mask, layer=0, scale=0.3, **more)
        assert torch.equal(out[0, :, :3], torch.zeros_like(out[0, :, :3]))
        assert torch.isfinite(out).all()
    out = slim_ops.attention(q, k, v, mask, None, torch.zeros(4), layer=0, scale=0.3)
    assert torch.equal(out[0, :, :3], torch.zeros_like(out[0, :, :3]))


def test_a_sink_takes_weight_and_gives_nothing():
    q, k, v = qkv()
    none = slim_ops.attention(q, k, v, None, None, torch.full((4,), -1e9), layer=0, scale=0.3)
    close(none, slim_ops.attention(q, k, v, layer=0, scale=0.3))
    everything = slim_ops.attention(q, k, v, None, None, torch.full((4,), 1e4), layer=0, scale=0.3)
    assert everything.abs().max() < 1e-6


def test_a_window_over_everything_is_no_window():
    q, k, v = qkv()
    for causal in (True, False):
        wide = slim_ops.attention(q, k, v, layer=0, scale=0.3, causal=causal, window=6)
        close(wide, slim_ops.attention(q, k, v, layer=0, scale=0.3, causal=causal))


def test_slopes_are_a_bias_of_slope_times_distance():
    q, k, v = qkv()
    slopes = torch.rand(4)
    distance = torch.arange(6)[None, :] - torch.arange(6)[:, None]
    bias = (slopes[:, None, None] * distance)[None]
    close(
        slim_ops.attention(q, k, v, None, None, None, slopes, layer=0, scale=0.3),
        slim_ops.attention(q, k, v, None, bias, layer=0, scale=0.3),
    )


def test_attention_passes_torchs_own_checks():
    q, k, v = (t.requires_grad_() for t in qkv())
    checked_by_torch(slim_ops.attention.default, (q, k, v), dict(layer=0, scale=0.3, window=2, softcap=3.0))


@settings(max_examples=15, deadline=None)
@given(attentions(), st.integers(0, 1 << 16), st.booleans())
def test_attention_over_a_cache_in_chunks_is_attention_over_the_whole(case, seed, stale):
    """However a sequence is cut, and whatever lay in the cache before; k and v must end up in it."""
    (q, k, v, key_mask, _, sinks, slopes), options = case
    options["causal"] = True
    length = q.shape[2]
    cuts = sorted(
        {0, length, *torch.randint(0, length + 1, (3,), generator=torch.Generator().manual_seed(seed)).tolist()}
    )
    whole = formulas.attention(q, k, v, key_mask, None, sinks, slopes, **options)
    caches = [torch.full((*t.shape[:2], length + 3, t.shape[3]), 7.0 if stale else 0.0) for t in (k, v)]
    parts = []
    for start, stop in itertools.pairwise(cuts):
        mask = None if key_mask is None else key_mask[:, :stop]
        new = (t[:, :, start:stop] for t in (q, k, v))
        parts.append(slim_ops.cached_attention(*new, *caches, start, mask, sinks, slopes, **options))
    close(torch.cat(parts, 2), whole)
    for cache, written in zip(caches, (k, v), strict=True):
        assert torch.equal(cache[:, :, :length], written)
        assert (cache[:, :, length:] == (7.0 if stale else 0.0)).all()


def test_cached_attention_has_the_shape_of_its_new_tokens():
    q, k, v = qkv(length=2, out=5)
    mode = FakeTensorMode()
    caches = torch.zeros(2, 2, 9, 8), torch.zeros(2, 2, 9, 5)
    real = slim_ops.cached_attention(q, k, v, *caches, 3, layer=0, scale=0.3)
    with mode:
        args = [mode.from_tensor(t) for t in (q, k, v, *caches)]
        fake = slim_ops.cached_attention(*args, 3, layer=0, scale=0.3)
    assert (fake.shape, fake.stride()) == (real.shape, real.stride())
    torch.library.opcheck(
        slim_ops.cached_attention.default, (q, k, v, *caches, 3), dict(layer=0, scale=0.3),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@FAST
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.sampled_from([None, 1, 3]),
    st.booleans(),
    st.sampled_from([None, torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_visibility_is_a_table_of_what_attention_sees(batch, queries, keys, causal, window, masked, additive):
    mask = torch.rand(batch, keys) < 0.5 if masked else None
    out = fake_agrees(slim_ops.visibility, mask, batch, queries, keys, causal=causal, window=window, additive=additive)
    wanted = formulas.seen(batch, queries, keys, causal=causal, window=window, key_mask=mask)[:, None]
    if additive is None:
        assert torch.equal(out, wanted)
    else:
        lowest = torch.finfo(additive).min
        assert torch.equal(out, torch.where(wanted, 0.0, lowest).to(additive))


# -- norms -------------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=3).flatmap(
    lambda lead: st.integers(1, 9).map(lambda width: (*lead, width))
)
OFFSETS = st.sampled_from([0.0, 1.0])


@FAST
@given(SHAPES, DTYPES, OFFSETS, st.booleans(), st.booleans(), st.sampled_from([1e-6, 1e-2]))
def test_rms_norm_divides_by_the_root_mean_square(shape, dtype, offset, in_float, weighted, eps):
    x = (torch.randn(shape) * 3).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype) if weighted else None
    out = fake_agrees(slim_ops.rms_norm, x, weight, eps=eps, offset=offset, gain_in_float=in_float)
    assert out.dtype == dtype
    close(out, formulas.rms_norm(x, weight, eps=eps, offset=offset), dtype)


def test_where_the_gain_is_rounded_is_part_of_rms_norm():
    x, weight = torch.randn(64, 128).bfloat16(), torch.randn(128).bfloat16()
    norm = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    after = slim_ops.rms_norm(x, weight, eps=1e-6)
    before = slim_ops.rms_norm(x, weight, eps=1e-6, gain_in_float=True)
    assert torch.equal(after, norm.bfloat16() * weight)
    assert torch.equal(before, (norm * weight.float()).bfloat16())
    assert not torch.equal(before, after)


def test_a_float_gain_widens_a_narrow_rms_norm():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    assert fake_agrees(slim_ops.rms_norm, x, weight, eps=1e-6).dtype == torch.float32
    assert fake_agrees(slim_ops.rms_norm, x, weight, eps=1e-6, gain_in_float=True).dtype == torch.bfloat16


@FAST
@given(SHAPES, DTYPES, OFFSETS, st.booleans(), st.booleans(), st.sampled_from([1e-5, 1e-2]))
def test_layer_norm_centres_and_divides_by_the_deviation(shape, dtype, offset, weighted, shifted, eps):
    x = (torch.randn(shape) * 3).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype) if weighted else None
    bias = torch.randn(shape[-1]).to(dtype) if shifted else None
    out = fake_agrees(slim_ops.layer_norm, x, weight, bias, eps=eps, offset=offset)
    # one channel is its own mean: what is left is rounding, magnified by 1 / sqrt(eps)
    close(out, formulas.layer_norm(x, weight, bias, eps=eps, offset=offset), dtype, scale=3.0)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["rms", "rms in float", "layer", "bare rms", "bare layer"])
def test_gradients_through_a_norm_are_those_of_the_formula(kind, offset):
    x, w, b = torch.randn(2, 3, 7), torch.randn(7), torch.randn(7)
    if "layer" in kind:
        tensors = (x, None, None) if "bare" in kind else (x, w, b)
        gradients_agree(slim_ops.layer_norm, formulas.layer_norm, tensors, dict(eps=1e-5, offset=offset))
    else:
        options = dict(eps=1e-5, offset=offset)
        op = lambda x, w, **o: slim_ops.rms_norm(x, w, gain_in_float="float" in kind, **o)  # noqa: E731
        gradients_agree(op, formulas.rms_norm, (x, None if "bare" in kind else w), options)


def test_norms_pass_torchs_own_checks():
    x, w = torch.randn(2, 3, 7, requires_grad=True), torch.randn(7, requires_grad=True)
    checked_by_torch(slim_ops.rms_norm.default, (x, w), dict(eps=1e-6, offset=1.0))
    checked_by_torch(slim_ops.layer_norm.default, (x, w, w), dict(eps=1e-6))


# -- rotary embedding --------------------------------------------------------------------------------------------------


@FAST
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3), st.booleans(), DTYPES
)
def test_rope_turns_pairs_of_channels_and_passes_the_rest(batch, heads, length, half, rest, interleaved, dtype):
    x = torch.randn(batch, heads, length, 2 * half + rest).to(dtype)
    angles = torch.randn(batch, length, half)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    out = fake_agrees(slim_ops.rope, x, cos, sin, interleaved=interleaved)
    close(out, formulas.rope(x, cos, sin, interleaved=interleaved), dtype)
    assert torch.equal(out[..., 2 * half :], x[..., 2 * half :])


def test_a_narrow_rope_over_a_wide_table_keeps_its_type():
    x, angles = torch.randn(2, 3, 5, 8).bfloat16(), torch.randn(2, 5, 3)
    out = fake_agrees(slim_ops.rope, x, angles.cos(), angles.sin())
    close(out, formulas.rope(x, angles.cos(), angles.sin()), torch.bfloat16)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_through_rope_are_those_of_the_formula(interleaved):
    angles = torch.randn(2, 5, 3)
    tensors = (torch.randn(2, 4, 5, 8), angles.cos(), angles.sin())
    gradients_agree(slim_ops.rope, formulas.rope, tensors, dict(interleaved=interleaved))


def test_rope_turns_by_the_difference_of_positions():
    """What rotary embedding is for: <rope(q, i), rope(k, j)> depends on i - j alone."""
    q, k, inv_freq = torch.randn(8), torch.randn(8), torch.tensor([1.0, 0.3, 0.1, 0.02])

    def score(i, j):
        cos, sin = slim_ops.rope_table(torch.tensor([[i, j]]), inv_freq)
        turned = slim_ops.rope(torch.stack([q, k])[None, None], cos, sin)[0, 0]
        return float(turned[0] @ turned[1])

    assert math.isclose(score(3, 1), score(103, 101), rel_tol=1e-3)
    assert not math.isclose(score(3, 1), score(1, 3), rel_tol=1e-2)


@FAST
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.sampled_from([1.0, 1.4]), DTYPES)
def test_a_rope_table_holds_cosines_and_sines_of_position_times_frequency(batch, length, half, scale, dtype):
    positions, inv_freq = torch.randint(0, 300, (batch, length)), torch.rand(half)
    cos, sin = fake_agrees(slim_ops.rope_table, positions, inv_freq, scale=scale, dtype=dtype)
    angles = (positions[..., None].float() * inv_freq).double()
    close(cos, angles.cos() * scale, dtype)
    close(sin, angles.sin() * scale, dtype)
    assert cos.dtype == sin.dtype == dtype


def test_rope_passes_torchs_own_checks():
    x, angles = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 5, 3)
    checked_by_torch(slim_ops.rope.default, (x, angles.cos(), angles.sin()))
    checked_by_torch(slim_ops.rope_table.default, (torch.arange(6).reshape(2, 3), torch.rand(4)))


# -- quantisation ------------------------------------------------------------------------------------------------------


@st.composite
def grains(draw):
    """(x, scale, zero point or None, axis, group_size) at every granularity."""
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    kind = draw(st.sampled_from(["tensor", "vector", "axis", "rows", "groups"]))
    lead, columns, group = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    shape, axis, size = (lead, columns * group), None, None
    if kind == "tensor":
        scale_shape = ()
    elif kind == "vector":
        shape, axis, scale_shape = (lead,), 0, (lead,)
    elif kind == "axis":
        axis = draw(st.sampled_from([0, 1]))
        scale_shape = (shape[axis],)
    elif kind == "rows":
        shape, axis = (draw(st.integers(2, 3)), *shape), 1
        scale_shape = shape[:2]
    else:
        axis, size = draw(st.sampled_from([0, 1])), group
        shape = shape if axis == 1 else shape[::-1]
        scale_shape = tuple(n // group if d == axis else n for d, n in enumerate(shape))
    scale = torch.rand(scale_shape) * 0.05 + 0.01
    zero = torch.randint(-20, 20, scale_shape).to(torch.int8) if draw(st.booleans()) else None
    return torch.randn(shape) * 2, scale, zero, axis, size


@settings(max_examples=60, deadline=None)
@given(grains(), st.sampled_from([(-128, 127), (-127, 127), (-8, 7)]))
def test_quantize_and_dequantize_are_onnxs(grain, limits):
    x, scale, zero, axis, size = grain
    low, high = limits
    steps, zeros = formulas.grid(scale, x.shape, axis, size), torch.zeros(x.shape, dtype=torch.float64)
    if zero is not None:
        zeros = formulas.grid(zero, x.shape, axis, size)
    q = fake_agrees(slim_ops.quantize, x, scale, zero, axis=axis, group_size=size, low=low, high=high)
    assert q.dtype == torch.int8
    exact = x.double() / steps + zeros
    wanted = torch.round(x / steps.float()).double() + zeros
    assert torch.equal(q.double(), wanted.clamp(low, high))
    back = fake_agrees(slim_ops.dequantize, q, scale, zero, axis=axis, group_size=size)
    close(back, (q.double() - zeros) * steps)
    kept = (exact > low) & (exact < high)
    error = (back.double() - x.double()).abs() / steps
    assert (error[kept] <= 0.5 + 1e-4).all()  # within half a step, where nothing was clamped


def test_ties_round_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert slim_ops.quantize(x, torch.tensor(1.0)).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantize_rounds_once_from_float32(dtype):
    q, scale = torch.randint(-127, 128, (5, 8)).to(torch.int8), torch.rand(5)
    out = fake_agrees(slim_ops.dequantize, q, scale, axis=0, dtype=dtype)
    assert torch.equal(out, (q.float() * scale[:, None]).to(dtype))


def test_a_large_weight_is_dequantised_as_a_small_one_is():
    """It goes through blocks of rows, which must not show."""
    q = torch.randint(-127, 128, (3, 700, 1100)).to(torch.int8)
    scale, zero = torch.rand(3, 700), torch.randint(-3, 3, (3, 700)).to(torch.int8)
    wanted = (q.float() - zero[..., None].float()) * scale[..., None]
    assert torch.equal(slim_ops.dequantize(q, scale, zero, axis=1), wanted)
    groups = torch.rand(3, 700, 11)
    wanted = q.float() * groups.repeat_interleave(100, -1)
    assert torch.equal(slim_ops.dequantize(q, groups, axis=2, group_size=100), wanted)


def test_gradients_reach_the_scale_through_dequantize():
    q = torch.randint(-127, 128, (4, 6)).to(torch.int8)
    formula = lambda q, scale, **_: q.double() * scale[:, None]  # noqa: E731
    gradients_agree(slim_ops.dequantize, formula, (q, torch.rand(4)), dict(axis=0))


def test_quantisation_passes_torchs_own_checks():
    x, scale = torch.randn(4, 6), torch.rand(4) + 0.1
    checked_by_torch(slim_ops.quantize.default, (x, scale), dict(axis=0))
    q = slim_ops.quantize(x, scale, axis=0)
    checked_by_torch(slim_ops.dequantize.default, (q, scale.requires_grad_()), dict(axis=0))


@FAST
@given(st.lists(st.integers(1, 4), max_size=2), st.integers(0, 9), st.integers(0, 1 << 16))
def test_int4_numbers_come_out_of_their_bytes_as_they_went_in(lead, pairs, seed):
    q = torch.randint(-8, 8, (*lead, 2 * pairs), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_int4(q)
    assert (packed.dtype, packed.shape) == (torch.uint8, (*lead, pairs))
    assert torch.equal(fake_agrees(slim_ops.unpack_int4, packed), q)


def test_the_even_column_is_the_low_nibble():
    assert slim_ops.unpack_int4(torch.tensor([[0x3A, 0x08], [0x0F, 0xF0]], dtype=torch.uint8)).tolist() == [
        [2, -5, 0, -8],
        [7, -8, -8, 7],
    ]
    checked_by_torch(slim_ops.unpack_int4.default, (torch.arange(6, dtype=torch.uint8).reshape(2, 3),))


# -- experts -----------------------------------------------------------------------------------------------------------


@FAST
@given(st.integers(0, 9), st.integers(1, 7), st.integers(1, 5), st.integers(1, 4), st.booleans(), DTYPES)
def test_expert_linear_multiplies_each_row_by_its_experts_matrix(rows, width, out, experts, biased, dtype):
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(experts, out, width).to(dtype)
    bias = torch.randn(experts, out).to(dtype) if biased else None
    expert = torch.randint(0, experts, (rows,))
    y = fake_agrees(slim_ops.expert_linear, x, weight, bias, expert)
    close(y, formulas.expert_linear(x, weight, bias, expert), dtype, scale=width)


@pytest.mark.parametrize("biased", [False, True])
def test_gradients_through_expert_linear_are_those_of_the_formula(biased):
    tensors = (
        torch.randn(7, 5), torch.randn(3, 4, 5), torch.randn(3, 4) if biased else None,
        torch.tensor([0, 2, 2, 0, 2, 2, 0]),
    )  # fmt: skip
    gradients_agree(slim_ops.expert_linear, formulas.expert_linear, tensors, {})


def test_experts_that_no_row_asks_for_are_not_read():
    weight = torch.randn(3, 4, 5)
    weight[1] = math.nan
    assert torch.isfinite(slim_ops.expert_linear(torch.randn(4, 5), weight, None, torch.tensor([0, 2, 2, 0]))).all()


def test_expert_linear_passes_torchs_own_checks():
    x, weight = torch.randn(7, 5, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)
    checked_by_torch(slim_ops.expert_linear.default, (x, weight, None, torch.randint(0, 3, (7,))))
