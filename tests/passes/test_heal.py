"""Heal brings a compressed model back towards the original, changes values alone, and says what it did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slim
from slim import errors
from slim.compiler.objective import divergence
from slim.compiler.passes_base import Context, Pass
from slim.compiler.pipeline import run_pipeline
from slim.compiler.program import Program
from slim.compiler.report import Report
from slim.passes import GQA, Heal, Quantize, QuantizeKV
from slim.passes.healing import checkpoint as checkpoints
from slim.passes.healing import trained as trained_weights
from slim.passes.healing.steps import Steps, orthogonal
from slim.passes.healing.student import Student
from slim.passes.healing.trained import Product, find_trained
from tests.compiled import lifted

TOKENS = [torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(i)) for i in range(24)]
QUICK = dict(steps=50, tokens=192, learning_rate=0.03)


def healed(program: Program, passes: list[Pass], **context: Any) -> tuple[Program, Report]:
    after, report = run_pipeline(program, passes, Context(calibration=TOKENS, verify=False, **context))
    return after, report.passes[-1]


def distance(program: Program, original: Program, seed: int = 99) -> float:
    """KL of the original and the model on tokens that nobody trained on."""
    tokens = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(seed))
    inputs = {
        "input_ids": tokens, "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(24).expand(8, 24),
    }  # fmt: skip
    ours, theirs = (p.run(*(inputs[i.name] for i in p.inputs))[0].flatten(0, 1) for p in (program, original))
    return float(divergence(ours, theirs, "forward", 1.0))


@pytest.fixture(scope="module")
def llama() -> Program:
    return lifted("llama")


@pytest.fixture(scope="module")
def damaged(llama: Program) -> Program:
    return run_pipeline(llama, [GQA(1, method="mean")], Context(verify=False))[0]


# -- what it brings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"loss": "reverse"}, {"temperature": 2.0}, {"mix": 0.1}], ids=["kl", "reverse", "warm", "mixed"]
)
def test_healing_takes_a_third_of_the_distance_on_text_nobody_trained_on(llama, damaged, options) -> None:
    after, report = healed(llama, [GQA(1, method="mean"), Heal(**QUICK, **options)])
    assert distance(after, llama) < 0.67 * distance(damaged, llama)
    assert "the distance from the original fell" in report.notes[0]


def test_shapes_types_and_nodes_stay(llama, damaged) -> None:
    after, report = healed(llama, [GQA(1, method="mean"), Heal(**QUICK)])
    assert str(after) == str(damaged)
    assert all(after.weights.dtype(name) == damaged.weights.dtype(name) for name in damaged.weights)
    assert {name for name in damaged.weights if not torch.equal(after.weights[name], damaged.weights[name])} == set(
        report.matched
    )


def test_products_are_merged_into_what_ran_in_training(damaged) -> None:
    trained, _ = find_trained(damaged, rank=4, seed=0)
    with torch.no_grad():
        for each in trained:
            for parameter in each.parameters:
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    tokens = TOKENS[0]
    inputs = [tokens if i.name == "input_ids" else torch.ones_like(tokens) for i in damaged.inputs]
    merged = damaged.copy()
    for each in trained:
        merged.weights[each.name] = each.merged()
    with torch.no_grad():
        running = Student(damaged, trained).outputs(inputs)[0]
    torch.testing.assert_close(running, merged.run(*inputs)[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(running, damaged.run(*inputs)[0], atol=1e-2)


def test_a_step_is_the_same_share_of_weights_large_and_small(damaged) -> None:
    larger = damaged.copy()
    name = next(name for name in larger.weights if name.endswith("o_proj.weight"))
    larger.weights[name] = damaged.weights[name] * 100
    changes = []
    for program in (damaged, larger):
        each = next(each for each in find_trained(program, None, seed=0)[0] if each.name == name)
        with torch.no_grad():
            each.parameters[0].fill_(0.01)
        changes.append(each.merged() - each.weight)
    torch.testing.assert_close(changes[1], changes[0] * 100, rtol=1e-3, atol=1e-5)
    assert float(changes[0].mean()) == pytest.approx(
        0.01 * float(damaged.weights[name].square().mean().sqrt()), rel=1e-2
    )


def test_weights_are_trained_whole_and_as_products_where_there_are_too_many(
    damaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(isinstance(each, Product) for each in find_trained(damaged, None, seed=0)[0])
    monkeypatch.setattr(trained_weights, "_WHOLE", 1000)
    products = [each for each in find_trained(damaged, None, seed=0)[0] if isinstance(each, Product)]
    assert products
    assert {len(each.parameters[0]) for each in products} == {16}


def test_the_rate_follows_the_distance_whatever_the_loss_is(llama) -> None:
    def rate(*passes: Pass, **options: Any) -> float:
        _, report = healed(llama, [*passes, Heal(2, tokens=96, **options)], strict=False)
        return float(report.notes[0].rpartition("at a rate of ")[2])

    far = [GQA(1, method="mean")]
    assert rate(*far) == rate(*far, mix=0.5) == rate(*far, temperature=3.0) == 0.01
    near = rate(Quantize("int8"))
    assert near == rate(Quantize("int8"), mix=0.5) == rate(Quantize("int8"), temperature=3.0)
    assert 0.0 < near < 1e-4
    assert rate(*far, learning_rate=0.02) == 0.02


def test_tables_and_heads_tied_to_them_are_trained_where_weights_are_whole() -> None:
    after, report = healed(lifted("gemma"), [GQA(1, method="mean"), Heal(**QUICK)])
    assert "model.embed_tokens.weight" in report.matched
    assert not torch.equal(
        after.weights["model.embed_tokens.weight"], lifted("gemma").weights["model.embed_tokens.weight"]
    )


def test_an_orthogonal_step_moves_all_directions_alike() -> None:
    torch.manual_seed(0)
    for shape in ((24, 40), (40, 24), (1, 8)):
        matrix = torch.randn(shape) * torch.logspace(-1, 1, shape[1])
        values = torch.linalg.svdvals(orthogonal(matrix))
        assert 0.5 < float(values.min()) <= float(values.max()) < 1.5
        weight = torch.zeros(shape, requires_grad=True)
        weight.grad = matrix.clone()
        Steps([weight], [], learning_rate=0.01).step()
        assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.01, rel=0.35)


# -- behind every lossy pass -------------------------------------------------------------------------------------------


def test_of_quantised_weights_the_scales_learn_and_the_numbers_stay(llama) -> None:
    rounded = Quantize("int3", method="rtn", group_size=16)
    before, _ = run_pipeline(llama, [rounded], Context(verify=False))
    after, report = healed(llama, [rounded, Heal(**QUICK)])
    assert distance(after, llama) < 0.85 * distance(before, llama)
    numbers = [name for name in before.weights if not before.weights.dtype(name).is_floating_point]
    assert numbers
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in numbers)
    assert any(name.endswith("_scale") for name in report.matched)


def test_gradients_pass_rounded_rows_keys_and_values(llama) -> None:
    passes = [Quantize("int8", activations="int8", head=False), QuantizeKV("int8")]
    rounded, _ = run_pipeline(llama, passes, Context(verify=False, calibration=TOKENS))
    trained, _ = find_trained(rounded, rank=4, seed=0)
    student = Student(rounded, trained)
    tokens = TOKENS[0]
    inputs = [tokens if i.name == "input_ids" else torch.ones_like(tokens) for i in rounded.inputs]
    student.outputs(inputs)[0].square().mean().backward()
    for each in trained:  # an output that all rounded rows lie behind reaches the scales of the first layer
        if "layers.0." in each.name:
            assert any(parameter.grad is not None and parameter.grad.any() for parameter in each.parameters), each.name


def test_what_is_not_trained_is_named_with_its_reason() -> None:
    program = lifted("mixtral")
    _, report = healed(
        program, [GQA(1, method="mean"), Heal(**QUICK | {"steps": 2, "patience": 1, "rank": 4})], strict=False
    )
    reasons = {skip.reason for skip in report.skipped}
    assert {"experts are not trained", "a table of embeddings is not trained"} <= reasons


def test_an_encoder_learns_the_values_of_its_outputs() -> None:
    program = lifted("bert")
    before, _ = run_pipeline(program, [rounded := Quantize("int3", method="rtn")], Context(verify=False))
    after, _ = healed(program, [rounded, Heal(**QUICK)])
    inputs = [torch.ones_like(TOKENS[0]) if i.name == "attention_mask" else TOKENS[0] * (i.name == "input_ids")
              for i in program.inputs]  # fmt: skip
    exact = program.run(*inputs)[0]
    lost = [float((p.run(*inputs)[0] - exact).square().mean()) for p in (before, after)]
    assert lost[1] < 0.8 * lost[0]


def test_a_plain_module_learns_from_tensors() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32)).eval()
    rows = [torch.randn(32, 32) for _ in range(8)]
    plain = slim.compile(model, 'quantize("int3", method="rtn")', calibration=rows, example_inputs=rows[0],
                         target="eager")  # fmt: skip
    healthy = slim.compile(model, 'quantize("int3", method="rtn"), heal(60, tokens=32, learning_rate=0.003)',
                           calibration=rows, example_inputs=rows[0], target="eager")  # fmt: skip
    fresh = torch.randn(64, 32)
    assert error(healthy, model, fresh) < error(plain, model, fresh)


def error(compiled: Any, model: Any, rows: Tensor) -> float:
    with torch.no_grad():
        return float((compiled(rows) - model(rows)).square().mean())


# -- loud --------------------------------------------------------------------------------------------------------------


def test_a_model_that_lost_nothing_is_refused(llama) -> None:
    with pytest.raises(errors.NothingToHeal, match="nothing to learn"):
        healed(llama, [Heal(5)])


def test_without_calibration_it_is_refused(llama) -> None:
    with pytest.raises(errors.NeedsCalibration):
        run_pipeline(llama, [GQA(1, method="mean"), Heal(5)], Context(verify=False))


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"rank": 0}, {"tokens": 0}, {"patience": 0}, {"temperature": 0.0}, {"mix": 1.5},
     {"learning_rate": -1.0}, {"loss": "sideways"}],
)  # fmt: skip
def test_options_that_train_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(errors.BadPassOption):
        Heal(**options)


def test_options_for_language_models_are_refused_for_others() -> None:
    program = lifted("bert")
    for option in ({"mix": 0.5}, {"temperature": 2.0}, {"loss": "reverse"}):
        with pytest.raises(errors.BadPassOption, match="language models"):
            healed(program, [Quantize("int8"), Heal(2, **option)])


def test_training_that_makes_it_worse_changes_nothing_and_is_an_error(llama) -> None:
    with pytest.raises(errors.PassMatchedNothing, match="scored better"):
        healed(llama, [Quantize("int8"), Heal(25, tokens=96, learning_rate=30.0)])


def test_it_ends_early_where_nothing_gets_better(llama) -> None:
    _, report = healed(
        llama, [GQA(1, method="mean"), Heal(400, tokens=96, learning_rate=0.3, patience=1)], strict=False
    )
    assert any("it ended after" in note for note in report.notes)


# -- interrupted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 4])
def test_an_interrupted_run_ends_with_the_same_weights(
    rank: int | None, llama: Program, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    passes = [GQA(1, method="mean"), Heal(60, tokens=96, rank=rank, learning_rate=0.01)]
    whole, _ = healed(llama, passes)

    def interrupt(what: str, done: int, total: int) -> None:
        if "healing" in what and done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        healed(llama, passes, progress=interrupt)
    assert list((empty_cache / "healing").glob("*.safetensors"))
    steps: list[int] = []
    resumed, _ = healed(llama, passes, progress=lambda what, done, total: steps.append(done))
    assert min(step for step in steps if step not in (0, 1, 2)) >= 25
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)
    assert not list((empty_cache / "healing").glob("*"))
