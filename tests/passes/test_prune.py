"""Prune: what goes, what is fitted, what the configuration says, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slim
from slim import errors
from slim.compiler.dependencies import Dependencies
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.program import Program
from slim.compiler.statistics.paired import Paired
from slim.compiler.stream import beside
from slim.passes import GQA, Prune
from slim.passes.pruning.budget import multiple_of, stays_even
from slim.passes.pruning.obs import DAMPING, removal_order
from slim.passes.pruning.rearrange import joint, rearranged
from slim.passes.pruning.refit import refit
from slim.passes.pruning.sites import block_parameters, find_sites
from tests.programs import lifted, model
from tests.pruning import error, pruned, tokens

CRITERIA = ("obs", "wanda", "flap", "taylor", "fisher", "magnitude", "random")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_at_least_the_share_goes_and_hardly_more(criterion: str) -> None:
    before = lifted("llama")
    after, report = pruned(before.copy(), Prune(0.3, criterion))  # type: ignore[arg-type]
    gone = 1 - block_parameters(after) / block_parameters(before)
    assert 0.3 <= gone < 0.34
    assert len(report.matched) >= 2
    assert 1e-3 < error(before, after) < 2.0


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma", "phi3", "gpt2", "gpt_neox", "mixtral"])
def test_it_works_on(name: str) -> None:
    before = lifted(name)
    after, _ = pruned(before.copy(), Prune(0.2))
    gone, held = block_parameters(before) - block_parameters(after), block_parameters(before)
    assert 0.2 * held <= gone < (0.35 if name == "mixtral" else 0.3) * held
    assert error(before, after) < 1.0


def test_an_mlp_of_a_plain_module_is_pruned() -> None:
    from torch import nn

    plain = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    made = slim.compile(
        plain, [Prune(0.5)], calibration=[(torch.randn(16, 8),)], example_inputs=(torch.randn(2, 8),), target="eager"
    )
    assert made.program.parameters < sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("units", ["neurons", "heads"])
def test_units_of_one_kind_alone_go_where_that_is_asked_for(units: str) -> None:
    before = lifted("llama").facts.config
    after, _ = pruned(lifted("llama"), Prune(0.1, units=units))  # type: ignore[arg-type]
    config = after.facts.config
    assert before is not None
    assert config is not None
    assert (config["intermediate_size"] == before["intermediate_size"]) == (units == "heads")
    assert (config["num_key_value_heads"] == before["num_key_value_heads"]) == (units == "neurons")


def test_protected_sites_keep_all_they_have_and_the_layers_that_differ_are_named() -> None:
    after, report = pruned(lifted("llama"), Prune(0.1, units="neurons", protect=("model.layers.0.mlp.*",)))
    assert after.weights.shape("model.layers.0.mlp.up_proj.weight") == (48, 32)
    assert ("model.layers.0.mlp", "'model.layers.0.mlp.*' protects it") in report.skipped
    assert any("model.layers.0.mlp 48, model.layers.1.mlp" in note for note in report.notes)
    assert after.facts.config is not None
    assert after.facts.config["intermediate_size"] == 48


@pytest.mark.parametrize("width", [2, 20, 172, 640, 11008, 14336])
def test_numbers_of_neurons_are_rounded_by_a_small_part_of_the_width(width: int) -> None:
    multiple = multiple_of(width)
    assert multiple & (multiple - 1) == 0
    assert multiple <= max(1, width / 32)
    assert multiple <= 128


def test_the_number_of_neurons_is_what_the_option_says() -> None:
    after, _ = pruned(lifted("llama"), Prune(0.2, units="neurons", multiple=16))
    assert after.weights.shape("model.layers.0.mlp.up_proj.weight")[0] % 16 == 0


# -- the closed forms --------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(0, 1000))
def test_the_predicted_cost_is_that_of_the_fitted_weight(units: int, seed: int) -> None:
    torch.manual_seed(seed)
    width = 1 + seed % 3
    n = units * width
    weight = torch.randn(5, n).double()
    x = torch.randn(200, n).double() @ torch.randn(n, n).double()
    gram = x.T @ x / 200
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(n).double()
    columns = torch.arange(units).repeat_interleave(width)[torch.randperm(n)]
    order = removal_order(weight, gram, columns, units - 1)
    for count in range(1, units):
        kept = (~torch.isin(columns, order.units[:count])).nonzero()[:, 0]
        best = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T).T
        lost = weight.clone()
        lost[:, kept] -= best
        expected = float(((lost @ damped) * lost).sum())
        assert float(order.costs[count - 1]) == pytest.approx(expected, rel=1e-5)


def test_units_that_others_make_up_for_go_first_and_cost_nothing() -> None:
    x = torch.randn(300, 4)
    x = torch.cat([x, x @ torch.randn(4, 3)], 1).double()  # seven features in four dimensions
    order = removal_order(torch.randn(5, 7), x.T @ x / 300, torch.arange(7), 6)
    assert float(order.costs[1]) < 0.05 * float(order.costs[5])


def test_a_bias_takes_up_what_is_lost_on_average() -> None:
    from slim.compiler.statistics.accumulate import Accumulator, Wanted

    x = torch.randn(400, 6) + torch.tensor([5.0, 0, 0, 0, 0, 0])
    sums = Accumulator("x", 6, Wanted(gram=True))
    sums.add(x)
    paired = Paired.of(sums.finish(), centred=True)
    weight, kept = torch.randn(3, 6), torch.arange(1, 6)
    fitted = refit(weight, torch.zeros(3), paired, kept)
    assert fitted.bias is not None
    wanted, found = x @ weight.T, x[:, kept] @ fitted.weight.float().T + fitted.bias.float()
    assert torch.allclose(wanted.mean(0), found.mean(0), atol=1e-3)


def test_nothing_is_lost_where_units_are_there_twice() -> None:
    before = lifted("llama")
    for layer in (0, 1):
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = before.weights[f"model.layers.{layer}.mlp.{name}.weight"].clone()
            rows = weight if name != "down_proj" else weight.T
            rows[24:] = rows[:24]
            before.weights[f"model.layers.{layer}.mlp.{name}.weight"] = weight
    after, _ = pruned(before.copy(), Prune(0.25, units="neurons", multiple=1))
    assert error(before, after) < 0.05
    assert error(before, pruned(before.copy(), Prune(0.25, "random", units="neurons", multiple=1))[0]) > 0.2


@pytest.mark.parametrize(
    ("name", "streams"),
    [("llama", (1, 1)), ("gpt2", (1, 1)), ("bert", (1, 1)), ("gpt_neox", (1, 2)), ("gemma2", (0, 0))],
)
def test_what_the_result_is_added_to_is_known_where_it_is(name: str, streams: tuple[int, int]) -> None:
    """In a parallel block the MLP is told of the attention before it too; behind a norm there is nothing."""
    program = lifted(name)
    sites, _ = find_sites(program, Dependencies(program))
    assert tuple(len(beside(site.linear)) for site in sites[:2]) == streams


# -- what is left of the model elsewhere -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2", "gpt_neox", "mixtral"])
def test_a_uniform_result_loads_in_transformers_and_computes_what_it_did(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = slim.compile(model(name), [Prune(0.25)], calibration=tokens(), target="eager")
    made.export(tmp_path / "out")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    again = slim.compile(there, target="eager")
    ids = tokens()[0]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, made(input_ids=ids).logits)
        assert torch.allclose(there(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-5)


def cut_by_hand(whole: Any, made: Program) -> Any:
    """The Llama ``whole`` with the neurons that ``made`` has kept, taken over one by one."""
    width = made.weights.shape("model.layers.0.mlp.up_proj.weight")[0]
    config = copy.deepcopy(whole.config)
    config.intermediate_size = width
    cut = type(whole)(config).eval()
    state = {name: value for name, value in whole.state_dict().items() if ".mlp." not in name}
    for index, layer in enumerate(whole.model.layers):
        left = made.weights[f"model.layers.{index}.mlp.up_proj.weight"]
        kept = [int((layer.mlp.up_proj.weight == row).all(1).nonzero()) for row in left]
        for name, linear in layer.mlp.named_children():
            if name != "act_fn":
                rows = linear.weight[:, kept] if name == "down_proj" else linear.weight[kept]
                state[f"model.layers.{index}.mlp.{name}.weight"] = rows
    cut.load_state_dict(state)
    return cut


def test_transformers_computes_bit_for_bit_what_the_model_does_with_neurons_cut_out_by_hand(tmp_path: Path) -> None:
    """Its own forward in both: slim's attention rounds in another order."""
    from transformers import AutoModelForCausalLM

    whole = model("llama")
    made = slim.compile(whole, [Prune(0.25, "magnitude", units="neurons")], target="eager")
    made.export(tmp_path / "out")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tokens()[0]
    with torch.no_grad():
        expected = cut_by_hand(whole, made.program)(input_ids=ids).logits
        assert torch.equal(there(input_ids=ids).logits, expected)
        assert torch.allclose(made(input_ids=ids).logits, expected, atol=1e-5)


def test_a_model_that_transformers_cannot_hold_is_saved_and_its_export_refused(tmp_path: Path) -> None:
    passes = [Prune(0.1, units="neurons", protect=("model.layers.0.mlp.*",))]
    made = slim.compile(model("llama"), passes, calibration=tokens(), target="eager")
    made.save(tmp_path / "saved")
    ids = tokens()[0]
    with torch.no_grad():
        assert torch.equal(
            slim.load(tmp_path / "saved", target="eager")(input_ids=ids).logits, made(input_ids=ids).logits
        )
    with pytest.raises(errors.ExportUnsupported, match=r"model\.layers\.1\.mlp"):
        made.export(tmp_path / "out")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 20])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(errors.BadPassOption, match="lies between 0 and 1"):
        Prune(ratio)


@pytest.mark.parametrize(
    ("name", "pass_", "rule"),
    [
        ("llama", Prune(0.95, "magnitude"), "one of each site must stay"),
        ("llama", Prune(0.9, "magnitude", units="neurons"), "hold only"),
        ("llama", Prune(0.4, "magnitude", units="neurons", multiple=40), "with multiple=1 it could go"),
        ("gpt2", Prune(0.1, "magnitude", units="heads"), "with reload=False it could go"),
        ("llama", Prune(0.8, "fisher", scope="global", reload=False), "a quarter of each site stays"),
    ],
)
def test_more_than_there_is_cannot_go_and_the_rule_that_binds_is_named(name: str, pass_: Prune, rule: str) -> None:
    with pytest.raises(errors.BadPassOption, match=rf"the units that can go .*{rule}"):
        pruned(lifted(name), pass_)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rounds": -1}, "a number of rounds, none at least, and -1 is not"),
        ({"rounds": 1, "criterion": "wanda"}, "nothing is fitted without refit=True"),
        ({"rounds": 1, "units": "heads"}, "they are for neurons"),
        ({"multiple": 8, "units": "heads"}, "it is for neurons, experts and channels"),
    ],
)
def test_options_that_nothing_reads_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(errors.BadPassOption, match=reason):
        Prune(0.2, **options)


def test_a_multiple_that_no_smaller_number_of_neurons_has_is_refused() -> None:
    with pytest.raises(errors.BadPassOption, match="has 48 neurons, and no smaller number but 0 is divisible by 64"):
        pruned(lifted("llama"), Prune(0.2, "magnitude", multiple=64))


def test_a_dense_model_says_that_it_has_no_experts() -> None:
    with pytest.raises(errors.PassMatchedNothing, match="it has no experts"):
        slim.compile(model("llama"), [Prune(0.2, "magnitude", units="experts")], target="eager")


# -- fisher ------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_rearranged_units_do_no_more_to_the_loss_together(seed: int, count: int) -> None:
    slopes = torch.randn(400, 8, generator=torch.Generator().manual_seed(seed)) @ torch.randn(
        8, 8, generator=torch.Generator().manual_seed(seed + 1)
    )
    start = slopes.square().sum(0).argsort()[:count]
    after = rearranged(slopes, start)
    assert len(after.unique()) == count
    assert joint(slopes, after) <= joint(slopes, start) * (1 + 1e-9)  # sums in another order


def test_units_that_cancel_each_other_go_together_and_those_that_add_up_do_not() -> None:
    """Alone the last two do most; together nothing."""
    shared, own = torch.randn(600, 1), torch.randn(600, 4)
    slopes = torch.cat([0.9 * shared + 0.1 * own[:, :2], 1.0 * shared, -1.0 * shared], 1)
    start = slopes.square().sum(0).argsort()[:2]
    assert set(start.tolist()) == {0, 1}
    after = rearranged(slopes, start)
    assert float(slopes[:, after].sum(1).square().sum()) < 0.1 * float(slopes[:, start].sum(1).square().sum())


@pytest.mark.parametrize("criterion", ["obs", "wanda", "flap", "taylor", "fisher"])
def test_criteria_that_need_calibration_say_so(criterion: str) -> None:
    with pytest.raises(errors.NeedsCalibration):
        slim.compile(model("llama"), [Prune(0.2, criterion)], target="eager")  # type: ignore[arg-type]


def test_a_model_without_units_is_refused() -> None:
    from torch import nn

    with pytest.raises(errors.PassMatchedNothing):
        slim.compile(nn.Linear(4, 4), [Prune(0.2, "magnitude")], example_inputs=(torch.randn(2, 4),), target="eager")


def test_it_does_not_follow_quantisation() -> None:
    with pytest.raises(errors.PassOrder):
        slim.compile(model("llama"), 'quantize("int8"), prune(0.2)', calibration=tokens(), target="eager")


@pytest.mark.parametrize(
    ("held", "gone", "fits"), [(8, 1, False), (8, 2, True), (8, 7, True), (2, 1, True), (7, 2, True)]
)
def test_an_even_number_of_heads_stays_even_or_becomes_one(held: int, gone: int, fits: bool) -> None:
    assert stays_even(held, gone) is fits


def test_gqa_finds_groups_behind_it() -> None:
    before = lifted("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    after, _ = pruned(before, Prune(0.1, units="heads", reload=False))
    assert {int(node.args[1].meta["val"].shape[1]) for node in after.attention_nodes()} == {6}
    merged, report = run_pipeline(after, [GQA(2)], Context(calibration=tokens()))
    assert len(report.passes[0].matched) == len(merged.attention_nodes())


def test_a_protection_that_protects_nothing_is_refused() -> None:
    with pytest.raises(errors.BadPassOption, match=r'"nothing\.\*" matches no weight'):
        pruned(lifted("llama"), Prune(0.2, "magnitude", protect=("nothing.*",)))
