"""Quantize puts numbers, scales and rounded rows into the graph, and says what it left alone."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from slim import errors
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.statistics import checkpoint as checkpoints
from slim.compiler.text import parse
from slim.compiler.uses import UNPACKS
from slim.compiler.verify import verify
from slim.passes import FoldNorms, Quantize
from tests.programs import Counted, lifted, program

DEQUANTIZE = torch.ops.slim.dequantize.default
LINEAR = torch.ops.aten.linear.default
TOKENS = [torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def quantized(before, calibration=None, **options):
    after = before.copy()
    report = Quantize(**options).run(after, Context(calibration=calibration))
    after.clean()
    verify(after, "quantize")
    return after, report


def restored(after, name):
    """What stands for a weight, as the graph computes it."""
    (node,) = [node for node in after.nodes(DEQUANTIZE) if _reads(node, name)]
    return _value(after, node)


def _reads(node, name):
    numbers = node.args[0]
    held = numbers.args[0] if numbers.op == "call_function" else numbers
    return getattr(held, "target", None) == name


def _value(after, node):
    if node.op == "get_attr":
        return after.weights[str(node.target)]
    args = [_value(after, argument) for argument in node.args]
    return node.target(*args, **node.kwargs)


def one_linear(weight, **more):
    return program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": weight}, **more)


# -- formats -----------------------------------------------------------------------------------------------------------

BYTES = {  # of a weight [6, 64]: numbers, and scales (a group of 32 each, or a row), and zero points
    "int8": 6 * 64 + 6 * 4, "int4": 6 * 32 + 12 * 2, "int3": 6 * 24 + 12 * 2, "nf4": 6 * 32 + 6 * 2,
    "fp8": 6 * 64 + 6 * 4,
}  # fmt: skip
STEPS = {"int8": 0.008, "int4": 0.1, "int3": 0.21, "nf4": 0.11, "fp8": 0.03}  # relative error of random numbers


@pytest.mark.parametrize("weights", BYTES)
def test_a_linear_reads_what_its_numbers_stand_for_and_they_take_the_bytes_that_they_say(weights: Any) -> None:
    weight = torch.randn(6, 64)
    before = one_linear(weight, inputs="x: f32[B, S, 64]")
    after, report = quantized(before, weights=weights)
    assert report.matched == ["w"]
    assert after.nbytes == BYTES[weights]
    assert after.parameters == before.parameters
    x = torch.randn(2, 3, 64)
    held = restored(after, "w")
    assert torch.equal(after.run(x)[0], torch.nn.functional.linear(x, held))
    assert float((held - weight).norm() / weight.norm()) < STEPS[weights]
    assert str(parse(str(after), after.weights, after.facts)) == str(after)
    assert (weights in UNPACKS) == (f"unpack_{weights}" in str(after))


@pytest.mark.parametrize("weights", ["int4", "int3"])
def test_zero_points_take_a_number_a_group_and_serve_numbers_off_centre(weights: Any) -> None:
    weight = torch.rand(6, 256) + 0.5
    errors_ = {}
    for symmetric in (True, False):
        after, _ = quantized(one_linear(weight, inputs="x: f32[B, S, 256]"), weights=weights, symmetric=symmetric)
        errors_[symmetric] = float((restored(after, "w") - weight).norm())
    assert after.weights.dtype("w_zero") == torch.uint8
    assert after.weights.shape("w_zero") == ((6, 4) if weights == "int4" else (6, 3))
    assert errors_[False] < 0.9 * errors_[True]


def test_exceptions_by_pattern_have_a_format_of_their_own() -> None:
    after, report = quantized(
        lifted("llama"), weights="int4", group_size=16, formats=["*.down_proj.weight=int8", "*.q_proj.weight=int4/8"]
    )
    assert after.weights.dtype("model.layers.0.mlp.down_proj.weight") == torch.int8
    assert after.weights.shape("model.layers.0.self_attn.q_proj.weight_scale") == (32, 4)
    assert after.weights.shape("model.layers.0.self_attn.k_proj.weight_scale") == (16, 2)
    assert report.skipped == [("model.embed_tokens.weight", "it is an embedding (embeddings=False)")]


# -- groups ------------------------------------------------------------------------------------------------------------


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


# -- rows that enter ---------------------------------------------------------------------------------------------------


def rounded(x: Tensor, step: Tensor) -> Tensor:
    return (x / step).round().clamp(-128, 127) * step


def test_rows_are_rounded_by_the_largest_number_of_each_token() -> None:
    after, _ = quantized(one_linear(torch.randn(6, 8)), activations="int8")
    x = torch.randn(2, 3, 8) * torch.tensor([1.0, 100.0, 0.0])[:, None]
    steps = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-38)
    wanted = torch.nn.functional.linear(rounded(x, steps), restored(after, "w"))
    torch.testing.assert_close(after.run(x)[0], wanted)


def test_a_static_scale_is_that_of_the_largest_number_seen() -> None:
    seen = [torch.randn(2, 5, 8), torch.randn(2, 5, 8)]
    after, _ = quantized(one_linear(torch.randn(6, 8)), seen, activations="int8", static=True)
    step = torch.cat(seen).abs().max() / 127
    torch.testing.assert_close(after.weights["w_step"], step)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(after.run(x)[0], torch.nn.functional.linear(rounded(x, step), restored(after, "w")))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "phi3"])
@pytest.mark.parametrize("static", [False, True])
def test_linears_over_the_same_rows_read_one_rounded_value(name: str, static: bool) -> None:
    before = lifted(name)
    after, _ = quantized(before, TOKENS, activations="int8", static=static)
    linears = [n for n in after.nodes(LINEAR, torch.ops.slim.expert_linear.default) if n.args[1].op != "get_attr"]
    assert all(linear.args[0].target is DEQUANTIZE for linear in linears)
    sites = {n.args[0] for n in before.nodes(LINEAR, torch.ops.slim.expert_linear.default)}
    assert len({linear.args[0] for linear in linears}) <= len(sites) < len(linears)
    assert str(parse(str(after), after.weights, after.facts)) == str(after)


def test_routers_read_rows_as_they_are() -> None:
    after, _ = quantized(lifted("mixtral"), activations="int8")
    (router,) = [n for n in after.nodes(LINEAR) if n.args[1].op == "get_attr"]
    assert router.args[0].target is not DEQUANTIZE


# -- beside the numbers ------------------------------------------------------------------------------------------------


def outlying() -> list[Tensor]:
    x = torch.randn(4, 20, 64)
    x[..., [3, 40]] *= 100
    return [x]


def test_outlier_columns_stay_as_they_are_and_out_of_the_scale_of_rows() -> None:
    weight, data = torch.randn(6, 64), outlying()
    before = one_linear(weight, inputs="x: f32[B, S, 64]")
    wanted = before.run(data[0])[0]
    options: dict[str, Any] = dict(activations="int8")
    moved = {}
    for share in (0.0, 2 / 64):
        after, _ = quantized(before, data, outliers=share, **options)
        moved[share] = float((after.run(data[0])[0] - wanted).norm() / wanted.norm())
    assert after.weights["w_columns"].tolist() == [3, 40]
    assert torch.equal(after.weights["w_outliers"], weight[:, [3, 40]])
    assert moved[2 / 64] < 0.1 * moved[0.0]


def test_a_correction_takes_most_of_the_error_where_it_has_the_rank() -> None:
    weight, data = torch.randn(16, 64), [torch.randn(4, 100, 64)]
    before = one_linear(weight, inputs="x: f32[B, S, 64]")
    wanted = before.run(data[0])[0]
    moved = []
    for rank in (0, 4, 12):
        after, _ = quantized(before, data, weights="int3", correction=rank, method="rtn")
        moved.append(float((after.run(data[0])[0] - wanted).norm() / wanted.norm()))
    assert moved[1] < 0.9 * moved[0]
    assert moved[2] < 0.5 * moved[0]
    assert after.weights.shape("w_inner") == (12, 64)


def test_a_correction_as_large_as_its_weight_is_left_out_and_noted() -> None:
    before = one_linear(torch.randn(16, 64), inputs="x: f32[B, S, 64]")
    after, report = quantized(before, [torch.randn(4, 100, 64)], weights="int3", correction=13)
    assert list(after.weights) == ["w", "w_scale"]
    assert any("w gets no correction" in note for note in report.notes)


def test_experts_get_neither_and_are_quantised_all_the_same() -> None:
    after, report = quantized(lifted("mixtral"), TOKENS, outliers=0.1, correction=2, weights="int4", group_size=16)
    experts = {n.args[1].args[0].args[0].target for n in after.nodes(torch.ops.slim.expert_linear.default)}
    assert experts <= set(report.matched)
    assert any("experts" in note for note in report.notes)


# -- with data ---------------------------------------------------------------------------------------------------------


def moved(name: str, method: str | None) -> tuple[float, list[str]]:
    """(how far int3 by ``method`` moves the output on the calibration data, the report's notes)."""
    before = lifted(name)
    tokens = torch.cat(TOKENS)
    inputs = [tokens, torch.ones_like(tokens), torch.arange(24).expand(len(tokens), -1)][: len(before.inputs)]
    after, report = quantized(before, TOKENS, weights="int3", group_size=16, method=method)
    return float((after.run(*inputs)[0] - before.run(*inputs)[0]).norm()), report.notes


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_neox"])
def test_with_data_less_is_lost_than_by_rounding_to_nearest(name: str) -> None:
    assert moved(name, None)[0] < 0.8 * moved(name, "rtn")[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma"])
def test_awq_moves_scales_and_loses_less_than_rounding_to_nearest(name: str) -> None:
    error, notes = moved(name, "awq")
    assert any("awq moved scales at" in note and "at 0 of" not in note for note in notes)
    assert error < 0.95 * moved(name, "rtn")[0]


def test_the_report_says_how_much_data_there_was_and_by_what_method_weights_were_rounded() -> None:
    _, report = quantized(lifted("llama"), TOKENS, weights="int4", group_size=16)
    assert any("384 calibration tokens" in note for note in report.notes)
    _, without = quantized(lifted("llama"), weights="int4", group_size=16)
    assert any("without calibration data" in note for note in without.notes)


@pytest.mark.parametrize("options", [dict(method="gptq"), dict(method="awq"), dict(activations="int8", static=True),
                                     dict(outliers=0.1), dict(correction=4)])  # fmt: skip
def test_what_needs_data_refuses_to_go_without(options: dict[str, Any]) -> None:
    with pytest.raises(errors.NeedsCalibration, match=r"quantize\(.* needs calibration data"):
        quantized(lifted("llama"), **options)


INTERRUPTED: list[dict[str, Any]] = [
    dict(weights="int4", activations="int8", correction=2), dict(weights="int3", method="awq"),
    dict(weights="int4", budget=60_000),
]  # fmt: skip


@pytest.mark.parametrize("options", INTERRUPTED, ids=str)
def test_an_interrupted_run_ends_with_the_same_weights(
    options: dict[str, Any], empty_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    before = lifted("llama", num_hidden_layers=3)
    options = dict(options, group_size=16)
    whole, _ = quantized(before, TOKENS, **options)
    interrupt(before, **options)
    after = before.copy()
    done: list[int] = []
    Quantize(**options).run(after, Context(calibration=TOKENS, progress=lambda what, step, total: done.append(step)))
    every: list[int] = []
    again = Context(calibration=TOKENS, progress=lambda what, step, total: every.append(step))
    Quantize(**options).run(before.copy(), again)
    assert len(done) < len(every)
    assert all(torch.equal(whole.weights[name], after.weights[name]) for name in whole.weights)


def interrupt(before: Any, **options: Any) -> None:
    """Begins a run, and stops it in its first walk behind two thirds."""

    def stop(what: str, done: int, total: int) -> None:
        if "calibrating" in what and done > 0.66 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Quantize(**options).run(before.copy(), Context(calibration=TOKENS, progress=stop))


def test_what_an_interrupted_run_left_serves_no_other_options(
    empty_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    before = lifted("llama", num_hidden_layers=3)
    wanted, _ = quantized(before, TOKENS, weights="int3", group_size=16)
    interrupt(before, weights="int4", group_size=16)
    found, _ = quantized(before, TOKENS, weights="int3", group_size=16)
    assert all(torch.equal(wanted.weights[name], found.weights[name]) for name in wanted.weights)


def test_a_budget_is_kept_and_gives_more_bits_to_what_needs_them() -> None:
    before = lifted("llama", num_hidden_layers=3)
    sizes = {w: quantized(before, weights=w, group_size=16)[0].nbytes for w in ("int8", "int4", "int3")}
    budget = (sizes["int4"] + sizes["int8"]) // 2
    after, report = quantized(before, TOKENS, weights="int4", group_size=16, budget=budget)
    assert sizes["int4"] < after.nbytes <= budget
    kinds = {after.weights.dtype(name) for name in report.matched}
    assert kinds == {torch.int8, torch.uint8}
    with pytest.raises(errors.BadPassOption, match="do not hold the weights"):
        quantized(before, TOKENS, weights="int4", group_size=16, budget=sizes["int3"] // 2)


# -- options that mean nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(symmetric=False), "int8 has no zero point"),
        (dict(group_size=0), "holds no number"),
        (dict(outliers=0.7), "share of columns"),
        (dict(correction=-1), "rank"),
        (dict(budget=0), "nothing fits"),
        (dict(static=True), "contradict"),
        (dict(weights="fp8", activations="int8"), "contradict"),
        (dict(formats=["int8"]), "PATTERN=FORMAT"),
        (dict(formats=["*=int5"]), "PATTERN=FORMAT"),
        (dict(formats=["*=int4/x"]), "PATTERN=FORMAT"),
        (dict(method="finest"), "method"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.SlimError, match=said):
        Quantize(**options)


def test_an_exception_that_matches_nothing_is_refused() -> None:
    with pytest.raises(errors.BadPassOption, match=r"down_porj.* matches no weight"):
        quantized(lifted("llama"), formats=["*.down_porj.weight=int8"])


def test_text_of_all_options_reads_back() -> None:
    from slim.passes import parse_pipeline

    whole = Quantize("int4", "int8", 16, "awq", False, True, 0.01, 4, 10**9, ("*q_proj*=int8",), True, False, ("a*",))
    assert parse_pipeline(repr(whole)) == (whole,)
    assert parse_pipeline("fold_norms, " + repr(Quantize())) == (FoldNorms(), Quantize())
