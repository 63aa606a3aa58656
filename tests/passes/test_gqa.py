"""GQA merges heads exactly where that can be, as well as it claims elsewhere, and the Program follows."""

import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

import slim
from slim import errors
from slim.compiler.lift import lift
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.program import Program
from slim.compiler.report import Report
from slim.compiler.statistics import checkpoint as checkpoints
from slim.passes import GQA, Quantize
from slim.passes.heads.distances import Distances
from slim.passes.heads.find import find_heads
from slim.passes.heads.grouping import cheapest, contiguous
from slim.passes.heads.merge import Stack, aligned_mean, apart
from slim.runtime.compiled import CompiledModel
from tests import programs
from tests.compiled import built, difference, lifted, pair

TOKENS = [torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def merged(program: Program, pass_: GQA, strict: bool = True) -> tuple[Program, Report]:
    after, report = run_pipeline(program, [pass_], Context(calibration=TOKENS, strict=strict))
    return after, report.passes[0]


def kv_heads(program: Program) -> list[int]:
    return [int(node.args[1].meta["val"].shape[1]) for node in program.attention_nodes()]  # type: ignore[union-attr]


# -- exact -------------------------------------------------------------------------------------------------------------


def one_basis(model: Any, group: int, seed: int, turning: int, interleaved: bool = False) -> None:
    """Makes every ``group`` kv heads of ``model`` one head in different bases: exact merges exist.

    The first ``turning`` channels of a key differ by complex factors a pair, all others by an invertible matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for head in range(config.num_key_value_heads):
                if head % group:
                    factor = rotation_and_scale(config.head_dim, turning, interleaved, generator)
                    like_the_first(attention.k_proj, head, group, factor)
                    like_the_first(attention.v_proj, head, group, mixing(config.head_dim, generator))


def like_the_first(linear: torch.nn.Linear, head: int, group: int, factor: Tensor) -> None:
    """Makes a head's rows those of the first in its group, times ``factor``."""
    for parameter in linear.parameters():
        rows = parameter.view(-1, len(factor), *parameter.shape[1:])
        rows[head] = factor @ rows[head - head % group]


def rotation_and_scale(width: int, turning: int, interleaved: bool, generator: torch.Generator) -> Tensor:
    matrix = torch.eye(width)
    pairs = turning // 2
    for p in range(pairs):
        a, b = (2 * p, 2 * p + 1) if interleaved else (p, p + pairs)
        size, angle = torch.rand(2, generator=generator) * torch.tensor([1.5, 6.28]) + torch.tensor([0.5, 0.0])
        matrix[a, a] = matrix[b, b] = size * angle.cos()
        matrix[b, a], matrix[a, b] = size * angle.sin(), -size * angle.sin()
    if turning < width:
        matrix[turning:, turning:] = mixing(width - turning, generator)
    return matrix


def mixing(width: int, generator: torch.Generator) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    return q * (0.5 + torch.rand(width, generator=generator))


# A Program shares its model's weights: what is written into them after the lift is in it.
sharing = functools.cache(lift)


@given(st.integers(0, 10_000), st.sampled_from([(4, 4, 2), (4, 4, 4), (8, 4, 2)]))
@settings(max_examples=5, deadline=None)
def test_heads_that_differ_by_complex_factors_a_frequency_merge_exactly(seed: int, heads: tuple[int, int, int]) -> None:
    many, kv, group = heads
    model = programs.model(
        "llama", num_attention_heads=many, num_key_value_heads=kv, num_hidden_layers=1, initializer_range=0.021
    )
    one_basis(model, group, seed, turning=8)
    after, report = merged(sharing(model), GQA(kv // group))
    assert kv_heads(after) == [kv // group]
    assert report.error is not None
    assert report.error < 1e-4


@pytest.mark.parametrize(
    ("name", "options", "turning", "interleaved"),
    [("glm", {"head_dim": 16, "partial_rotary_factor": 0.5}, 8, True), ("smollm3", {"no_rope_layers": [0]}, 0, False)],
)
def test_so_do_interleaved_pairs_with_channels_that_stay_and_heads_without_rotation(
    name: str, options: dict[str, Any], turning: int, interleaved: bool
) -> None:
    model = programs.model.__wrapped__(name, num_key_value_heads=4, **options)
    model.config.head_dim = getattr(model.config, "head_dim", None) or 8
    one_basis(model, 2, 0, turning, interleaved)
    _, report = merged(lift(model), GQA(2))
    assert report.error is not None
    assert report.error < 1e-4


def test_a_real_model_with_every_kv_head_twice_gets_its_own_back(shared: Path, tmp_path: Path) -> None:
    path = shared / "models" / "stories260K-mha"
    text = (shared / "text" / "tinystories_val.txt").read_text()[:6_000]
    compiled = slim.compile(path, passes=[GQA(4)], calibration=[text], target="eager")
    tokens = torch.randint(3, 500, (2, 40))
    original = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        expected = original(tokens).logits
    torch.testing.assert_close(compiled(tokens).logits, expected, atol=1e-4, rtol=0)
    assert kv_heads(compiled.program) == [4] * 5
    compiled.export(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.num_key_value_heads == 4
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, expected, atol=1e-4, rtol=0)


# -- better than the baselines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-mha", "gpt2", "opt", "gpt_neox", "bert", "phi3"])
def test_less_is_lost_than_by_pooling(name: str) -> None:
    program = lifted(name)
    losses = {method: merged(program, GQA(0.5, method=method))[1].error for method in ("aligned", "mean")}
    assert 0.0 < losses["aligned"] < 0.9 * losses["mean"]  # type: ignore[operator]


@given(st.integers(2, 4), st.integers(1, 3), st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_joint_form_is_the_best_and_predicts_its_loss(heads: int, width: int, complex_: bool) -> None:
    kind = torch.complex128 if complex_ else torch.float64
    maps = torch.randn(1, heads, width, 7, dtype=kind)
    root = torch.randn(1, heads, width, width, dtype=kind)
    half = torch.randn(7, 20, dtype=torch.float64)
    stack = Stack.of(maps, apart(root @ root.mH), half @ half.T)
    group = list(range(heads))
    best, other = stack.merge(group), aligned_mean(stack, group)
    assert best.loss == pytest.approx(stack.residual(group, best.shared, best.turns), rel=1e-6, abs=1e-9)
    assert best.loss <= other.loss + 1e-9
    assert best.loss == pytest.approx(stack.loss(group), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_averages_over_distances_are_those_of_the_rotation_itself(interleaved: bool) -> None:
    frequencies = torch.tensor([1.0, 0.3])
    falling = 1 / (1 + torch.arange(40, dtype=torch.float64))
    distances = Distances.of(frequencies, 6, interleaved, (falling / falling.sum())[None], causal=True)
    x = torch.randn(6, 6, dtype=torch.float64)
    found, back, total = torch.zeros_like(x), torch.zeros_like(x), 0.0
    for d in range(40):
        angle = -d * frequencies
        turned = torch.ops.slim.rope(
            torch.eye(6).reshape(6, 1, 1, 6), angle.cos().expand(6, 1, 2), angle.sin().expand(6, 1, 2),
            interleaved=interleaved,
        ).reshape(6, 6).T.double()  # fmt: skip
        found += turned @ x @ turned.T / (1 + d)
        back += turned.T @ x @ turned / (1 + d)
        total += 1 / (1 + d)
    torch.testing.assert_close(distances.turned(x)[0], found / total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(distances.turned(x, back=True)[0], back / total, atol=1e-5, rtol=1e-5)


@given(st.integers(0, 1000), st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 2)]))
@settings(max_examples=25, deadline=None)
def test_grouping_is_a_partition_that_costs_no_more_than_neighbours(seed: int, sizes: tuple[int, int]) -> None:
    heads, groups = sizes
    pairs = torch.rand(heads, heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = (pairs + pairs.T).fill_diagonal_(0)

    def cost(group: Any) -> float:
        return float(pairs[group][:, group].sum())

    found = cheapest(pairs, groups, cost)
    assert sorted(h for group in found for h in group) == list(range(heads))
    assert {len(group) for group in found} == {heads // groups}
    assert sum(map(cost, found)) <= sum(map(cost, contiguous(heads, groups)))


def test_equal_heads_that_are_not_neighbours_are_found() -> None:
    pairs = torch.ones(8, 8, dtype=torch.float64).fill_diagonal_(0)
    for i in range(4):
        pairs[i, i + 4] = pairs[i + 4, i] = 0
    assert cheapest(pairs, 4, lambda group: float(pairs[list(group)][:, list(group)].sum())) == [
        [0, 4], [1, 5], [2, 6], [3, 7],
    ]  # fmt: skip


# -- the Program follows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma2", "gpt_oss"])
def test_transformers_reads_back_the_same_model(name: str, tmp_path: Path) -> None:
    after, _ = merged(pair(name)[1].program, GQA(1))
    compiled = CompiledModel(after, "eager")
    compiled.export(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.num_key_value_heads == 1
    with torch.no_grad():
        assert difference(again(TOKENS[0]).logits, compiled(TOKENS[0]).logits) < 1e-5


@pytest.mark.parametrize(
    ("name", "named"),
    [("gpt2", r"c_attn.weight is \[64, 128\]"), ("gpt_neox", "query_key_value.weight"), ("opt", r"k_proj.weight is")],
)
def test_what_the_architecture_cannot_hold_saves_and_loads_and_is_not_exported(
    name: str, named: str, tmp_path: Path
) -> None:
    after, report = merged(pair(name)[1].program, GQA(2))
    compiled = CompiledModel(after, "eager")
    assert any("no field for kv heads" in note for note in report.notes)
    with pytest.raises(errors.ExportUnsupported, match=named):
        compiled.export(tmp_path / "out")
    compiled.save(tmp_path / "artifact")
    loaded = slim.load(tmp_path / "artifact", target="eager")
    assert torch.equal(loaded(TOKENS[0]).logits, compiled(TOKENS[0]).logits)


def test_the_merged_model_generates_on_the_generated_code() -> None:
    compiled = slim.compile(built("llama-mha"), passes=[GQA(2)], calibration=TOKENS, target="cpu")
    eager = CompiledModel(compiled.program, "eager")
    prompt = TOKENS[0][:1, :5]
    found, wanted = (m.generate(prompt, max_new_tokens=6, do_sample=False) for m in (compiled, eager))
    assert torch.equal(found, wanted)
    assert compiled.cost().kv_bytes_per_token == 2 * 2 * 16 * 4 * 2  # k and v, heads, width, bytes, layers


def test_layers_may_differ_and_the_configuration_then_stays() -> None:
    program = lifted("llama-mha")
    after, report = merged(program, GQA((2, 1)))
    assert kv_heads(after) == [2, 1]
    assert after.facts.config is not None
    assert after.facts.config["num_key_value_heads"] == 4
    assert any("layers differ" in note for note in report.notes)


def test_the_report_says_what_was_predicted_and_measured() -> None:
    _, report = merged(lifted("llama-mha"), GQA(2))
    told = next(note for note in report.notes if note.startswith("layer 0"))
    assert re.match(r"layer 0: 4 to 2 kv heads \(\d\+\d, \d\+\d\); predicted: keys lose", told)
    assert "measured: the output loses" in told
    assert re.search(r"; fitted together: (the stream misses|no round made)", told)
    assert any("they took 1.02 kB" in note for note in report.notes)
    losses, spectra = report.charts
    assert losses.ticks == ["0", "1"]
    assert list(losses.series) == ["loss of keys", "loss of values", "loss of the output"]
    assert f"{losses.series['loss of the output'][0]:.2%}" in told
    assert [sum(values) for values in spectra.series.values()] == pytest.approx([1.0, 1.0])
    assert all(values == sorted(values, reverse=True) for values in spectra.series.values())
    assert spectra.marks == {"layer 0": 2, "layer 1": 2}


def test_an_interrupted_walk_goes_on_with_the_same_result(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    program = lifted("llama-mha")
    whole, _ = merged(program, GQA(2))

    class Stopped(Exception):
        pass

    asked: list[int] = []

    def fails(what: str, done: int, total: int) -> None:
        asked.append(done)
        if done == 15:
            raise Stopped

    with pytest.raises((Stopped, errors.PassFailed)):
        run_pipeline(program, [GQA(2)], Context(calibration=TOKENS, progress=fails))
    assert list(empty_cache.rglob("*.safetensors"))
    again, _ = merged(program, GQA(2))
    for name in whole.weights:
        assert torch.equal(again.weights[name], whole.weights[name]), name


# -- under a budget ----------------------------------------------------------------------------------------------------


def with_a_layer_that_merges_exactly() -> Program:
    """Two layers of four kv heads, of which those of the first are one head in different bases."""
    model = programs.model.__wrapped__("llama", num_attention_heads=4, num_key_value_heads=4, initializer_range=0.3)
    one_basis(SimpleNamespace(config=model.config, model=SimpleNamespace(layers=model.model.layers[:1])), 4, 0, 8)
    return lift(model)


def test_the_budget_goes_to_the_layer_that_needs_it(tmp_path: Path) -> None:
    program = with_a_layer_that_merges_exactly()
    after, report = merged(program, GQA("auto", kv_bytes=0.625))
    assert kv_heads(after) == [1, 4]
    assert report.error is not None
    assert report.error < 1e-4
    assert "the budget leaves it all its kv heads" in report.skipped[0].reason
    assert any("62.5% of the bytes: 1, 4" in note for note in report.notes)
    compiled = CompiledModel(after, "eager")
    with pytest.raises(errors.ExportUnsupported, match=r"k_proj\.weight"):
        compiled.export(tmp_path / "out")
    compiled.save(tmp_path / "artifact")
    loaded = slim.load(tmp_path / "artifact", target="eager")
    assert torch.equal(loaded(TOKENS[0]).logits, compiled(TOKENS[0]).logits)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bert"])
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_keys_and_values_fit_into_the_share_that_was_asked_for(name: str, share: float) -> None:
    program = lifted(name)
    after, _ = merged(program, GQA("auto", kv_bytes=share))
    assert sum(kv_heads(after)) <= share * sum(kv_heads(program))
    assert sum(kv_heads(after)) > share / 2 * sum(kv_heads(program))  # and not far below


def test_a_budget_that_nothing_fits_or_nothing_uses_is_refused() -> None:
    program = pair("llama-mha")[1].program
    with pytest.raises(errors.BadPassOption, match=r"takes 25.0% already"):
        merged(program, GQA("auto", kv_bytes=0.2))
    for options in (dict(kv_bytes=None), dict(kv_bytes=1.0), dict(kv_bytes=0.5, method="mean")):
        with pytest.raises(errors.BadPassOption):
            GQA("auto", **options)
    with pytest.raises(errors.BadPassOption, match="kv_heads is 2"):
        GQA(2, kv_bytes=0.5)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3", "a norm follows its queries"),
        ("gemma3", "a norm follows its queries"),
        ("youtu", "stands between its queries and a linear"),
        ("olmo", "clamp"),
    ],
)
def test_heads_without_a_common_basis_are_left_alone_and_an_error_when_strict(name: str, reason: str) -> None:
    program = pair(name)[1].program
    _, report = merged(program, GQA(1), strict=False)
    assert not report.matched
    assert all(reason in skip.reason for skip in report.skipped)
    with pytest.raises(errors.PassMatchedNothing, match=reason):
        merged(program, GQA(1))


def test_means_may_pass_a_norm_of_each_head() -> None:
    after, _ = merged(pair("qwen3")[1].program, GQA(1, method="mean"))
    assert kv_heads(after) == [1, 1]


def test_layers_that_share_keys_or_weights_are_left_alone() -> None:
    program = lifted("albert")
    _, report = merged(program, GQA(1), strict=False)
    assert all("is read by 2 nodes" in skip.reason for skip in report.skipped)


def test_numbers_that_no_layer_can_have_are_refused() -> None:
    for wrong in (0, -1, 1.5, 0.0, ()):
        with pytest.raises(errors.BadPassOption):
            GQA(wrong)
    program = pair("llama-mha")[1].program
    with pytest.raises(errors.BadPassOption, match="names 3 layers, and this model has 2"):
        merged(program, GQA((2, 2, 2)))
    with pytest.raises(errors.PassMatchedNothing, match="4 kv heads do not divide into 3 groups"):
        merged(program, GQA(3))
    with pytest.raises(errors.PassMatchedNothing, match="no more than 4 kv heads"):
        merged(program, GQA(4))


def test_it_needs_calibration_and_weights_that_are_no_integers() -> None:
    program = pair("llama")[1].program
    with pytest.raises(errors.NeedsCalibration):
        run_pipeline(program, [GQA(1)], Context())
    run_pipeline(program, [GQA(1, method="mean")], Context())
    with pytest.raises(errors.PassOrder):
        run_pipeline(program, [Quantize("int8"), GQA(1)], Context(calibration=TOKENS))


def test_rows_of_a_head_are_found_by_data_flow() -> None:
    program = pair("gpt_neox")[1].program
    heads = find_heads(program, program.attention_nodes()[0])
    names = [heads.q.weight, heads.k.weight, heads.v.weight, heads.out_weight]
    assert [name.split("attention.")[1] for name in names] == [
        "query_key_value.weight_0", "query_key_value.weight_1", "query_key_value.weight_2", "dense.weight",
    ]  # fmt: skip
    assert (heads.k.heads, heads.k.width, heads.share) == (4, 16, 1)
    assert heads.k.rope is not None
