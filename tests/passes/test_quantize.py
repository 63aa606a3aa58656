"""Quantize keeps every weight within half a step, says what it left alone, and holds one weight at a time."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slim import errors
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.text import parse
from slim.compiler.verify import verify
from slim.passes import Quantize
from slim.passes.quantize import round_to_nearest
from tests.programs import Counted, lifted, program

DEQUANTIZE = torch.ops.slim.dequantize.default


def quantized(before, **options):
    after = before.copy()
    report = Quantize(**options).run(after, Context())
    after.clean()
    verify(after, "quantize")
    return after, report


def restored(after, name):
    return after.weights[name].float() * after.weights[f"{name}_scale"][..., None]


@settings(deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    log_size=st.floats(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_every_weight_is_within_half_a_step(rows, width, seed, log_size, dtype):
    spread = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double() * 10.0**log_size
    weight = spread.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    q, scale = round_to_nearest(weight)
    error = (weight.double() - q.double() * scale.double()[:, None]).abs()
    assert (error <= scale.double()[:, None] * 0.5 * (1 + 1e-5)).all()
    assert q.min() >= -127


def test_rows_of_zeros_come_back_as_zeros():
    q, scale = round_to_nearest(torch.tensor([[0.0, 0.0], [1.0, -2.0], [1e-45, 0.0]]))
    assert q[0].tolist() == [0, 0]
    assert q[1].tolist() == [64, -127]
    assert scale.isfinite().all()
    assert (scale > 0).all()


def test_a_large_weight_is_quantised_as_a_small_one_is(monkeypatch):
    weight = torch.randn(7, 5, 6)
    whole = round_to_nearest(weight)
    monkeypatch.setattr("slim.compiler.blocks._ELEMENTS", 12)
    assert all(torch.equal(a, b) for a, b in zip(whole, round_to_nearest(weight), strict=True))
    assert torch.equal(dequantized(*whole), whole[0].float() * whole[1][..., None])


def dequantized(q, scale):
    return torch.ops.slim.dequantize(q, scale, axis=scale.dim() - 1)


def test_a_linear_reads_what_its_int8_weight_stands_for():
    weight = torch.randn(6, 8)
    before = program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": weight})
    after, report = quantized(before)
    assert report.matched == ["w"]
    assert after.weights.dtype("w") == torch.int8
    assert after.weights.shape("w_scale") == (6,)
    assert after.nbytes == 6 * 8 + 6 * 4
    assert after.parameters == before.parameters
    x = torch.randn(2, 3, 8)
    assert torch.equal(after.run(x)[0], torch.nn.functional.linear(x, restored(after, "w")))
    assert torch.equal(before.weights["w"], weight)


# -- groups and four bits ----------------------------------------------------------------------------------------------


def error(weight, q, scale, group):
    """Squared error of each group, in float64."""
    steps = q.double() * scale.double().repeat_interleave(group, -1)
    return (weight.double() - steps).square().unflatten(-1, (-1, group)).sum(-1)


@settings(deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    group=st.sampled_from([2, 8, 32]),
    seed=st.integers(0, 2**31),
    log_size=st.floats(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    weights=st.sampled_from(["int8", "int4"]),
)
def test_every_group_has_a_scale_that_is_as_good_as_max_over_the_limit(
    rows, groups, group, seed, log_size, dtype, weights
):
    spread = torch.randn(rows, groups * group, generator=torch.Generator().manual_seed(seed)).double() * 10.0**log_size
    weight = spread.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    q, scale = round_to_nearest(weight, weights, group)
    limit = 7 if weights == "int4" else 127
    assert -limit - (weights == "int4") <= q.min() <= q.max() <= limit
    assert scale.shape == (rows, groups)
    assert scale.isfinite().all()
    assert (scale != 0).all()
    plain = weight.double().abs().unflatten(-1, (groups, group)).amax(-1) / limit
    rounded = plain.half() if scale.dtype == torch.float16 else plain.float()
    rounded = rounded.double().clamp_min(2.0**-24 if scale.dtype == torch.float16 else torch.finfo(torch.float32).tiny)
    steps = (weight.double() / rounded.repeat_interleave(group, -1)).round().clamp(-limit, limit)
    baseline = error(weight, steps, rounded, group)
    assert (error(weight, q, scale, group) <= baseline * (1 + 1e-3) + 1e-70).all()


def test_int4_uses_all_sixteen_steps_where_that_is_better():
    weight = torch.tensor([[8.0, -7.0, -6.0, 3.0], [-8.0, 7.0, 1.0, 2.0], [7.0, -7.0, 1.0, 3.0]])
    q, scale = round_to_nearest(weight, "int4", 4)
    assert scale.flatten().tolist() == [-1, 1, 1]
    assert q.tolist() == [[-8, 7, 6, -3], [-8, 7, 1, 2], [7, -7, 1, 3]]
    assert scale.dtype == torch.float16


@pytest.mark.parametrize(("size", "dtype"), [(1.0, torch.float16), (1e-7, torch.float32), (1e7, torch.float32)])
def test_scales_are_half_precision_unless_that_cannot_hold_them(size, dtype):
    weight = torch.randn(4, 64) * size
    q, scale = round_to_nearest(weight, "int4", 32)
    assert scale.dtype == dtype
    assert (weight - q * scale.float().repeat_interleave(32, -1)).norm() < 0.15 * weight.norm()


def test_groups_of_zeros_come_back_as_zeros():
    weight = torch.zeros(2, 8)
    weight[0, :4] = torch.tensor([1.0, -2.0, 0.0, 1e-20])
    for q, scale in (round_to_nearest(weight, "int4", 4), round_to_nearest(torch.zeros(2, 8), "int8", 4)):
        assert q[1].tolist() == [0] * 8
        assert (scale != 0).all()


def test_a_linear_reads_what_its_int4_weight_stands_for():
    weight = torch.randn(6, 8)
    before = program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": weight})
    after, report = quantized(before, weights="int4", group_size=4)
    assert report.matched == ["w"]
    assert after.weights.dtype("w") == torch.uint8
    assert after.weights.shape("w") == (6, 4)
    assert after.weights.shape("w_scale") == (6, 2)
    assert after.nbytes == 6 * 4 + 6 * 2 * 2
    assert after.parameters == before.parameters
    q, scale = round_to_nearest(weight, "int4", 4)
    x = torch.randn(2, 3, 8)
    wanted = torch.nn.functional.linear(x, q * scale.float().repeat_interleave(4, -1))
    assert torch.equal(after.run(x)[0], wanted)
    assert 'slim.unpack_int4.default(weights["w"])' in str(after)


@pytest.mark.parametrize("options", [dict(weights="int4"), dict(group_size=32)])
def test_rows_that_do_not_divide_into_groups_are_left_with_the_reason(options):
    body = "y = aten.linear.default(x, weights['v'])\nz = aten.linear.default(y, weights['w'])\nreturn (z,)"
    before = program(body, {"v": torch.randn(64, 8), "w": torch.randn(8, 64)})
    _, report = quantized(before, **options)
    assert report.matched == ["w"]
    assert report.skipped == [("v", "its rows of 8 do not divide into groups of 32")]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("options", [dict(weights="int4", group_size=16), dict(group_size=16)], ids=["int4", "int8"])
def test_grouped_models_stay_close_and_their_text_reads_back(name, options):
    before = lifted(name)
    after, report = run_pipeline(before, [Quantize(**options, embeddings=True)], Context())
    (done,) = report.passes
    assert 0 < done.error < 1
    assert not [reason for _, reason in done.skipped if "groups" in reason]
    assert after.parameters == before.parameters
    assert str(parse(str(after), after.weights, after.facts)) == str(after)


def test_grouped_experts_have_a_scale_for_each_group_of_each_row():
    after, report = quantized(lifted("mixtral"), weights="int4", group_size=16)
    (name,) = [name for name in report.matched if "layers.0" in name and "down_proj" in name]
    experts, rows, half = after.weights.shape(name)
    assert after.weights.shape(f"{name}_scale") == (experts, rows, 2 * half // 16)


def test_two_readers_of_one_weight_read_one_restored_value():
    body = "y = aten.linear.default(x, weights['w'])\nz = aten.linear.default(x, weights['w'])\nreturn (y, z)"
    after, _ = quantized(program(body, {"w": torch.randn(6, 8)}))
    assert len(list(after.nodes(DEQUANTIZE))) == 1


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in ("llama", "qwen2", "gemma", "gpt2", "mixtral")), ("llama", torch.bfloat16)],
)
def test_models_stay_close_and_their_text_reads_back(name, dtype):
    before = lifted(name, dtype)
    after, report = run_pipeline(before, [Quantize()], Context())
    (done,) = report.passes
    assert 0 < done.error < 0.3
    plain = {after.weight_of(node.args[1]) for node in after.nodes(torch.ops.aten.linear.default)} - {None}
    assert all(name.endswith("gate.weight") for name in plain)  # routers
    assert str(parse(str(after), after.weights, after.facts)) == str(after)


def test_embeddings_and_routers_are_left_alone_and_said_so():
    _, report = quantized(lifted("mixtral"))
    reasons = dict(report.skipped)
    assert reasons["model.embed_tokens.weight"] == "it is an embedding (embeddings=False)"
    assert reasons["model.layers.0.mlp.gate.weight"] == "it routes tokens to experts"
    assert "lm_head.weight" in report.matched


def test_experts_have_a_scale_for_each_row_of_each_expert():
    after, report = quantized(lifted("mixtral"))
    (name,) = [name for name in report.matched if "layers.0" in name and "down_proj" in name]
    assert after.weights.shape(f"{name}_scale") == after.weights.shape(name)[:2]


def test_a_tied_table_is_one_value_and_takes_the_embedding_with_it():
    before = lifted("llama", tie_word_embeddings=True)
    after, report = quantized(before)
    table = "model.embed_tokens.weight"
    assert table in report.matched
    assert any("embedding and head at once" in note for note in report.notes)
    (value,) = [node for node in after.nodes(DEQUANTIZE) if node.args[0].target == table]
    assert {str(user.target) for user in value.users} == {"aten.embedding.default", "aten.linear.default"}


def test_the_head_stays_when_asked():
    for before in (lifted("llama"), lifted("llama", tie_word_embeddings=True)):
        after, report = quantized(before, head=False)
        head = before.facts.tied.get("lm_head.weight", "lm_head.weight")
        assert (head, "it is the head (head=False)") in report.skipped
        assert after.weights.dtype(head) == torch.float32


def test_a_tied_table_cannot_be_quantised_and_left_at_once():
    with pytest.raises(errors.ContradictoryOptions, match="embedding and head at once"):
        quantized(lifted("llama", tie_word_embeddings=True), head=False, embeddings=True)


def test_leaving_out_a_head_that_is_not_there_is_said():
    before = program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": torch.randn(6, 8)})
    _, report = quantized(before, head=False)
    assert report.matched == ["w"]
    assert any("no language model head" in note for note in report.notes)


def test_embeddings_are_quantised_when_asked():
    after, report = quantized(lifted("llama"), embeddings=True)
    assert "model.embed_tokens.weight" in report.matched
    assert after.weights.shape("model.embed_tokens.weight_scale") == (96,)


def test_excluded_weights_stay_whichever_of_their_names_is_meant():
    _, report = quantized(lifted("llama", tie_word_embeddings=True), exclude=["*.down_proj.weight", "lm_head*"])
    left = {site for site, reason in report.skipped if "excluded" in reason}
    assert left == {
        "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight",
    }  # fmt: skip


def test_a_pattern_that_excludes_nothing_is_refused():
    with pytest.raises(errors.BadPassOption, match=r"down_porj.* matches no weight"):
        quantized(lifted("llama"), exclude=["*.down_porj.weight"])


def test_weights_that_are_no_linears_are_left_with_the_reason():
    before = program(
        "y = aten.matmul.default(x, weights['m'])\nz = aten.linear.default(y, weights['w'])\nreturn (z,)",
        {"m": torch.randn(8, 8), "w": torch.randn(6, 8)},
    )
    _, report = quantized(before)
    assert report.skipped == [("m", "it is read by aten.matmul.default, which is no linear")]


def test_nan_is_refused_by_name():
    weight = torch.randn(6, 8)
    weight[2, 3] = torch.nan
    before = program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": weight})
    with pytest.raises(errors.NonFiniteWeight, match="'w' holds 1 NaN"):
        run_pipeline(before, [Quantize()], Context(verify=False))


def test_no_two_weights_on_disk_are_in_memory_at_once():
    weights = {f"w{i}": Counted(torch.randn(8, 8)) for i in range(4)}
    lines = [f"y{i} = aten.linear.default({f'y{i - 1}' if i else 'x'}, weights['w{i}'])" for i in range(4)]
    before = program("\n".join([*lines, "return (y3,)"]), weights)
    Counted.reset()
    after, _ = run_pipeline(before, [Quantize()], Context())
    gc.collect()
    assert Counted.most == 1
    assert Counted.alive == 0
    assert all(weight.reads == 2 for weight in weights.values())  # the probe, and the pass
    assert not any(after.weights.is_deferred(name) for name in after.weights)
