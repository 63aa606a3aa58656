"""The verifier takes every sound Program and rejects every broken one, naming stage, node and reason."""

import operator

import pytest
import torch
from torch import fx

from slim import errors
from slim.compiler.verify import verify
from tests.programs import lifted, program

aten, slim_ops = torch.ops.aten, torch.ops.slim

LINES = """
h = slim.rms_norm.default(x, weights["norm"], eps=1e-6)
q = aten.linear.default(h, weights["q"])
n = aten.sym_size.int(x, 1)
m = aten.sym_size.int(x, 0)
r = aten.reshape.default(q, [m, n, -1, 4])
t = aten.transpose.int(r, 1, 2)
a = slim.attention.default(t, t, t, layer=0, scale=0.5)
b = slim.attention.default(t, t, a, layer=1, scale=0.5)
return (b, h)
"""


def sound():
    return program(LINES, {"norm": torch.ones(8), "q": torch.randn(8, 8)})


def node(made, name):
    return next(n for n in made.graph.nodes if n.name == name)


def rejected(made, stage="prune"):
    with pytest.raises(errors.VerificationFailed) as caught:
        verify(made, stage)
    error = caught.value
    assert error.stage == stage
    assert stage in str(error)
    return error


def insert(made, target, *args, op="call_function", before="a", val=None, **kwargs):
    with made.graph.inserting_before(node(made, before)):
        new = made.graph.create_node(op, target, args, kwargs, name="new")
    new.meta["val"] = val
    return new


# -- what is sound -----------------------------------------------------------------------------------------------------


def test_a_sound_program_is_accepted():
    verify(sound(), "lift")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_lifted_model_is_accepted_and_so_is_its_copy(name):
    made = lifted(name)
    verify(made, "lift")
    verify(made.copy(), "copy")


def test_verifying_changes_nothing():
    made = sound()
    text = str(made)
    verify(made, "lift")
    assert str(made) == text


# -- what is broken ----------------------------------------------------------------------------------------------------


def test_a_node_that_reads_what_comes_later_is_rejected():
    made = sound()
    node(made, "h").replace_input_with(node(made, "x"), node(made, "q"))
    error = rejected(made)
    assert error.node == "h"
    assert "reads q, which is not computed before it" in error.reason


def test_a_node_of_another_graph_is_rejected():
    made = sound()
    node(made, "t").update_arg(0, node(sound(), "r"))
    assert "r, which is not computed before it" in rejected(made).reason


def test_a_missing_weight_is_rejected():
    made = sound()
    del made.weights["q"]
    error = rejected(made)
    assert "there is no weight 'q'" in error.reason


def test_an_input_that_was_not_declared_is_rejected():
    made = sound()
    with made.graph.inserting_before(node(made, "h")):
        made.graph.placeholder("y").meta["val"] = torch.ones(1)
    assert "declares no input 'y'" in rejected(made).reason


@pytest.mark.parametrize("op", ["call_module", "call_method"])
def test_a_node_that_is_no_operation_is_rejected(op):
    made = sound()
    insert(made, "relu", node(made, "t"), op=op)
    error = rejected(made)
    assert (error.node, error.reason) == ("new", f"a {op} is not part of the dialect")


@pytest.mark.parametrize(
    "target", [torch.relu, torch.nn.functional.relu, abs, operator.xor, torch.ops.prims.neg.default, aten.relu]
)
def test_a_target_outside_the_dialect_is_rejected(target):
    made = sound()
    insert(made, target, node(made, "t"))
    error = rejected(made)
    assert error.node == "new"
    assert "is not part of the dialect" in error.reason


@pytest.mark.parametrize("target", [aten.relu_.default, aten.add_.Tensor, aten.copy_.default, aten.relu.out])
def test_an_operation_that_writes_into_its_arguments_is_rejected(target):
    made = sound()
    insert(made, target, node(made, "t"), node(made, "t"))
    assert "writes into its arguments" in rejected(made).reason


def test_an_operation_that_reaches_files_is_rejected():
    made = sound()
    insert(made, aten.from_file.default, "/etc/passwd")
    assert "reaches outside the program" in rejected(made).reason


def test_the_cache_is_the_one_thing_that_may_be_written():
    made = program(
        "y = slim.cached_attention.default(x, x, x, k, v, 3, layer=0, scale=0.5)\nreturn (y,)",
        {}, inputs="x: f32[B, 2, S, 4], k: f32[B, 2, T, 4], v: f32[B, 2, T, 4]",
    )  # fmt: skip
    verify(made, "bind")


def test_arguments_that_do_not_fit_are_rejected():
    made = sound()
    made.weights["wide"] = torch.randn(8, 9)
    with made.graph.inserting_before(node(made, "h")):
        wide = made.graph.get_attr("wide")
    wide.meta["val"] = made.typer.value(wide, made.weights)
    node(made, "q").update_arg(1, wide)
    error = rejected(made)
    assert error.node == "q"
    assert error.reason.startswith("its arguments do not fit: ")


def test_an_argument_too_many_is_rejected():
    made = sound()
    node(made, "t").args = (*node(made, "t").args, 3)
    assert "do not fit" in rejected(made).reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v.to(torch.bfloat16), "it is recorded as bf16[B, S, 8] but computes f32[B, S, 8]"),
        (lambda v: v[..., :7], "it is recorded as f32[B, S, 7] but computes f32[B, S, 8]"),
        (lambda v: v[0], "it is recorded as f32[S, 8] but computes f32[B, S, 8]"),
        (lambda v: v.transpose(0, 1), "it is recorded as f32[S, B, 8] but computes f32[B, S, 8]"),
        (lambda v: None, "it is recorded as nothing but computes f32[B, S, 8]"),
        (lambda v: (v, v), "it is recorded as f32[B, S, 8], f32[B, S, 8] but computes f32[B, S, 8]"),
    ],
    ids=["dtype", "size", "rank", "order", "none", "tuple"],
)
def test_a_type_that_is_not_the_true_one_is_rejected(change, reason):
    made = sound()
    with made.typer.mode:
        node(made, "q").meta["val"] = change(node(made, "q").meta["val"])
    error = rejected(made)
    assert (error.node, error.reason) == ("q", reason)


def test_a_type_that_was_never_recorded_is_rejected():
    made = sound()
    del node(made, "q").meta["val"]
    assert rejected(made).node == "q"


def test_a_weight_that_changed_its_shape_behind_the_graph_is_rejected():
    made = sound()
    made.weights["q"] = torch.randn(8, 8).bfloat16()
    assert "recorded as f32[8, 8] but computes bf16[8, 8]" in rejected(made).reason
    made = sound()
    made.weights["q"] = torch.randn(16, 8)
    assert "recorded as f32[8, 8] but computes f32[16, 8]" in rejected(made).reason


def test_a_change_that_is_carried_through_all_types_is_sound():
    made = sound()
    made.weights["q"] = torch.randn(12, 8)  # three heads of four where two were
    made.infer()
    verify(made, "widen")
    assert node(made, "a").meta["val"].shape[1] == 3


def test_two_outputs_or_none_are_rejected():
    made = sound()
    made.graph.erase_node(made.graph.output_node())
    assert "there are 0 outputs" in rejected(made).reason
    made = sound()
    extra = made.graph.create_node("output", "output", ((node(made, "h"),),))
    extra.meta["val"] = (node(made, "h").meta["val"],)
    assert "there are 2 outputs" in rejected(made).reason


def test_two_attentions_of_one_layer_are_rejected():
    made = sound()
    node(made, "b").update_kwarg("layer", 0)
    error = rejected(made)
    assert error.node == "b"
    assert "layer 0 has an attention node already: a" in error.reason


def test_an_error_says_where_in_the_models_source_it_is():
    made = sound()
    node(made, "q").meta.update(module="layers.0.q_proj", where="model.py:7")
    node(made, "q").meta["val"] = None
    assert rejected(made).node == "q (layers.0.q_proj model.py:7)"


def test_an_empty_graph_is_rejected():
    made = sound()
    made.graph = fx.Graph()
    rejected(made)


def test_the_hint_asks_for_a_report_because_the_user_is_not_at_fault():
    made = sound()
    node(made, "q").meta["val"] = None
    assert "this is a fault in prune, not in your model" in str(rejected(made))
