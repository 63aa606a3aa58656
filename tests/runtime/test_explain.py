"""A name leads from the model's source line through the passes into the kernel that runs it."""

import functools
import json

import pytest
import torch

from slim import errors
from slim.compiler.difference import AllGone, changes, gone
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.report import PipelineReport, Report
from slim.passes import FoldNorms, LowRank, Quantize, QuantizeKV
from slim.runtime.artifact import load
from slim.runtime.compiled import CompiledModel
from slim.runtime.explain import explain
from tests.programs import lifted, program

DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def compiled():
    program, report = run_pipeline(lifted("llama"), [FoldNorms(), Quantize("int8")], Context())
    return CompiledModel(program, "cpu", report=report)


@functools.cache
def plain():
    """No passes, no generated code."""
    return CompiledModel(lifted("llama"), "eager")


@functools.cache
def factored():
    """(report, compiled): after a pass that replaces weights by others."""
    program, report = run_pipeline(lifted("llama"), [LowRank(0.6, method="svd")], Context())
    return report, CompiledModel(program, "eager", report=report)


def down(compiled):
    """The linear that reads the weight ``DOWN``."""
    nodes = compiled.program.nodes(torch.ops.aten.linear.default)
    return next(node for node in nodes if node.meta["module"] == "model.layers.0.mlp.down_proj")


def test_a_node_names_the_line_that_made_it(compiled):
    (origin,) = compiled.explain(down(compiled)).origins
    assert origin.where.startswith("transformers/models/llama/modeling_llama.py:")
    assert "self.down_proj(" in origin.text


def test_a_node_names_the_passes_that_changed_it_and_its_type(compiled):
    found = compiled.explain(down(compiled).name)
    assert found.passes == [("lift", "made"), ('quantize("int8")', "changed")]
    assert found.type == "f32[B, S, 32]"
    assert (
        found.line == f"{found.name}: f32[B, S, 32] = aten.linear.default({', '.join(map(str, down(compiled).args))})"
    )


def test_a_node_that_a_pass_made_was_not_made_by_the_lift(compiled):
    assert compiled.explain("dequantize").passes == [('quantize("int8")', "made")]


def test_a_weight_names_its_readers_its_bytes_and_its_passes(compiled):
    found = compiled.explain(DOWN)
    assert (found.type, found.nbytes) == ("i8[32, 48]", 32 * 48)
    assert [line.partition(":")[0] for line in found.readers] == ["dequantize_6", down(compiled).name]
    assert found.readers[1].endswith("  # multiplies by it")
    assert found.passes == [("lift", "made"), ('quantize("int8")', "changed")]
    node = next(node for node in compiled.program.graph.find_nodes(op="get_attr") if node.target == DOWN)
    assert compiled.explain(node) == compiled.explain(node.name) == found


def test_a_weight_that_a_pass_removed_is_still_known(compiled):
    found = compiled.explain(NORM)
    assert found.passes == [("lift", "made"), ("fold_norms()", "removed")]
    assert not found.places
    assert (found.type, found.nbytes) == ("f32[32]", 128)
    assert found.origins == plain().explain(NORM).origins
    assert "it is not in the program any more; type and source are those before fold_norms()" in found.notes


def test_a_node_that_a_pass_removed_is_shown_as_it_was():
    weights = {"w": torch.randn(6, 8)}
    lines = "y = aten.linear.default(x, weights['w'])\nz = aten.{}.default(y)\nreturn (z,)"
    before, after = program(lines.format("relu"), weights), program(lines.replace("z", "u").format("tanh"), weights)
    next(before.nodes(torch.ops.aten.relu.default)).meta.update(module="act", where="model.py:7")
    found = changes(before, after)
    made = Report(text="renamed()", changes=found, gone=gone(before, after, found))
    explanation = explain(after, PipelineReport([made]), {}, "z")
    assert explanation.line == "z: f32[B, S, 6] = aten.relu.default(y)"
    assert [(origin.module, origin.where) for origin in explanation.origins] == [("act", "model.py:7")]
    assert explanation.passes == [("lift", "made"), ("renamed()", "removed")]


def test_a_weight_that_a_pass_replaced_names_what_is_read_in_its_place():
    _, replaced = factored()
    found = replaced.explain(DOWN)
    assert (found.type, found.passes[1][1]) == ("f32[32, 48]", "removed")
    assert f"where it was read there are now {DOWN}_outer, {DOWN}_inner" in found.notes


def test_what_a_pass_removed_is_kept_in_the_report_on_disk():
    report, _ = factored()
    assert PipelineReport.from_json(report.to_json()) == report
    data = json.loads(report.to_json())
    del data["passes"][0]["gone"]  # saved before there was any
    old = CompiledModel(plain().program, "eager", report=PipelineReport.from_json(json.dumps(data)))
    assert old.report.passes[0].gone == AllGone()


@pytest.mark.parametrize("name", ["node", "weight"])
def test_both_lead_to_the_region_and_the_kernel_that_runs_them(compiled, name):
    found = compiled.explain(down(compiled) if name == "node" else DOWN)
    (place,) = found.places
    assert (place.form, place.stage.form) == ("step_last", "linear")
    assert DOWN in place.stage.text
    (kernel,) = place.stage.kernels
    assert f"static void {kernel.name}(" in compiled.code[f"{place.form}/{kernel.file}"]


def test_what_is_fused_is_found_where_it_was_fused_into(compiled):
    silu = next(compiled.program.nodes(torch.ops.aten.silu.default))
    gate = compiled.explain("model.layers.0.mlp.gate_proj.weight")
    assert [str(p) for p in compiled.explain(silu).places] == [str(p) for p in gate.places]


def test_attention_over_a_cache_is_found_by_the_name_it_has_without(compiled):
    attention, *_ = compiled.program.attention_nodes()
    assert [place.stage.form for place in compiled.explain(attention).places] == ["attention"]


def test_every_operation_is_in_some_region(compiled):
    lost = [node.name for node in compiled.program.nodes() if not compiled.explain(node).places]
    assert lost == ["_to_copy"]  # of the mask, which a step over a cache is given as it is


def test_its_text_reads_in_lines(compiled):
    text = str(compiled.explain(DOWN))
    assert text.splitlines()[0] == f"weight   {DOWN}: i8[32, 48]"
    assert "passes   lift made it\n         quantize" in text
    assert "\nruns     step_last, region " in text


def test_an_unknown_name_lists_those_near_it(compiled):
    with pytest.raises(errors.BadInput, match=r"no node and no weight 'model.layers.0.mlp.down.weight'.*down_proj"):
        compiled.explain("model.layers.0.mlp.down.weight")
    with pytest.raises(errors.BadInput, match=r"near it are .*model\.layers\.0\.mlp\.up_proj"):
        compiled.explain("up_proj")
    with pytest.raises(errors.BadInput, match="the name of one, not 5"):
        compiled.explain(5)


def test_an_input_names_its_readers_and_a_fused_weight_its_parts():
    assert any("embedding" in line for line in plain().explain("input_ids").readers)
    fused = CompiledModel(lifted("gpt_neox"), "eager")
    (note,) = fused.explain("gpt_neox.layers.0.attention.query_key_value.weight").notes
    parts = note.removeprefix("the lift took it apart, into ").split(", ")
    assert len(parts) == 3
    assert set(parts) <= set(fused.program.weights)


def test_a_module_is_answered_with_what_is_in_it():
    with pytest.raises(errors.BadInput, match=r"in it are model\.layers\.0\.mlp\.gate_proj\.weight"):
        plain().explain("model.layers.0.mlp")


def test_what_rounds_keys_and_values_is_found_in_the_step_over_a_cache():
    program, report = run_pipeline(lifted("llama"), [QuantizeKV()], Context())
    compiled = CompiledModel(program, "cpu", report=report)
    nodes = program.nodes(torch.ops.slim.quantize.default)
    assert nodes
    assert all("step_last" in {place.form for place in compiled.explain(node).places} for node in nodes)


def test_eager_models_and_those_without_a_pipeline_explain_too():
    made = CompiledModel(lifted("gpt2"), "eager")
    found = made.explain("transformer.wte.weight")
    assert found.passes == [("lift", "made")]
    assert found.readers == [
        'embedding: f32[B, S, 32] = aten.embedding.default(weights["transformer.wte.weight"], input_ids)'
        "  # looks up rows of it",
        next(line for line in found.readers if line.endswith("  # multiplies by it")),
    ]
    assert made.explain("lm_head.weight").notes == ["lm_head.weight is the same weight"]
    assert (
        "it is a part of transformer.h.0.attn.c_attn.weight"
        in made.explain("transformer.h.0.attn.c_attn.weight_0").notes
    )


def test_what_runs_eagerly_names_the_call_of_pytorch_and_why(compiled):
    model = CompiledModel(compiled.program, "eager", report=compiled.report)
    (linear,) = model.explain(down(compiled)).places
    assert "slim.codegen.eager_ops.int8_linear: " in str(linear)
    assert str(linear).startswith("step_last, step ")
    assert str(linear).endswith('# the target "eager" generates no code')
    assert model.explain(DOWN).places == model.explain("dequantize_6").places == [linear]
    (embedding,) = plain().explain("model.embed_tokens.weight").places
    assert "by PyTorch: aten.embedding.default: model.embed_tokens.weight input_ids -> embedding" in str(embedding)
    lost = [node.name for node in plain().program.nodes() if not plain().explain(node).places]
    assert lost == ["_to_copy"]  # of the mask, which a step over a cache is given as it is


def test_a_node_names_the_weights_that_are_restored_for_it(compiled):
    found = compiled.explain(down(compiled))
    assert found.weights == {DOWN: "i8[32, 48]", f"{DOWN}_scale": "f32[32]"}
    assert found.nbytes == 32 * 48 + 32 * 4


def test_a_loaded_model_knows_its_passes(compiled, tmp_path):
    compiled.save(tmp_path / "small")
    again = load(tmp_path / "small", target="eager")
    assert again.explain(NORM).passes == compiled.explain(NORM).passes


def test_notebooks_show_the_report_and_the_ir(compiled):
    html = compiled._repr_html_()
    assert "<td>fold_norms()</td>" in html
    assert "weights[&quot;model.embed_tokens.weight&quot;]" in html
    assert "<script" not in html
