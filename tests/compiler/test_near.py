"""Where a rule all but fits, the reason is told; and what all but fits is left as it is."""

import math

import pytest
import torch
from torch import nn

from slim.compiler.lift.export import export
from slim.compiler.near import Exactly, LastAxis, Middle, Number, look_again, near_misses
from slim.compiler.program import Facts
from slim.compiler.raising import raise_program
from slim.compiler.rules import Count, Either, Near, Rule, call
from tests.programs import program

aten, slim = torch.ops.aten, torch.ops.slim


class Spellings(nn.Module):
    """Returns what each function makes of the inputs."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def forward(self, *inputs):
        return tuple(function(*inputs) for function in self.functions)


def told(spellings, *inputs):
    """For each spelling the reasons of near misses at the node that computes it, or else its operation."""
    module = Spellings([function for function, _ in spellings])
    made = export(module, inputs, {}, {"inputs": tuple({} for _ in inputs)}, Facts(kind="module"))  # of fixed sizes
    made.raised = raise_program(made)
    for found, wanted in zip(made.run(*inputs), module(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    misses = [miss.partition(": ") for count in made.raised.values() for miss in count.misses]
    for node in made.graph.output_node().args[0]:
        reasons = [reason for site, _, reason in misses if site.startswith(f"{node.name} (")]
        yield "; ".join(reasons) or node.target


def check(spellings, *inputs):
    for found, (_, wanted) in zip(told(spellings, *inputs), spellings, strict=True):
        assert found == wanted


def mean(x, axis=-1):
    return x.mean(axis, keepdim=True)


def centred(x, axis=-1):
    return x - mean(x, axis)


def test_norms_say_which_axis_and_where_their_eps_is():
    check([
        (lambda x: x * torch.rsqrt(mean(x * x, 2) + 1e-5), slim.rms_norm.default),
        (lambda x: x * torch.rsqrt(mean(x * x, 1) + 1e-5), "its mean goes over dimension 1, not over the last"),
        (lambda x: x * torch.rsqrt(mean(x * x, (1, 2)) + 1e-5),
         "its mean goes over dimensions [1, 2], not over the last"),
        (lambda x: x / (mean(x * x).sqrt() + 1e-5), "its eps is added to the root, not to the mean square"),
        (lambda x: x * torch.rsqrt(mean(x * x).clamp(min=1e-5)), "its eps bounds the mean square, and is not added"),
        (lambda x: x * torch.rsqrt(mean(x * x)), "it has no eps beside the mean square"),
        (lambda x: centred(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5), slim.layer_norm.default),
        (lambda x: centred(x) * torch.rsqrt(mean(centred(x).square()) + 1e-4), slim.layer_norm.default),
        (lambda x: centred(x, 1) * torch.rsqrt(mean(centred(x, 1).pow(2), 1) + 1e-5),
         "its mean goes over dimension 1, not over the last"),
        (lambda x: centred(x) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5),
         "its variance divides by n - 1, not by n"),
        (lambda x: centred(x) / (x.std(-1, keepdim=True) + 1e-5),
         "its variance divides by n - 1, not by n and its eps is added to the root, not to the variance"),
    ], torch.randn(2, 7, 16))  # fmt: skip


ROOT = math.sqrt(2 / math.pi)


def tanh_gelu(x, cubic=0.044715, root=ROOT, half=0.5):
    return half * x * (1 + torch.tanh(root * (x + cubic * x**3)))


def test_gelus_say_which_of_their_numbers_is_another():
    check([
        (tanh_gelu, aten.gelu.default),
        (lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), aten.gelu.default),
        (lambda x: x * (1 + torch.erf(x * math.sqrt(0.5))) / 2, aten.gelu.default),
        (lambda x: tanh_gelu(x, cubic=0.04), "the factor of its x^3 is 0.04, not 0.044715"),
        (lambda x: tanh_gelu(x, root=0.8, half=0.25),
         "its factor is 0.25, not 0.5 and the factor in its tanh is 0.8, not 0.797885"),
        (lambda x: 0.5 * x * (1 + torch.erf(0.7 * x)), "the factor in its erf is 0.7, not 0.707107"),
        (lambda x: x * torch.sigmoid(1.702 * x), "its sigmoid is of 1.702 x"),
        (lambda x: x * torch.sigmoid(x), aten.silu.default),
        (lambda x: x * torch.sigmoid(x + 1), aten.mul.Tensor),
    ], torch.randn(2, 7, 16))  # fmt: skip


def twice(table, axis=1):
    return torch.cat([table, table], -1).unsqueeze(axis)


def each_twice(table):
    return table.repeat_interleave(2, -1).unsqueeze(1)


def turn(x, cut=8):
    return torch.cat([-x[..., cut:], x[..., :cut]], -1)


def turn_back(x):
    return torch.cat([x[..., 8:], -x[..., :8]], -1)


def turn_pairs(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def turn_along_heads(x):
    return torch.cat([-x[:, 2:], x[:, :2]], 1)


def late(x, c, s):
    y = x.transpose(1, 2)
    return y * twice(c, 2) + turn(y) * twice(s, 2)


def halves(x, c, s, sign=1):
    a, b, c, s = x[..., :8], x[..., 8:], c.unsqueeze(1), s.unsqueeze(1)
    return torch.cat([a * c - b * s, b * c + a * s] if sign > 0 else [a * c + b * s, b * c - a * s], -1)


def test_rotations_say_how_they_turn_otherwise():
    check([
        (lambda x, c, s: x * twice(c) + turn(x) * twice(s), slim.rope.default),
        (lambda x, c, s: x * each_twice(c) + turn_pairs(x) * each_twice(s), slim.rope.default),
        (halves, slim.rope.default),
        (lambda x, c, s: x * twice(c) + turn(x, 4) * twice(s), "the cut of its turn is at 4, not in the middle of 16"),
        (lambda x, c, s: x * twice(c) + turn_along_heads(x) * twice(s),
         "its turn goes over dimension 1, not over the last and the cut of its turn is at 2, not in the middle of 16"),
        (lambda x, c, s: x * twice(c) - turn(x) * twice(s),
         "it turns the other way: the product with the sine is taken off"),
        (lambda x, c, s: x * twice(c) + turn_back(x) * twice(s),
         "it turns the other way: the first of each two is negated, not the second"),
        (lambda x, c, s: halves(x, c, s, -1),
         "it turns the other way: the sine is added to the first half and taken off the second"),
        (lambda x, c, s: x * each_twice(c) + turn(x) * each_twice(s),
         "it turns halves by a table that is laid out for pairs"),
        (lambda x, c, s: x * twice(c) + turn_pairs(x) * twice(s),
         "it turns pairs by a table that is laid out for halves"),
        (lambda x, c, s: x * torch.cat([c, s], -1).unsqueeze(1) + turn(x) * torch.cat([s, c], -1).unsqueeze(1),
         "its table is not one number for both of two that are turned, laid out for halves"),
        (late, "the axis at which its table is widened is 2, not 1"),
    ], torch.randn(2, 4, 7, 16), torch.randn(2, 7, 8), torch.randn(2, 7, 8))  # fmt: skip


def scores(x):
    return x @ x.transpose(-1, -2) * 0.37


def causal(x):
    return torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()


def written_out(x):
    e = torch.exp(scores(x))
    return e / e.sum(-1, keepdim=True)


def soft(x, axis=-1):
    return torch.softmax(x, axis)


def test_attention_says_what_is_unusual_between_queries_and_values():
    hidden = "where a key is hidden, which softmax sees unless it is -1000 or less"
    found = list(told(spellings := [
        (lambda x, t: soft(scores(x)) @ x, slim.attention.default),
        (lambda x, t: soft(scores(x).masked_fill(~causal(x), -1e9)) @ x, slim.attention.default),
        (lambda x, t: soft(scores(x), -2) @ x, "its softmax is not over the keys"),
        (lambda x, t: soft(scores(x) * t) @ x, "its scores are scaled by inputs_1, which is no number"),
        (lambda x, t: soft(scores(x).masked_fill(~causal(x), -10.0)) @ x, f"its mask puts -10 {hidden}"),
        (lambda x, t: soft(torch.where(causal(x), scores(x), -5.0)) @ x, f"its mask puts -5 {hidden}"),
        (lambda x, t: soft(torch.relu(scores(x))) @ x, "its scores pass through aten.relu.default"),
        (lambda x, t: (soft(scores(x)) * t) @ x,
         "its probabilities pass through aten.mul.Tensor on the way to the values"),
        (lambda x, t: written_out(x) @ x, "its softmax is written out"),
    ], torch.randn(2, 4, 7, 16), torch.rand(4, 1, 1)))  # fmt: skip
    assert found == [wanted for _, wanted in spellings]


# -- the parts ---------------------------------------------------------------------------------------------------------

NEG = call(aten.neg.default, args=("x",))


def looked(lines, *rules):
    counts = {}
    look_again(program(lines, {}), rules, counts)
    return {name: count.misses for name, count in counts.items()}


def test_of_several_rules_the_one_that_misses_least_is_named():
    far = Rule("far", call(aten.add.Tensor, args=(Either((NEG,)), Number(1.0, "a")), alpha=Number(2, "b")), print)
    near = Rule("near", call(aten.add.Tensor, args=("x", Number(1.0, "a"))), print)
    assert looked("y = aten.neg.default(x)\nz = aten.add.Tensor(y, 3.0)\nreturn (z,)", far, near) == {
        "near": ["z: a is 3, not 1"]
    }


def test_nothing_is_told_of_what_fits_or_has_another_shape():
    rule = Rule("r", call(aten.add.Tensor, args=(NEG, Number(1.0, "a"))), print, near=(Near(NEG, "it is alone"),))
    assert looked("y = aten.neg.default(x)\nz = aten.add.Tensor(y, 1.0)\nreturn (z,)", rule) == {
        "r": ["y: it is alone"]
    }
    assert looked("z = aten.add.Tensor(x, 2.0)\nreturn (z,)", rule) == {}


@pytest.mark.parametrize(
    ("condition", "right", "wrong", "reason"),
    [
        (Number(0.5, "it"), 0.5, 2, "it is 2, not 0.5"),
        (Exactly(False, "no"), False, 0, "no"),
        (LastAxis("x", "it"), 2, [0, 1], "it goes over dimensions [0, 1], not over the last"),
        (LastAxis("x", "it"), [-1], [], "it goes over all dimensions, not over the last"),
        (Middle("x", "it"), 4, 3, "it is at 3, not in the middle of 8"),
    ],
)
def test_a_condition_holds_of_one_value_and_has_a_reason_for_another(condition, right, wrong, reason):
    (x,) = program("y = aten.neg.default(x)\nreturn (y,)", {}).graph.find_nodes(op="placeholder")
    assert condition.unmet(right, {"x": x}) is None
    assert condition.unmet(wrong, {"x": x}) == reason
    assert list(condition.match(right, {"x": x})) == [{"x": x}]
    assert list(condition.match(wrong, {"x": x})) == []


def test_every_reason_is_told_with_the_places_that_share_it():
    count = Count(9, 0, [f"n{i} (layers.{i} model.py:3): it is odd" for i in range(5)] + ["m: it is even"])
    where = "n0 (layers.0 model.py:3), n1 (layers.1 model.py:3), n2 (layers.2 model.py:3) and 2 more"
    assert list(near_misses({"a = b": count, "c = d": Count()})) == [
        f"near miss of a = b, at {where}: it is odd",
        "near miss of a = b, at m: it is even",
    ]
