"""Prune(units="channels"): which directions stay, what the result is elsewhere, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import slim
from slim import errors
from slim.compiler.statistics.paired import Paired
from slim.passes import GQA, Prune, Quantize
from slim.passes.pruning.directions import Seen, leading, lost
from slim.passes.pruning.sites import block_parameters
from slim.passes.pruning.tied import fit
from tests.lifting import lift_once
from tests.programs import lifted, model
from tests.pruning import error, pruned, tokens


def narrow(ratio: float = 0.25, **options: Any) -> Prune:
    return Prune(ratio, units="channels", **options)


# -- how many, and what is left ----------------------------------------------------------------------------------------


def test_the_share_of_the_blocks_goes_in_every_layer() -> None:
    before = lifted("llama")
    after, report = pruned(before.copy(), narrow())
    assert block_parameters(after) == 0.75 * block_parameters(before)
    assert after.weights.shape("model.layers.1.mlp.down_proj.weight") == (24, 48)
    assert after.weights.shape("lm_head.weight") == (96, 24)
    assert any("32 to 24 channels; measured: linears lose" in note for note in report.notes)


@pytest.mark.parametrize("measure", ["parameters", "bytes"])
@pytest.mark.parametrize("name", ["gemma", "cohere"])  # a tied head stays so, and does not, before a LayerNorm
def test_the_whole_model_holds_no_more_than_is_said(name: str, measure: str) -> None:
    before = lifted(name)
    held = before.parameters if measure == "parameters" else before.nbytes
    options: dict[str, Any] = {measure: held, "criterion": "magnitude"}
    with pytest.raises(errors.BadPassOption, match="already"):
        pruned(before.copy(), Prune(units="channels", **options))
    after, report = pruned(before.copy(), Prune(units="channels", **{**options, measure: int(0.9 * held)}))
    assert 0.8 * held < (after.parameters if measure == "parameters" else after.nbytes) <= 0.9 * held
    assert ("lm_head.weight" in after.facts.tied) is (name == "gemma")
    assert any("lm_head.weight is no longer tied" in note for note in report.notes) is (name == "cohere")


@pytest.mark.parametrize("name", ["phi3", "gemma", "mixtral", "cohere"])
def test_the_result_reloads_in_transformers(name: str, tmp_path: Path) -> None:
    """A LayerNorm stays one (Cohere's), and a table keeps its factor, the root of the width (Gemma's)."""
    from transformers import AutoModelForCausalLM

    made = slim.compile(model(name), [narrow()], calibration=tokens(), target="eager", verify=False)
    config = made.program.facts.config
    assert config is not None
    assert (config["hidden_size"], config["head_dim"]) == (24, 8)
    made.export(tmp_path / "out")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tokens()[0]
    with torch.no_grad():
        assert torch.allclose(there(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-5)


def test_a_tied_head_is_narrowed_once_and_its_norm_keeps_a_gain() -> None:
    before = lifted("gemma")
    after, report = pruned(before.copy(), narrow())
    names = ("model.embed_tokens.weight", "model.norm.weight")
    assert [after.weights.shape(name) for name in names] == [(96, 24), (24,)]
    assert set(after.weights) == set(before.weights) - set(after.facts.retired)
    assert after.facts.config is not None
    assert after.facts.config["tie_word_embeddings"] is True
    assert before.parameters - after.parameters > 8 * 96 + 0.25 * block_parameters(before)
    assert not any("square" in name for name in report.matched)


def test_a_second_pass_narrows_a_tied_model_again() -> None:
    after, _ = pruned(pruned(lifted("gemma"), narrow(criterion="magnitude"))[0], narrow(0.3, criterion="magnitude"))
    assert after.weights.shape("model.norm.weight") == (16,)
    assert "lm_head.weight" in after.facts.tied


def test_a_model_whose_heads_share_its_width_is_saved_by_slim_alone(tmp_path: Path) -> None:
    with pytest.raises(errors.BadPassOption, match="reload=False leaves it to slim"):
        pruned(lifted("gpt2"), narrow(criterion="magnitude"))
    made = slim.compile(model("gpt2"), [narrow(reload=False)], calibration=tokens(), target="eager", verify=False)
    made.save(tmp_path / "saved")
    ids = tokens()[0]
    with torch.no_grad():
        assert torch.equal(
            slim.load(tmp_path / "saved", target="eager")(input_ids=ids).logits, made(input_ids=ids).logits
        )
    with pytest.raises(errors.ExportUnsupported):
        made.export(tmp_path / "out")


def test_numbers_of_channels_are_those_that_heads_divide_unless_slim_alone_is_to_load_it() -> None:
    assert pruned(lifted("llama"), narrow(0.2, criterion="magnitude", multiple=1))[0].facts.config["hidden_size"] == 24  # type: ignore[index]
    after, _ = pruned(lifted("llama"), narrow(0.2, criterion="magnitude", multiple=1, reload=False))
    assert after.weights.shape("lm_head.weight") == (96, 25)


def test_other_passes_follow() -> None:
    passes = [narrow(0.1), Prune(0.1, rounds=0), GQA(1), Quantize("int8")]
    made = slim.compile(model("llama"), passes, calibration=tokens(), target="eager", verify=False)
    assert len(made.report.passes) == 4


# -- which -------------------------------------------------------------------------------------------------------------


def low_rank(name: str = "llama", **options: Any) -> Any:
    """A model whose stream only ever moves in 20 of its 32 directions, none of which is a channel."""
    given = copy.deepcopy(model(name, **options))
    turned = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(5))).Q[:, :20]
    inside = turned @ turned.T
    with torch.no_grad():
        given.model.embed_tokens.weight.copy_(given.model.embed_tokens.weight @ inside)
        for layer in given.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(inside @ linear.weight)
    return given


def test_directions_that_are_never_written_go_and_nothing_is_lost() -> None:
    before = lift_once(low_rank())
    assert error(before, pruned(before.copy(), narrow(0.3, refit=False))[0]) < 1e-3
    assert error(before, pruned(before.copy(), narrow(0.3, criterion="magnitude"))[0]) > 0.3


@pytest.mark.parametrize("name", ["gemma", "llama"])  # gains stored less one, and as they are
@pytest.mark.parametrize("refit", [False, True])
def test_a_tied_head_loses_nothing_of_them_either(name: str, refit: bool) -> None:
    before = lift_once(low_rank(name, tie_word_embeddings=True))
    assert "lm_head.weight" in before.facts.tied
    after, _ = pruned(before.copy(), narrow(0.3, refit=refit))
    assert "lm_head.weight" in after.facts.tied
    assert error(before, after) < (5e-2 if refit else 1e-3)  # the fit is damped


def test_directions_cost_less_than_channels_as_they_are() -> None:
    before = lifted("llama")
    fitted, bare, magnitude, chance = (
        error(before, pruned(before.copy(), narrow(0.25, **options))[0])
        for options in ({}, {"refit": False}, {"criterion": "magnitude"}, {"criterion": "random"})
    )
    assert max(fitted, bare) < min(magnitude, chance)


def seen(count: int = 3, width: int = 12) -> list[Seen]:
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randn(200, width, generator=generator) @ torch.randn(width, width, generator=generator)
        for _ in range(count)
    ]
    return [Seen.of(x.T @ x / 200, [torch.randn(5, width, generator=generator)]) for x in rows]


def test_the_gradient_of_what_is_lost_is_right() -> None:
    every, span = seen(), torch.randn(12, 7, dtype=torch.float64)
    _, gradient = lost(span, every)
    step = torch.randn(12, 7, dtype=torch.float64)
    change = (lost(span + 1e-6 * step, every)[0] - lost(span - 1e-6 * step, every)[0]) / 2e-6
    assert float(change) == pytest.approx(float((gradient * step).sum()), rel=1e-5)


def test_directions_are_better_than_those_of_the_most_energy_and_orthonormal() -> None:
    every = seen()
    mean = torch.stack([one.moments / one.moments.trace() for one in every]).mean(0)
    energy = torch.linalg.eigh(mean).eigenvectors.flip(1)[:, :7]
    basis = leading(every, 7)
    assert torch.allclose(basis.T @ basis, torch.eye(12).double(), atol=1e-9)
    assert float(lost(basis[:, :7], every)[0]) < 0.9 * float(lost(energy, every)[0])


# -- a tied head -------------------------------------------------------------------------------------------------------


def test_the_matrix_before_a_tied_head_is_the_symmetric_one_that_fits_best() -> None:
    generator = torch.Generator().manual_seed(0)
    gain, table = torch.rand(8, generator=generator).diag(), torch.randn(40, 8, generator=generator)
    dense = torch.randn(500, 8, generator=generator)
    rows = dense + 0.3 * torch.randn(500, 8, generator=generator)
    moments = [(a.T @ b).double() / 500 for a, b in ((rows, rows), (dense, rows), (dense, dense))]
    paired = Paired(*moments, rows.double().mean(0), dense.double().mean(0))
    found, missing = fit(gain, table, paired, 5)

    def missed(square: torch.Tensor) -> float:
        wanted = dense @ gain @ table.T
        return float((rows[:, :5] @ square.float().T @ table[:, :5].T - wanted).square().sum() / wanted.square().sum())

    assert torch.allclose(found, found.T)
    assert missing == pytest.approx(missed(found), rel=1e-3)
    step = torch.randn(5, 5, generator=generator).double() * 0.05
    nearby = [missed(found + sign * (step + step.T)) for sign in (1, -1)]
    assert missing < min(nearby) < 2 * missing


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"criterion": "wanda"}, "channels are chosen by obs, magnitude, random"),
        ({"bias": True}, "keep the biases they have"),
        ({"protect": ("lm_head.weight",)}, "all lose the same channels"),
        ({"rounds": 2}, "they are for neurons"),
        ({"scope": "global", "reload": False}, "as many channels as the others"),
    ],
)
def test_options_that_channels_have_no_use_for_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(errors.BadPassOption, match=reason):
        narrow(**options)


@pytest.mark.parametrize("measure", ["flops", "latency"])
def test_measures_that_say_nothing_of_channels_are_refused(measure: str) -> None:
    options: dict[str, Any] = {measure: 1000}
    with pytest.raises(errors.BadPassOption, match="said by ratio, parameters or bytes"):
        Prune(units="channels", **options)


def test_a_stream_that_norms_write_to_is_refused_with_the_norm() -> None:
    with pytest.raises(errors.BadPassOption, match=r"cannot be rotated: model\.layers\.0\.post_feedforward_layernorm"):
        pruned(lifted("gemma2"), narrow())


def test_it_does_not_follow_smoothing_which_folded_norms_would_undo() -> None:
    passes = 'smooth_quant, prune(0.2, "magnitude", units="channels")'
    with pytest.raises(errors.PassOrder, match="norm gains that hold no smoothing"):
        slim.compile(model("llama"), passes, calibration=tokens(), target="eager")


def test_two_channels_are_left_at_least() -> None:
    with pytest.raises(errors.BadPassOption, match="two at least must stay"):
        pruned(lifted("llama"), narrow(0.99, criterion="magnitude"))
