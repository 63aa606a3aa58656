"""A planted wrong rewrite is found by pass and by site; right ones are left in peace."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from click.testing import CliRunner

import slim
from slim import errors
from slim.cli import main
from slim.compiler import raising
from slim.compiler.lift import lift
from slim.compiler.passes_base import Context, Pass
from slim.compiler.pipeline import run_pipeline
from slim.compiler.program import Program
from slim.compiler.report import Report
from slim.compiler.rules import Rule, call, rewrite
from slim.compiler.scaling.sites import ScaleSite
from slim.inspection import bisect
from slim.inspection.hybrid import Hybrid
from slim.passes import GQA, FoldNorms, LowRank, Prune, Quantize, QuantizeKV, SmoothQuant, fold_norms
from tests.programs import model

aten = torch.ops.aten
slim_rms_norm = torch.ops.slim.rms_norm.default
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def llama():
    return lift(model("llama"))


@pytest.fixture(scope="module")
def calibration():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (2, 24), generator=generator) for _ in range(2)]


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies every matrix by what is next to nothing, and one by ``factor``."""

    weight: str
    factor: float

    def run(self, program: Program, ctx: Context) -> Report:
        names = [name for name in program.weights if program.weights[name].dim() == 2]
        for name in names:
            program.weights[name] = program.weights[name] * (self.factor if name == self.weight else 1 + 1e-5)
        return Report(matched=names)


@pytest.mark.parametrize("name", [UP, "model.layers.0.self_attn.k_proj.weight", "lm_head.weight"])
def test_it_finds_the_one_site_of_a_pass_that_it_does_not_know(llama, name):
    found = bisect(llama, [FoldNorms(), Scale(name, 1.5)], 1e-2)
    assert (found.stage, found.index) == (f'scale("{name}", factor=1.5)', 1)
    assert found.culprit.sites == [name]
    assert found.culprit.before < 1e-2 < found.culprit.with_it
    assert name.removesuffix(".weight") in found.places[0]


def test_it_names_the_first_pass_that_crosses_and_the_errors_of_all(llama):
    found = bisect(llama, [Scale(UP, 1.0), Scale(UP, 1.4), Scale(UP, 1.4)], 1e-2)
    assert found.index == 1
    assert [stage for stage, _ in found.errors] == ["lift", *(f'scale("{UP}", factor={f})' for f in (1.0, 1.4, 1.4))]
    assert found.errors[1][1] < 1e-2 < found.errors[2][1]


def test_a_wrong_fold_of_one_norm_is_found_though_the_pass_promises_to_lose_nothing(llama, monkeypatch):
    right = fold_norms._fold

    def wrong(program, site):
        right(program, site)
        if UP in [str(matrix.target) for matrix in site.matrices]:
            program.weights[UP] = program.weights[UP] * 1.1

    monkeypatch.setattr(fold_norms, "_fold", wrong)
    found = bisect(llama, FoldNorms(), 1e-4)
    assert found.culprit.sites == ["model.layers.1.post_attention_layernorm.weight"]
    assert found.culprit.note == ""


def test_sites_that_move_scales_into_each_other_are_named_together(llama, calibration, monkeypatch):
    right = ScaleSite.apply

    def wrong(self, program, scale):
        right(self, program, scale)
        if self.name == "model.layers.1.self_attn.v_proj.weight":
            program.weights[self.name] = program.weights[self.name] * 1.2

    monkeypatch.setattr(ScaleSite, "apply", wrong)
    found = bisect(llama, SmoothQuant(), 1e-4, calibration=calibration)
    assert "model.layers.1.self_attn.v_proj.weight" in found.culprit.sites
    assert not any("layers.0" in site for site in found.culprit.sites)
    assert len(found.culprit.sites) == 1 or "cannot be told apart" in found.culprit.note


def test_a_rule_of_the_lift_with_a_wrong_right_side_is_found_where_it_was_applied(monkeypatch):
    name = "silu(x) = x sigmoid(x)"
    wrong = Rule(
        name,
        call(aten.silu.default, args=("x",)),
        lambda match: match.new(aten.sigmoid.default, match["x"]) if "layers.1" in match.node.meta["module"] else None,
    )
    monkeypatch.setattr(raising, "ACTIVATIONS", (wrong, *raising.ACTIVATIONS))
    found = bisect(model("llama"), FoldNorms(), 1e-2)
    assert [(bad.stage, bad.rule) for bad in found.rewrites] == [("lift", name)]
    assert "model.layers.1.mlp" in found.rewrites[0].site
    assert found.culprit is None
    assert name in str(found)


def test_a_rule_that_hands_on_what_another_did_is_not_blamed(monkeypatch):
    def wrong(match):
        made = right.build(match)
        made.kwargs = {**made.kwargs, "eps": 1e4 * made.kwargs["eps"]}
        return made

    (right,) = (rule for rule in raising.NORMS if rule.name == "x * rsqrt(mean(x^2) + eps) = rms_norm(x)")
    monkeypatch.setattr(raising, "NORMS", tuple(replace(r, build=wrong) if r is right else r for r in raising.NORMS))
    found = bisect(model("llama"), FoldNorms(), 1e-2)
    assert {bad.rule for bad in found.rewrites} == {right.name}
    assert len(found.rewrites) == 5


@dataclass(frozen=True)
class Forgetful(Pass):
    """A run that ends without its report."""

    def run(self, program, ctx):
        return None


def test_a_pass_that_gives_no_report_is_told_what_to_add(llama):
    with pytest.raises(errors.PassFailed, match="end it with `return report`"):
        slim.compile(model("llama"), [Forgetful()], target="eager")


@dataclass(frozen=True)
class ByRule(Pass):
    """Rewrites silu by a rule that is wrong in one layer."""

    layer: str

    def run(self, program: Program, ctx: Context) -> Report:
        def build(match):
            gate = match.new(aten.sigmoid.default, match["x"])
            wrong = self.layer in match.node.meta["module"]
            return gate if wrong else match.new(aten.mul.Tensor, match["x"], gate)

        sites = [node.name for node in program.nodes(aten.silu.default)]
        rewrite(program, (Rule("silu(x) = x sigmoid(x)", call(aten.silu.default, args=("x",)), build),))
        return Report(matched=sites)


def test_a_rule_within_a_pass_is_found_by_rule_and_by_site(llama):
    found = bisect(llama, ByRule("layers.0"), 1e-3)
    (bad,) = found.rewrites
    assert bad.stage == 'by_rule("layers.0")'
    assert "model.layers.0.mlp" in bad.site
    assert found.stage == bad.stage
    assert any("model.layers.0.mlp" in place for place in found.places)


@dataclass(frozen=True)
class Insert(Pass):
    """Puts a scaling behind a norm that three linears read; reports nothing that the graph knows."""

    def run(self, program: Program, ctx: Context) -> Report:
        node = next(n for n in program.nodes(slim_rms_norm) if "layers.1.input" in n.meta["module"])
        with program.graph.inserting_after(node):
            new = program.insert(node.next, aten.mul.Tensor, node, 1.5, like=node)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new, propagate_meta=False)
        return Report(matched=["everywhere"])


def test_a_node_that_a_pass_inserted_is_the_site_and_not_those_that_read_it(llama):
    found = bisect(llama, Insert(), 1e-3)
    after, _ = run_pipeline(llama, [Insert()], Context(verify=False))
    names = {node.name for node in llama.nodes()}
    (new,) = (node for node in after.nodes() if node.name not in names)
    assert found.culprit.sites == found.culprit.nodes == [new.name]
    assert f"  inserts {new.name} (model.layers.1.input_layernorm" in str(found)
    assert "changes" not in str(found)


@dataclass(frozen=True)
class Spoil(Pass):
    """Divides a weight by zero; reads it again where ``look`` says so."""

    look: bool = False

    def run(self, program: Program, ctx: Context) -> Report:
        program.weights[UP] = program.weights[UP] / torch.zeros(32)
        return Report(matched=[str(program.weights[UP].dim())] if self.look else ["a weight"])


def test_a_weight_that_is_no_longer_finite_is_blamed_on_the_pass_and_not_on_the_checkpoint(llama):
    found = bisect(llama, [FoldNorms(), Spoil(), Quantize("int8")], 1e-2)
    assert (found.stage, found.index, found.culprit.sites) == ("spoil(False)", 1, [UP])
    assert found.errors[2] == ("spoil(False)", math.inf)
    assert "the pass left 1536 infinite values in model.layers.1.mlp.up_proj.weight" in str(found)
    assert "model.layers.1.mlp.up_proj" in found.places[0]


def test_a_pass_that_reads_what_it_has_spoilt_fails_as_that_pass(llama):
    with pytest.raises(errors.PassFailed, match=f"spoil(.|\n)*it left weight '{UP}' with 1536 infinite values"):
        bisect(llama, Spoil(look=True))


# -- the hybrids it is made of -----------------------------------------------------------------------------------------

PASSES = [
    FoldNorms(), SmoothQuant(), Quantize("int8"), Quantize("int4", activations="int8"), QuantizeKV("int4"), GQA(1),
    LowRank(0.5), Prune(0.3),
]  # fmt: skip


@pytest.mark.parametrize("pass_", PASSES, ids=repr)
def test_a_hybrid_of_nothing_is_the_program_before_and_one_of_everything_is_that_after(llama, calibration, pass_):
    after, report = run_pipeline(llama, [pass_], Context(verify=False, calibration=calibration))
    hybrid = Hybrid(llama, after)
    tokens = torch.randint(3, 96, (2, 7))
    known = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(7).repeat(2, 1),
    }
    inputs = [known[item.name] for item in llama.inputs]
    assert torch.equal(hybrid.run(inputs, ())[0], llama.run(*inputs)[0])
    assert torch.equal(hybrid.run(inputs, hybrid.touched)[0], after.run(*inputs)[0])
    in_words = isinstance(pass_, (QuantizeKV, Prune))  # their sites are no names: every node they touch is one then
    assert in_words or all(hybrid.readers(site) for site in report.passes[0].matched)


def test_nothing_wrong_is_said_of_passes_that_are_right(llama):
    found = bisect(llama, 'fold_norms, quantize("int8")', 0.5)
    assert not found
    assert str(found).endswith("no pass moves the output by more than 0.5")


def test_a_pass_that_matches_nothing_is_gone_past_where_that_is_asked_for(llama):
    nothing = 'prune(0.2, "magnitude", units="experts")'
    with pytest.raises(errors.PassMatchedNothing):
        bisect(llama, nothing)
    assert [text for text, _ in bisect(llama, f"{nothing}, fold_norms", strict=False).errors] == [
        "lift", 'prune(0.2, criterion="magnitude", units="experts")', "fold_norms()",
    ]  # fmt: skip


@pytest.mark.parametrize("threshold", [-1.0, math.nan, math.inf, "much", True])
def test_a_threshold_that_no_error_could_cross_is_refused(llama, threshold):
    with pytest.raises(errors.BadInput, match="it must be 0 or more"):
        bisect(llama, "fold_norms", threshold)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_ends_with_one_where_it_finds_a_site(tmp_path):
    model("llama").save_pretrained(tmp_path)
    run = CliRunner().invoke(main, ["bisect", str(tmp_path), "-p", 'quantize("int3")', "--threshold", "1e-3"])
    assert run.exit_code == 1, run.output
    assert "over 0.001" in run.stdout
    assert "site: model." in run.stdout
    assert "largest alone: " in run.stdout
    fine = CliRunner().invoke(main, ["bisect", str(tmp_path), "-p", "fold_norms", "--lift"])
    assert (fine.exit_code, "no pass moves the output" in fine.stdout) == (0, True), fine.output
    nothing = ["bisect", str(tmp_path), "-p", 'prune(0.2, "magnitude", units="experts")']
    assert CliRunner().invoke(main, nothing).exit_code == 2
    assert CliRunner().invoke(main, [*nothing, "--no-strict"]).exit_code == 0
