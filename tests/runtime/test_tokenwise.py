"""Which operations treat each token alone: asked of the operations, one small Program each."""

import pytest
import torch

from slim import errors
from slim.compiler.program import Program
from slim.compiler.text import parse
from slim.compiler.weights import Weights
from slim.runtime.tokenwise import check_tokenwise

ALONE = {
    "an elementwise chain": "y: f32[B, S, 8] = aten.silu.default(x)",
    "a norm over channels": "y: f32[B, S, 8] = slim.rms_norm.default(x, None, eps=1e-5)",
    "a softmax over channels": "y: f32[B, S, 8] = aten.softmax.int(x, -1)",
    "a mean over channels": "y: f32[B, S, 1] = aten.mean.dim(x, [-1], True)",
    "tokens and rows together": "y: f32[B*S, 8] = aten.reshape.default(x, [-1, 8])",
    "heads": "y: f32[B, S, 2, 4] = aten.reshape.default(x, [b, s, 2, 4])",
    "a transposition": "y: f32[B, 8, S] = aten.transpose.int(x, 1, 2)",
    "a top-k over channels": "y: tuple[f32[B, S, 2], i64[B, S, 2]] = aten.topk.default(x, 2)",
    "a table of positions": "y: i64[B, S] = aten.add.Tensor(position_ids, 2)",
    "ones, one a token": "y: f32[S] = aten.ones.default([s])",
    "a whole slice": "y: f32[B, S, 8] = aten.slice.Tensor(x, 1, 0, 9223372036854775807)",
    "rows for experts": "y: f32[3*B*S, 8] = aten.repeat_interleave.self_int(r, 3, 0)",
}
MIXED = {
    "a running sum": ("y: f32[B, S, 8] = aten.cumsum.default(x, 1)", "more than one token"),
    "a mean over tokens": ("y: f32[B, 8] = aten.mean.dim(x, [1])", "more than one token"),
    "a softmax over tokens": ("y: f32[B, S, 8] = aten.softmax.int(x, 1)", "more than one token"),
    "positions made up": ("y: i64[S] = aten.arange.default(s)", "more than one token"),
    "the last token": ("y: f32[B, 8] = aten.select.int(x, 1, -1)", "more than one token"),
    "tokens shifted": ("y: f32[B, S, 8] = aten.roll.default(x, [1], [1])", "more than one token"),
    "a token dropped": ("y: f32[B, S - 1, 8] = aten.slice.Tensor(x, 1, 1, 9223372036854775807)", "number of tokens"),
    "pairs of tokens": ("y: f32[B, S, S] = aten.bmm.default(x, t)", "pairs every token"),
    "the largest position": ("y: i64[()] = aten.max.default(position_ids)", "more than one token"),
    "the number of tokens": ("y: f32[B, S, 8] = aten.mul.Tensor(x, s)", "more than one token"),
}
TEXT = """# slim IR 1: test
def forward(weights, input_ids: i64[B, S], position_ids: i64[B, S]):
    b: int = aten.sym_size.int(input_ids, 0)
    s: int = aten.sym_size.int(input_ids, 1)
    x: f32[B, S, 8] = aten.embedding.default(weights["e"], input_ids)
    t: f32[B, 8, S] = aten.transpose.int(x, 1, 2)
    r: f32[B*S, 8] = aten.reshape.default(x, [-1, 8])
    {line}
    return (y,)
"""


def program(line: str) -> Program:
    return parse(TEXT.format(line=line), Weights({"e": torch.randn(20, 8)}))


@pytest.mark.parametrize("line", ALONE.values(), ids=ALONE)
def test_it_treats_each_token_alone(line):
    check_tokenwise(program(line))


@pytest.mark.parametrize(("line", "reason"), MIXED.values(), ids=MIXED)
def test_it_is_refused_with_its_name_and_the_reason(line, reason):
    with pytest.raises(errors.CacheUnsupported, match=reason) as caught:
        check_tokenwise(program(line))
    assert caught.value.where == "y"
