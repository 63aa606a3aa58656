"""LowRank loses nothing where there is nothing to lose, holds what it says, and the Program follows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import slim
from slim import errors
from slim.compiler.lift import lift
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.program import Program
from slim.compiler.report import Report
from slim.compiler.statistics import checkpoint as checkpoints
from slim.compiler.statistics import gradients
from slim.compiler.statistics.gradients import output_moments
from slim.compiler.uses import LINEAR
from slim.passes import GQA, LowRank, Quantize
from slim.passes.factoring.directions import Importance, Product, losses
from slim.passes.factoring.forms import LARGEST, Pivoted, numbers, pivot_rows
from slim.runtime.compiled import CompiledModel
from tests import compiled, programs

TOKENS = [torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(i)) for i in range(3)]
ROWS = [torch.randn(64, 48, generator=torch.Generator().manual_seed(i)) for i in range(3)]
TINY = ["llama", "gpt2", "gemma", "qwen2", "qwen3", "mixtral"]
SLICES = torch.ops.aten.slice.Tensor


def factored(program: Program, pass_: LowRank, calibration: Any = TOKENS) -> tuple[Program, Report]:
    after, report = run_pipeline(program, [pass_], Context(calibration=calibration))
    return after, report.passes[0]


def lifted(name: str) -> Program:
    """A tiny model of an architecture, with one layer where the session has one already."""
    if name in TINY:
        return programs.lifted(name, num_hidden_layers=1) if name == "llama" else programs.lifted(name)
    return compiled.lifted(name)


# -- the formulas ------------------------------------------------------------------------------------------------------

sides = st.integers(2, 24)


@given(sides, sides, st.integers(0, 1000), st.floats(0, 6))
def test_all_rows_come_back_from_some_of_them_with_small_coefficients(
    m: int, r: int, seed: int, decades: float
) -> None:
    r = min(m, r)
    generator = torch.Generator().manual_seed(seed)
    outer = torch.randn(m, r, generator=generator, dtype=torch.float64)
    outer = outer * torch.logspace(0, -decades, m, dtype=torch.float64)[:, None]
    chosen, others, rest = pivot_rows(outer)
    assert sorted([*chosen.tolist(), *others.tolist()]) == list(range(m))
    torch.testing.assert_close(rest @ outer[chosen], outer[others], rtol=1e-9, atol=1e-12)
    assert not rest.numel() or float(rest.abs().max()) <= LARGEST


@given(sides, sides, st.integers(1, 24), st.integers(0, 1000), st.sampled_from(["one", "full", "diagonal"]))
@settings(deadline=None)
def test_the_product_loses_what_is_predicted_and_no_other_loses_less(
    m: int, n: int, rank: int, seed: int, kind: str
) -> None:
    rank = min(rank, m, n)
    generator = torch.Generator().manual_seed(seed)
    weight, rows, gradients_ = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, n), (n, 2 * n), (m, 2 * m))
    )
    moments, of_results = rows @ rows.T, gradients_ @ gradients_.T
    of_results = of_results.diagonal() if kind == "diagonal" else of_results
    importance = Importance(() if kind == "one" else (of_results,))

    def loss(other: Tensor) -> float:
        return float((importance.weighed(weight - other) @ rows).square().sum())

    made = Product.of(weight, moments, importance, rank).whole
    lost = losses(weight, moments, importance)
    assert torch.linalg.matrix_rank(made) <= rank
    assert loss(made) == pytest.approx(float(lost[rank]), rel=1e-6, abs=1e-8 * float(lost[0]))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert loss(made) <= loss((u[:, :rank] * s[:rank]) @ v[:rank]) * (1 + 1e-9) + 1e-8 * float(lost[0])


@given(sides, sides, st.integers(1, 24), st.booleans(), st.integers(0, 1000))
@settings(deadline=None)
def test_rows_and_coefficients_are_the_same_matrix_in_the_numbers_that_are_counted(
    m: int, n: int, rank: int, with_bias: bool, seed: int
) -> None:
    rank = min(rank, m, n)
    generator = torch.Generator().manual_seed(seed)
    outer, inner, bias, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, rank), (rank, n), (m,), (n,))
    )
    form = Pivoted.of(Product(outer, inner), bias if with_bias else None)
    picked = form.pivots @ x + (form.pivots_bias if form.pivots_bias is not None else 0)
    rest = form.rest @ picked + (form.rest_bias if form.rest_bias is not None else 0)
    whole = outer @ (inner @ x) + (bias if with_bias else 0)
    torch.testing.assert_close(torch.cat([picked, rest])[form.order], whole, rtol=1e-7, atol=1e-7)
    held = form.pivots.numel() + form.rest.numel() + form.order.nbytes // 8
    assert held == numbers("pivot", rank, m, n, 8)


def test_moments_of_gradients_are_those_of_the_result_by_what_a_linear_puts_out(monkeypatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 8), nn.Linear(8, 40))
    program = lift(model, ROWS[0])
    first, last = program.nodes(LINEAR)
    found = output_moments(program, [first, last], Context(calibration=ROWS * 20), asked_by="test")
    weight = model[1].weight.detach()
    scale = found[last].diagonal().mean()
    torch.testing.assert_close(found[last] / scale, torch.eye(40), atol=0.1, rtol=0)
    torch.testing.assert_close(found[first] / scale, weight.T @ weight, atol=0.15, rtol=0.1)
    monkeypatch.setattr(gradients, "WIDEST", 20)
    again = output_moments(program, [first, last], Context(calibration=ROWS * 20), asked_by="test")
    torch.testing.assert_close(again[last], found[last].diagonal())


# -- exact -------------------------------------------------------------------------------------------------------------


class Reads(nn.Module):
    """Some linears that read the same rows, whose weights have a low rank, and one that reads all they make."""

    def __init__(self, rank: int, bias: bool, shared: bool = False) -> None:
        super().__init__()
        self.readers = nn.ModuleList(nn.Linear(48, 64, bias=bias) for _ in range(3))
        self.last = nn.Linear(192, 40, bias=bias)
        with torch.no_grad():
            inner = torch.randn(rank, 48) / 7
            for linear in (*self.readers, self.last):
                m, n = linear.weight.shape
                own = inner if shared and n == 48 else torch.randn(rank, n) / n**0.5
                linear.weight.copy_(torch.randn(m, rank) @ own)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([torch.tanh(linear(x)) for linear in self.readers], -1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"storage": "factors"}, {"importance": "none"}], ids=str)
def test_weights_of_a_low_rank_lose_nothing(bias: bool, options: Any) -> None:
    program = lift(Reads(8, bias), ROWS[0])
    after, report = factored(program, LowRank(0.5, **options), ROWS)
    assert len(report.matched) == 4
    assert report.error is not None
    assert report.error < 1e-4
    assert after.nbytes < 0.6 * program.nbytes


@pytest.mark.parametrize("method", ["svd_llm", "asvd", "svd"])
def test_so_do_the_baselines(method: Any) -> None:
    _, report = factored(lift(Reads(8, True), ROWS[0]), LowRank(0.5, method), ROWS)
    assert report.error is not None
    assert report.error < 1e-4


@pytest.mark.parametrize("storage", ["pivot", "factors"])
def test_linears_with_the_same_inner_directions_become_one_matrix(storage: Any) -> None:
    program = lift(Reads(8, True, shared=True), ROWS[0])
    after, report = factored(program, LowRank(0.25, storage=storage), ROWS)
    assert len(list(after.nodes(SLICES))) == 3
    assert any("readers.0.weight, readers.1.weight, readers.2.weight: rank 8 of 48" in note for note in report.notes)
    assert report.error is not None
    assert report.error < 1e-4


def test_a_bias_takes_up_the_mean_of_what_enters() -> None:
    torch.manual_seed(0)
    model = nn.Linear(48, 64)
    few = torch.randn(8, 48)
    rows = [torch.randn(64, 8) @ few + 5 * torch.ones(48) for _ in range(3)]
    after, _ = factored(lift(model, rows[0]), LowRank(0.35, multiple=8), rows)
    with torch.no_grad():
        torch.testing.assert_close(after.run(rows[0])[0], model(rows[0]), atol=1e-3, rtol=1e-3)


def test_a_linear_makes_up_for_what_was_lost_before_it() -> None:
    torch.manual_seed(0)
    rows = [torch.randn(256, 48) for _ in range(8)]
    model = nn.Sequential(nn.Linear(48, 64, bias=False), nn.Linear(64, 64, bias=False))
    program = lift(model, rows[0])
    fitted, _ = factored(program, LowRank(0.6, exclude=("0.weight",)), rows)
    assert "1.weight_pivots" in fitted.weights
    whole = model(rows[0]).detach()

    def loss(pass_: LowRank) -> float:
        return float((factored(program, pass_, rows)[0].run(rows[0])[0] - whole).square().sum())

    assert loss(LowRank(0.6, importance="none")) < loss(LowRank(0.6, "svd_llm", storage="pivot", multiple=4))


# -- every architecture ------------------------------------------------------------------------------------------------

# norms with 1 + w; biases of q, k, v; norms of q and k; fused and transposed weights; experts; an encoder
NAMES = [*TINY, "phi3", "gpt_neox", "opt", "bert"]


@pytest.fixture(scope="module", params=NAMES)
def program(request: pytest.FixtureRequest) -> Program:
    return lifted(request.param)


def test_every_architecture_holds_the_share_it_was_given(program: Program) -> None:
    after, report = factored(program, LowRank(0.8))
    assert report.matched
    assert report.error is not None
    assert report.error > 0.0
    kept = [site for site, reason in report.skipped if "worth more" in reason]
    whole = sum(program.weights.nbytes(name) for name in (*report.matched, *kept))
    biases = sum(after.weights.nbytes(name) for name in after.weights if name.endswith("_bias"))
    gone = program.nbytes - after.nbytes
    assert 0.75 * whole < whole - gone <= 0.8 * whole + biases
    assert all(name not in after.weights for name in report.matched)


# -- with other passes, and saved --------------------------------------------------------------------------------------


def test_heads_ranks_and_bits_compose_and_come_back_from_disk(tmp_path: Path) -> None:
    passes = [GQA(1), LowRank(0.8, multiple=8), Quantize("int4", group_size=8)]
    compiled = slim.compile(programs.model("llama", num_hidden_layers=1), passes, calibration=TOKENS, target="eager")
    low_rank, quantised = compiled.report.passes[1:]
    assert {f"{name}_pivots" for name in low_rank.matched} & set(quantised.matched)
    prompt = torch.randint(3, 90, (1, 7))
    expected = compiled.generate(prompt, max_new_tokens=4, do_sample=False)
    compiled.save(tmp_path / "out")
    again = slim.load(tmp_path / "out", target="eager")
    assert torch.equal(again.generate(prompt, max_new_tokens=4, do_sample=False), expected)
    stored = 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            stored += sum(weights.get_tensor(key).nbytes for key in weights.keys())  # noqa: SIM118
    assert quantised.after is not None
    assert stored == quantised.after.nbytes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_plain_transformers_has_no_place_for_it(name: str, tmp_path: Path) -> None:
    after, _ = factored(lifted(name), LowRank(0.7, "svd"))
    compiled = CompiledModel(after, "eager")
    with pytest.raises(
        errors.ExportUnsupported, match=r"no longer part of the program: low_rank\(0\.7, .* put others in its place"
    ):
        compiled.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_walk_goes_on_with_the_same_result(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    program = lifted("llama")
    whole, _ = factored(program, LowRank(0.7))

    class Stopped(Exception):
        pass

    def fails(what: str, done: int, total: int) -> None:
        if "calibrating" in what and total > 12 and done == total // 2:
            raise Stopped

    with pytest.raises((Stopped, errors.PassFailed)):
        run_pipeline(program, [LowRank(0.7)], Context(calibration=TOKENS, progress=fails))
    assert list(empty_cache.rglob("*.safetensors"))
    again, _ = factored(program, LowRank(0.7))
    for name in whole.weights:
        assert torch.equal(again.weights[name], whole.weights[name]), name


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, 1.0, -0.5, 80])
def test_a_share_lies_between_none_and_all(keep: float) -> None:
    with pytest.raises(errors.BadPassOption, match="between 0 and 1"):
        LowRank(keep)


def test_options_that_cannot_both_be_meant_are_refused() -> None:
    with pytest.raises(errors.ContradictoryOptions, match="published methods weigh no results"):
        LowRank(0.8, "svd", importance="fisher")
    with pytest.raises(errors.BadPassOption, match="multiple of 0"):
        LowRank(0.8, multiple=0)
    with pytest.raises(errors.BadPassOption, match=r"between 0 and 1, and 1\.5"):
        LowRank(0.8, least_saving=1.5)


@pytest.mark.parametrize("method", ["whitened", "svd_llm", "asvd"])
def test_methods_that_look_at_activations_need_some(method: Any) -> None:
    program = lift(Reads(8, True), ROWS[0])
    with pytest.raises(errors.NeedsCalibration):
        run_pipeline(program, [LowRank(0.5, method)], Context())
    after, _ = run_pipeline(program, [LowRank(0.5, "svd")], Context())
    assert after.nbytes < program.nbytes


def test_rounded_weights_are_refused() -> None:
    with pytest.raises(errors.PassOrder, match="float weights"):
        run_pipeline(lift(Reads(8, True), ROWS[0]), [Quantize(), LowRank(0.5)], Context(calibration=ROWS))


def test_a_model_with_nothing_to_factor_is_an_error() -> None:
    program = lift(nn.Linear(6, 4), torch.randn(2, 6))
    with pytest.raises(errors.PassMatchedNothing, match="no rank to choose from"):
        factored(program, LowRank(0.5), [torch.randn(8, 6)])


def test_linears_that_save_too_little_stay_whole() -> None:
    program = lift(Reads(8, True), ROWS[0])
    with pytest.raises(errors.PassMatchedNothing, match="no rank saves 90% of its numbers"):
        factored(program, LowRank(0.5, least_saving=0.9), ROWS)


def test_even_the_smallest_ranks_may_be_too_many() -> None:
    program = lift(Reads(8, True), ROWS[0])
    with pytest.raises(errors.BadPassOption, match=r"smallest ranks hold \d+\.\d% of the numbers"):
        factored(program, LowRank(0.05), ROWS)
    with pytest.raises(errors.PassMatchedNothing, match="smallest rank holds more"):
        factored(program, LowRank(0.05, importance="none", multiple=8), ROWS)


def test_what_is_left_alone_is_said(program: Program) -> None:
    _, report = factored(program, LowRank(0.7, "svd", head=False))
    reasons = {reason for _, reason in report.skipped}
    heads = [site for site, reason in report.skipped if "head" in reason]
    assert bool(heads) == (program.facts.kind == "causal_lm")
    assert ("it routes tokens to experts" in reasons) == ("its experts are chosen a token" in str(reasons))
    assert not set(report.matched) & {site for site, _ in report.skipped}


def test_the_head_is_factored_on_request() -> None:
    _, report = factored(lifted("llama"), LowRank(0.8, head=True))
    assert "lm_head.weight" in [*report.matched, *(site for site, reason in report.skipped if "worth" in reason)]


def test_the_report_draws_losses_and_spectra_with_the_rank_that_was_chosen() -> None:
    _, report = factored(lifted("llama"), LowRank(0.7))
    bars, lines = report.charts
    assert all(len(values) == len(bars.ticks) for values in bars.series.values())
    for name, values in lines.series.items():
        assert values[0] == pytest.approx(1.0)
        assert values == sorted(values, reverse=True)
        assert 0 < lines.marks[name] < len(values)
    assert "predicted" in str(bars)


@pytest.mark.parametrize("storage", ["pivot", "factors"])
def test_what_was_factored_can_be_factored_again_biases_and_all(storage: Any) -> None:
    once, _ = factored(lifted("gpt2"), LowRank(0.8))
    twice, report = factored(once, LowRank(0.8, storage=storage))
    assert report.matched
    assert twice.nbytes < once.nbytes


def test_fewer_tokens_than_columns_are_noted() -> None:
    _, report = factored(lifted("llama"), LowRank(0.8), calibration=[torch.tensor([[5, 6, 7]])])
    assert any("3 calibration tokens are fewer than" in note for note in report.notes)
