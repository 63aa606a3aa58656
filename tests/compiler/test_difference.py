"""Two Programs are compared by name and shown as text, and a Program is a networkx graph."""

import networkx
import pytest
import torch

from slim import errors
from slim.compiler.difference import changes
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.report import PipelineReport
from slim.passes import FoldNorms, Quantize
from tests.programs import lifted, program

LINES = "y = aten.linear.default(x, weights['w'])\nz = aten.relu.default(y)\nreturn (z,)"


def made(lines=LINES, **weights):
    torch.manual_seed(0)
    return program(lines, {"w": torch.randn(6, 8), **weights})


@pytest.fixture(scope="module")
def quantised():
    before = lifted("llama")
    after, report = run_pipeline(before, [FoldNorms(), Quantize("int8")], Context())
    return before, after, report


def test_a_program_and_its_copy_do_not_differ():
    start = made()
    difference = start.diff(start.copy())
    assert not difference
    assert str(difference) == "no difference"


def test_a_weight_of_other_numbers_differs_and_one_of_equal_numbers_does_not():
    a, b, c = made(), made(), made()
    c.weights["w"] = c.weights["w"] * 2
    assert not a.diff(b)
    assert a.diff(c).changes.weights.changed == ["w"]
    assert "~ w: f32[6, 8], 192 bytes, other numbers" in str(a.diff(c))


def test_without_reading_another_tensor_is_another_weight():
    a, b = made(), made()
    assert changes(a, b).weights.changed == ["w"]
    assert not changes(a, a.copy())


def test_a_notebook_shows_what_differs_in_colours_and_escaped():
    a, b = made(), made("y = aten.linear.default(x, weights['w'])\nz = aten.tanh.default(y)\nreturn (z,)")
    html = a.diff(b)._repr_html_()
    assert "<summary>nodes: 0 added, 0 removed, 1 changed;" in html
    assert '<span style="color:#2a8a4a">+z: f32[B, S, 6] = aten.tanh.default(y)</span>' in html
    assert 'weights["w"]' not in html
    assert "weights[&quot;w&quot;]" in html
    assert a.diff(a.copy())._repr_html_() == "<div>no difference</div>"


def test_the_text_shows_nodes_that_came_went_and_changed():
    after = made(
        "y = aten.linear.default(x, weights['w'])\nz = aten.tanh.default(y)\nu = aten.neg.default(z)\nreturn (u,)"
    )
    text = str(made().diff(after)).splitlines()
    assert text[0] == "nodes: 1 added, 0 removed, 1 changed; weights: 0 added, 0 removed, 0 changed"
    assert "-z: f32[B, S, 6] = aten.relu.default(y)" in text
    assert "+z: f32[B, S, 6] = aten.tanh.default(y)" in text
    assert "+u: f32[B, S, 6] = aten.neg.default(z)" in text
    assert ' y: f32[B, S, 6] = aten.linear.default(x, weights["w"])' in text


def test_a_pipeline_notes_what_each_pass_did_to_nodes_and_weights(quantised):
    before, after, report = quantised
    folded, rounded = (item.changes for item in report.passes)
    assert "model.layers.0.input_layernorm.weight" in folded.weights.removed
    assert "model.layers.0.self_attn.q_proj.weight" in folded.weights.changed
    assert "model.layers.0.self_attn.o_proj.weight" not in folded.weights.changed
    assert "model.layers.0.self_attn.q_proj.weight_scale" in rounded.weights.made
    assert {node.name for node in after.nodes()} - {node.name for node in before.nodes()} == set(rounded.nodes.made)


def test_the_notes_survive_json(quantised):
    report = quantised[2]
    again = PipelineReport.from_json(report.to_json())
    assert [item.changes for item in again.passes] == [item.changes for item in report.passes]


def test_types_and_bytes_of_changed_weights_are_told(quantised):
    before, after, _ = quantised
    text = str(before.diff(after))
    assert "~ model.layers.0.self_attn.q_proj.weight: f32[32, 32], 4,096 bytes -> i8[32, 32], 1,024 bytes" in text
    assert "- model.layers.0.input_layernorm.weight: f32[32], 128 bytes" in text


def test_a_program_becomes_a_graph_with_all_it_knows():
    made = lifted("llama")
    graph = made.to_networkx()
    assert networkx.is_directed_acyclic_graph(graph)
    assert len(graph) == len(made.graph.nodes)
    linear = next(node for node in made.nodes(torch.ops.aten.linear.default))
    found = graph.nodes[linear.name]
    assert (found["kind"], found["op"], found["dtype"]) == ("operation", "aten.linear.default", "f32")
    assert found["shape"][:2] == ("B", "S")
    assert found["where"].startswith("transformers/models/llama/modeling_llama.py:")
    weight = next(name for name, values in graph.nodes.items() if values["kind"] == "weight")
    assert graph.nodes[weight]["nbytes"] == made.weights.nbytes(graph.nodes[weight]["weight"])
    arguments = {values["argument"] for _, _, values in graph.in_edges(linear.name, data=True)}
    assert arguments == {"input", "weight"}


def test_a_value_that_is_read_twice_has_two_edges():
    graph = made("y = aten.mul.Tensor(x, x)\nreturn (y,)").to_networkx()
    assert sorted(values["argument"] for _, _, values in graph.edges(data=True) if values["argument"] != "0") == [
        "other",
        "self",
    ]


def test_what_is_no_program_is_refused():
    with pytest.raises(errors.BadInput, match="it is no Program"):
        made().diff("another")
