"""FoldNorms keeps the function of every model, and leaves alone what it cannot fold without changing it."""

import pytest
import torch
from torch import nn

from slim.compiler.lift import lift
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.probe import make_probe
from slim.compiler.verify import verify
from slim.passes import FoldNorms
from tests.programs import Counted, lifted, program

ROOT = torch.ops.slim.rms_norm.default, torch.ops.slim.layer_norm.default


def matrix(*shape, dtype=torch.float32):
    return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)


def gain(width=8, dtype=torch.float32):
    return (torch.rand(width) + 0.5).to(dtype)


def folded(before):
    """(the Program after the pass, its Report); the change of the output is checked."""
    after = before.copy()
    report = FoldNorms().run(after, Context())
    after.clean()
    verify(after, "fold_norms")
    return after, report


def moved(before, after):
    probe = make_probe(before)
    return probe.error(probe.run(before), probe.run(after))


def norm_arguments(changed):
    return [node.args[1:] for node in changed.nodes(*ROOT)]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("in_float", [True, False])
def test_an_rms_gain_is_folded_into_every_reader(offset, in_float):
    before = program(
        f"""
        n = slim.rms_norm.default(x, weights["norm.weight"], eps=1e-6, offset={offset}, gain_in_float={in_float})
        q = aten.linear.default(n, weights["q.weight"])
        k = aten.linear.default(n, weights["k.weight"], weights["k.bias"])
        return (q, k)
        """,
        {"norm.weight": gain(), "q.weight": matrix(6, 8), "k.weight": matrix(4, 8), "k.bias": torch.randn(4)},
    )
    after, report = folded(before)
    assert report.matched == ["norm.weight"]
    assert moved(before, after) < 1e-6
    assert norm_arguments(after) == [(None,)]
    assert after.facts.retired == {"norm.weight": 1.0 - offset}
    assert set(after.weights) == {"q.weight", "k.weight", "k.bias"}


def test_the_fold_is_rounded_once_from_float32():
    weights = {"norm.weight": gain(dtype=torch.bfloat16), "q.weight": matrix(6, 8, dtype=torch.bfloat16)}
    before = program(
        """
        n = slim.rms_norm.default(x, weights["norm.weight"], eps=1e-6, offset=1.0, gain_in_float=True)
        q = aten.linear.default(n, weights["q.weight"])
        return (q,)
        """,
        dict(weights),
        "x: bf16[B, S, 8]",
    )
    after, _ = folded(before)
    exact = weights["q.weight"].float() * (weights["norm.weight"].float() + 1)
    assert torch.equal(after.weights["q.weight"], exact.bfloat16())
    assert moved(before, after) < 2e-2


def test_a_shift_goes_into_the_biases_and_makes_those_that_are_missing():
    before = program(
        """
        n = slim.layer_norm.default(x, weights["norm.weight"], weights["norm.bias"], eps=1e-5)
        q = aten.linear.default(n, weights["q.weight"])
        k = aten.linear.default(n, weights["k.weight"], weights["k.bias"])
        return (q, k)
        """,
        {
            "norm.weight": gain(), "norm.bias": torch.randn(8), "q.weight": matrix(6, 8), "k.weight": matrix(4, 8),
            "k.bias": torch.randn(4),
        },
    )  # fmt: skip
    after, report = folded(before)
    assert moved(before, after) < 1e-6
    assert norm_arguments(after) == [(None, None)] or norm_arguments(after) == [()]
    assert after.facts.added == ["q.bias"]
    assert after.facts.retired == {"norm.weight": 1.0, "norm.bias": 0.0}
    assert any("q.bias" in note for note in report.notes)


def test_rows_may_be_moved_on_the_way_to_a_linear():
    before = program(
        """
        n = slim.rms_norm.default(x, weights["norm.weight"], eps=1e-6)
        last = aten.slice.Tensor(n, 1, -1, 9223372036854775807)
        rows = aten.reshape.default(last, [-1, 8])
        twice = aten.repeat_interleave.self_int(rows, 2, 0)
        q = aten.linear.default(twice, weights["q.weight"])
        return (q,)
        """,
        {"norm.weight": gain(), "q.weight": matrix(6, 8)},
    )
    after, report = folded(before)
    assert report.matched
    assert moved(before, after) < 1e-6


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("q = aten.linear.default(n, weights['q.weight'])\ny = aten.add.Tensor(q, n)", "goes to aten.add.Tensor"),
        ("y = aten.linear.default(n, weights['q.weight'])\nz = aten.mul.Tensor(x, weights['norm.weight'])",
         "norm.weight is read by aten.mul.Tensor too"),
        ("y = aten.linear.default(n, weights['q.weight'])\nz = aten.linear.default(x, weights['q.weight'])",
         "q.weight is read by aten.linear.default too"),
        ("w = aten.t.default(weights['q.weight'])\ny = aten.linear.default(n, w)", "w is computed, by aten.t.default"),
        ("r = aten.reshape.default(n, [-1, 4])\ny = aten.linear.default(r, weights['half'])", "goes to aten.reshape"),
        ("m = aten.matmul.default(n, n)\ny = aten.linear.default(m, weights['q.weight'])", "goes to aten.matmul"),
        ("y = aten.linear.default(x, n)", "goes to aten.linear.default"),
        ("y = aten.linear.default(n, weights['q.weight'], weights['q.bias'])\nz = aten.neg.default(weights['q.bias'])",
         "q.bias is read by aten.neg.default too"),
    ],
)  # fmt: skip
def test_a_norm_that_cannot_be_folded_is_left_as_it_was_with_the_reason(body, reason):
    inputs = "x: f32[8, 8]"
    norm = "n = slim.layer_norm.default(x, weights['norm.weight'], weights['norm.bias'], eps=1e-5)"
    results = ", ".join(line.split()[0] for line in body.splitlines() if line[0] in "yz")
    weights = {
        "norm.weight": gain(), "norm.bias": torch.randn(8), "q.weight": matrix(8, 8), "q.bias": matrix(8),
        "half": matrix(4, 4),
    }  # fmt: skip
    before = program(f"{norm}\n{body}\nreturn ({results},)", weights, inputs)
    before.clean()
    after, report = folded(before)
    assert report.matched == []
    ((site, said),) = report.skipped
    assert site == "norm.weight"
    assert reason in said
    assert str(after) == str(before)


def test_a_norm_that_widens_its_result_keeps_its_type():
    before = program(
        """
        n = slim.rms_norm.default(x, weights["norm.weight"], eps=1e-6)
        q = aten.linear.default(n, weights["q.weight"])
        return (q,)
        """,
        {"norm.weight": gain(), "q.weight": matrix(6, 8)},
        "x: bf16[B, S, 8]",
    )
    after, report = folded(before)
    assert report.matched
    assert moved(before, after) < 1e-6


def test_weights_on_disk_are_scaled_as_they_are_read_and_never_held():
    weights = {"norm.weight": Counted(gain()), "q.weight": Counted(matrix(6, 8)), "k.weight": Counted(matrix(4, 8))}
    before = program(
        """
        n = slim.rms_norm.default(x, weights["norm.weight"], eps=1e-6)
        q = aten.linear.default(n, weights["q.weight"])
        k = aten.linear.default(n, weights["k.weight"])
        return (q, k)
        """,
        weights,
    )
    Counted.reset()
    after, _ = folded(before)
    assert weights["q.weight"].reads == weights["k.weight"].reads == 0
    assert all(after.weights.is_deferred(name) for name in after.weights)
    assert moved(before, after) < 1e-6
    assert Counted.alive == 0
    assert Counted.most == 1


MODELS = {
    "llama": ({}, 5),
    "llama tied": ({"tie_word_embeddings": True}, 4),
    "qwen2": ({}, 3),
    "gemma": ({}, 2),
    "gpt2": ({}, 2),
    "mixtral": ({}, 3),
    "olmo2": ({}, 1),  # all its norms but the last stand behind the linears
    "cohere": ({"tie_word_embeddings": False}, 2),  # one norm a layer, read by attention and MLP
}
NARROW = ["llama", "gpt2", "gemma"]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in MODELS), *((name, torch.bfloat16) for name in NARROW)]
)
def test_models_keep_their_function(name, dtype):
    options, sites = MODELS[name]
    before = lifted(name.split()[0], dtype, **options)
    after, report = run_pipeline(before, [FoldNorms()], Context())
    (done,) = report.passes
    assert len(done.matched) == sites, done.skipped
    assert done.error <= (1e-5 if dtype == torch.float32 else 6e-2)
    assert after.nbytes < before.nbytes


def test_the_norm_before_a_tied_head_is_left_alone():
    _, report = folded(lifted("llama", tie_word_embeddings=True))
    ((site, reason),) = report.skipped
    assert site == "model.norm.weight"
    assert reason == "model.embed_tokens.weight is read by aten.embedding.default too"


def test_the_model_the_program_was_lifted_from_is_not_touched():
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    nn.init.normal_(block[0].weight)
    nn.init.normal_(block[0].bias)
    kept = {name: value.clone() for name, value in block.state_dict().items()}
    before = lift(block.eval(), torch.randn(2, 3, 8))
    after, _ = folded(before)
    assert moved(before, after) < 1e-6
    assert all(torch.equal(value, kept[name]) for name, value in block.state_dict().items())
