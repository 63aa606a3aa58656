"""Prune by what the model may hold or cost, with layers that differ, and by experts and query heads."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import slim
from benchmarks import zoo
from slim import errors
from slim.compiler.cost import cost
from slim.compiler.dependencies import Dependencies, Kind
from slim.compiler.program import Program
from slim.passes import Prune
from tests.programs import lifted, model
from tests.pruning import pruned, tokens

# -- budgets -----------------------------------------------------------------------------------------------------------


def flops(program: Program, context: int) -> int:
    return cost(program).bind(B=1, S=1, T=context).flops


@pytest.mark.parametrize(("name", "units"), [("llama", "both"), ("mixtral", "neurons")])
@pytest.mark.parametrize("measure", ["parameters", "bytes", "flops"])
def test_the_model_holds_or_costs_no_more_than_is_said_and_not_much_less(name: str, measure: str, units: str) -> None:
    def held(program: Program) -> int:
        return {"parameters": program.parameters, "bytes": program.nbytes, "flops": flops(program, 100)}[measure]

    before = lifted(name)
    most = int(0.85 * held(before))
    options = {measure: most, "units": units, "criterion": "magnitude", "multiple": 1}
    after, report = pruned(before.copy(), Prune(context=100 if measure == "flops" else 512, **options))  # type: ignore[arg-type]
    assert 0.75 * held(before) < held(after) <= most
    assert any("are to become" in note for note in report.notes)


def test_latency_is_that_of_the_roofline_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from slim.compiler.machine import Machine
    from slim.passes import prune

    machine = Machine(bandwidth=1e9, flops_rate=1e11, threads=1)
    monkeypatch.setattr(prune, "measure_machine", lambda: machine)

    def milliseconds(program: Program) -> float:
        sizes = dict.fromkeys(("B", "S"), 1) | {"T": 512}
        expression = cost(program).roofline(machine.bandwidth, machine.flops_rate)
        return 1e3 * float(expression.subs({symbol: sizes[str(symbol)] for symbol in expression.free_symbols}))

    before = lifted("llama")
    now = milliseconds(before)
    after, _ = pruned(before.copy(), Prune(latency=0.9 * now, criterion="magnitude"))
    assert 0.75 * now < milliseconds(after) <= 0.9 * now


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"parameters": 10**9}, "parameters already"),
        ({"bytes": 20}, "can go hold only"),
        ({"flops": 0}, "greater than zero"),
        ({"ratio": 0.1, "bytes": 1000}, "each says how much"),
        ({"parameters": 1000, "context": 100}, "does not depend on"),
    ],
)
def test_budgets_that_cannot_be_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(errors.SlimError, match=reason):
        pruned(lifted("llama"), Prune(criterion="magnitude", **options))


def test_a_plain_module_holds_no_more_parameters_than_is_said() -> None:
    from torch import nn

    plain = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    made = slim.compile(
        plain, [Prune(parameters=300, criterion="magnitude")], example_inputs=(torch.randn(2, 8),), target="eager"
    )
    assert made.program.parameters <= 300


def stacked() -> Any:
    """Two hidden layers, so that a matrix between them loses rows and columns; the last linear is a result."""
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


@pytest.mark.parametrize("criterion", ["obs", "magnitude"])
@pytest.mark.parametrize("goal", [{"ratio": 0.1}, {"ratio": 0.5}, {"parameters": 3000}, {"bytes": 12000}])
def test_what_two_sites_share_goes_once_and_a_head_pays_for_no_block(criterion: Any, goal: dict[str, Any]) -> None:
    from slim.passes.pruning.sites import block_parameters

    x = torch.randn(4, 16)
    made = slim.compile(
        stacked(), [Prune(criterion=criterion, **goal)], example_inputs=(x,), calibration=[(x,)], target="eager"
    ).program
    left = 5120 * (1 - goal.get("ratio", 0))  # of the matrices between the inputs and the head
    assert made.parameters <= goal.get("parameters", 10**9)
    assert made.nbytes <= goal.get("bytes", 10**9)
    assert 0.85 * left < block_parameters(made) <= left or "ratio" not in goal


def test_layers_that_differ_lose_what_they_share_once() -> None:
    from slim.passes.pruning.sites import block_parameters

    x = torch.randn(256, 16)
    pass_ = Prune(0.5, scope="global", reload=False)
    made = slim.compile(stacked(), [pass_], example_inputs=(x,), calibration=[(x,)], target="eager").program
    assert block_parameters(made) <= 0.5 * 5120


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("gpt2", "transformer.h.0.mlp.c_fc.weight"), ("phi3", "model.layers.0.mlp.gate_up_proj.weight"),
     ("gpt_neox", "*.layers.0.attention.query_key_value.weight"), ("mixtral", "*.layers.0.mlp.experts.gate_up_proj")],
)  # fmt: skip
def test_the_names_that_the_checkpoint_has_protect(name: str, pattern: str) -> None:
    _, report = pruned(lifted(name), Prune(0.03, "magnitude", protect=(pattern,), reload=False))
    assert any("protects it" in skip.reason and "0" in skip.site for skip in report.skipped)


@pytest.mark.parametrize("criterion", ["obs", "flap"])
def test_experts_with_biases_are_pruned(criterion: Any) -> None:
    made = slim.compile(model("gpt_oss"), [Prune(0.2, criterion, rounds=None)], calibration=tokens(), target="eager")
    assert sum("neurons" in note for note in made.report.passes[0].notes) >= 1


@pytest.mark.parametrize(
    ("name", "changed", "written"),
    [("opt", {"intermediate_size": 48}, "ffn_dim"), ("bloom", {"n_inner": None}, None)],
)
def test_a_configuration_is_written_where_the_model_reads_its_width(
    name: str, changed: dict[str, Any], written: str | None
) -> None:
    program = lifted(name).copy()
    assert program.facts.config is not None
    program.facts.config = {**program.facts.config, **changed}
    width = next(g.units for g in Dependencies(program).groups if g.kind is Kind.NEURON)
    if "intermediate_size" in changed:
        program.facts.config["intermediate_size"] = width
    after, report = pruned(program, Prune(0.2, "magnitude", units="neurons"))
    assert after.facts.config is not None
    if written is None:
        assert any("the configuration of the model cannot say" in note for note in report.notes)
        assert after.facts.config == program.facts.config
    else:
        assert after.facts.config[written] < width
        assert after.facts.config["intermediate_size"] == width


class Picked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = torch.nn.Linear(8, 32), torch.nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.a(x).topk(4, -1).values)


def test_values_that_are_picked_are_no_experts() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(errors.PassMatchedNothing, match="values are picked of it"):
        slim.compile(Picked(), [Prune(0.3, units="experts")], example_inputs=(x,), calibration=[(x,)], target="eager")


def test_experts_whose_choice_is_not_followed_are_said_to_be_there() -> None:
    with pytest.raises(errors.PassMatchedNothing, match="how its experts are chosen cannot be followed"):
        slim.compile(zoo.build("deepseek_v3"), [Prune(0.2, "magnitude", units="experts")], target="eager")


def test_a_share_of_blocks_is_refused_where_there_are_none() -> None:
    from torch import nn

    table = nn.Sequential(nn.Embedding(20, 32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(errors.BadPassOption, match="no linear lies between others"):
        slim.compile(
            table, [Prune(0.5, "magnitude")], example_inputs=(torch.randint(20, (2, 5)),), target="eager", verify=False
        )


@pytest.mark.parametrize(("width", "step"), [(8, 1), (16, 4), (64, 8), (4096, 128)])
def test_experts_keep_rows_that_kernels_for_groups_of_matrices_can_read(width: int, step: int) -> None:
    from types import SimpleNamespace

    from slim.compiler.dependencies import Kind
    from slim.compiler.uses import EXPERTS
    from slim.passes.pruning.budget import multiple_kept

    site = SimpleNamespace(units=width, kind=Kind.NEURON, linear=SimpleNamespace(target=EXPERTS))
    assert multiple_kept(site, width - 1, None) == width - step  # type: ignore[arg-type]


# -- layers that differ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["obs", "fisher"])
def test_layers_lose_what_costs_least_and_the_result_is_saved(criterion: str, tmp_path: Path) -> None:
    from slim.passes.pruning.sites import block_parameters

    given = copy.deepcopy(model("llama"))
    with torch.no_grad():
        given.model.layers[0].mlp.down_proj.weight.mul_(1e-3)  # hardly anything of what these neurons make is heard
    pass_ = Prune(0.2, criterion, scope="global", reload=False)  # type: ignore[arg-type]
    made = slim.compile(given, [pass_], calibration=tokens(), target="eager")
    before = block_parameters(lifted("llama"))
    widths = [made.program.weights.shape(f"model.layers.{i}.mlp.up_proj.weight")[0] for i in range(2)]
    assert widths[0] < widths[1]
    assert block_parameters(made.program) <= 0.8 * before
    made.save(tmp_path / "saved")
    ids = tokens()[0]
    again = slim.load(tmp_path / "saved", target="eager")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, made(input_ids=ids).logits)
    assert torch.equal(again.generate(ids, max_new_tokens=3), made.generate(ids, max_new_tokens=3))
    with pytest.raises(errors.ExportUnsupported, match=r"model\.layers\.\d\.mlp"):
        made.export(tmp_path / "out")


def test_layers_that_differ_are_refused_where_transformers_is_to_load_them() -> None:
    with pytest.raises(errors.ContradictoryOptions, match="any configuration of transformers"):
        Prune(0.2, scope="global")
    with pytest.raises(errors.BadPassOption, match="say nothing across layers"):
        Prune(0.2, "wanda", scope="global", reload=False)


# -- experts and query heads -------------------------------------------------------------------------------------------


def mixture() -> Any:
    """A Mixtral of one layer and eight experts, of which no token is sent to the third or the sixth."""
    given = copy.deepcopy(model("mixtral", num_local_experts=8, num_experts_per_tok=2))
    with torch.no_grad():
        for layer in given.model.layers:
            layer.post_attention_layernorm.weight.abs_()
            layer.mlp.gate.weight[[2, 5]] = 0.0
            layer.mlp.gate.weight[:2].mul_(4.0)
            layer.mlp.experts.down_proj[[2, 5]] = 0.0
    return given


def test_the_experts_that_add_nothing_go_and_the_result_reloads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = slim.compile(mixture(), [Prune(0.15, units="experts")], calibration=tokens(), target="eager")
    config = made.program.facts.config
    assert config is not None
    assert config["num_local_experts"] == 6
    assert made.program.weights.shape("model.layers.0.mlp.gate.weight")[0] == 6
    made.export(tmp_path / "out")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tokens()[0]
    with torch.no_grad():
        assert torch.allclose(there(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-5)
        gone = there.model.layers[0].mlp.experts.down_proj.flatten(1).abs().sum(1)
    assert bool((gone > 0).all())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"criterion": "wanda"}, "chosen by obs, magnitude, random"),
        ({"refit": True}, "nothing could be fitted"),
        ({"scope": "global", "reload": False}, "as many experts as the others"),
    ],
)
def test_what_experts_have_no_use_for_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(errors.BadPassOption, match=reason):
        Prune(0.2, units="experts", **options)


def test_no_fewer_experts_are_left_than_a_token_asks() -> None:
    with pytest.raises(errors.SlimError, match=r"a token is sent to 2 experts of model\.layers\.0\.mlp"):
        pruned(lifted("mixtral"), Prune(0.75, "magnitude", units="experts"))


@pytest.mark.parametrize("criterion", ["obs", "wanda"])
def test_query_heads_go_from_every_kv_head_and_the_result_reloads(criterion: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = slim.compile(
        model("qwen2"), [Prune(0.1, criterion, units="query heads")], calibration=tokens(), target="eager"  # type: ignore[arg-type]
    )  # fmt: skip
    config = made.program.facts.config
    assert config is not None
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 2)
    made.export(tmp_path / "out")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tokens()[0]
    with torch.no_grad():
        assert torch.allclose(there(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-5)
