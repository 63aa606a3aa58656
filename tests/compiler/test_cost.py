"""Costs are read off the graph, and agree with counting by hand."""

import pytest
import sympy
import torch

from slim.compiler.cost import cost
from slim.compiler.lift import lift
from slim.compiler.passes_base import Context
from slim.compiler.patterns import read_pattern
from slim.compiler.patterns.pairs import pairs
from slim.compiler.patterns.picture import kept_by_head, sees
from slim.passes import Quantize
from slim.passes.sparsity.kinds import KINDS
from tests.programs import TINY, lifted, model, program

B, S, T = (sympy.Symbol(name, integer=True, positive=True) for name in "BST")
VOCAB, WIDTH, FFN, LAYERS, HEADS, KV, HEAD = 96, 32, 48, 2, 4, 2, 8


def test_a_linear_costs_two_operations_a_weight_a_row():
    made = cost(program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": torch.zeros(6, 8)}))
    assert made.flops == 2 * 6 * 8 * B * S
    assert made.weight_bytes == 6 * 8 * 4
    assert sympy.expand(made.bytes_moved) == 6 * 8 * 4 + (8 + 6) * 4 * B * S


def test_the_tiny_llama_is_the_one_described_here():
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert [TINY[name] for name in sizes] == [VOCAB, WIDTH, FFN, LAYERS, HEADS]


def test_a_llama_costs_what_counting_by_hand_says():
    made = cost(lifted("llama"))
    matrices = LAYERS * (2 * WIDTH * HEADS * HEAD + 2 * WIDTH * KV * HEAD + 3 * WIDTH * FFN) + WIDTH * VOCAB
    pairs = S * T - S * (S - 1) / 2
    assert sympy.expand(made.flops - 2 * B * S * matrices - LAYERS * 4 * B * HEADS * HEAD * pairs) == 0
    assert made.kv_bytes_per_token == LAYERS * 2 * KV * HEAD * 4
    assert sympy.expand(made.decode_flops - made.flops.subs(S, 1)) == 0
    assert made.prefill_flops.free_symbols == {B, S}


def test_weights_are_counted_once_and_tied_ones_too():
    apart, tied = cost(lifted("llama")), cost(lifted("llama", tie_word_embeddings=True))
    assert apart.parameters - tied.parameters == VOCAB * WIDTH
    held = sum(value.numel() for value in model("llama").parameters())
    assert apart.parameters in (held, held + HEAD // 2)  # with its rotary frequencies


def test_a_table_is_read_a_row_a_token_and_a_tied_one_whole():
    apart, tied = cost(lifted("llama")), cost(lifted("llama", tie_word_embeddings=True))
    one = {"B": 1, "S": 1, "T": 1}
    assert apart.bind(**one).bytes_moved - tied.bind(**one).bytes_moved == WIDTH * 4  # the row of the own table


def test_decoding_reads_each_expert_that_was_chosen_and_no_other():
    made = cost(lifted("mixtral"))
    (experts,) = {item.nbytes.coeff(sympy.Min(8, 2 * B * S)) for item in made.work if item.kind == "expert_linear"}
    assert experts == WIDTH * FFN * 4


@pytest.mark.parametrize(
    ("quantize", "part"), [(Quantize(), 0.45), (Quantize(group_size=16), 0.45), (Quantize("int4", group_size=16), 0.35)]
)
def test_integers_cut_what_decoding_moves_and_not_what_is_computed(quantize, part):
    before = lifted("llama")
    after = before.copy()
    quantize.run(after, Context())
    one = dict(B=1, S=1, T=1)
    assert cost(after).flops == cost(before).flops
    assert cost(after).parameters == cost(before).parameters
    assert cost(after).bind(**one).bytes_moved < part * cost(before).bind(**one).bytes_moved


def test_a_packed_weight_is_paid_for_as_it_is_held():
    before = program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": torch.randn(6, 8)})
    Quantize("int4", group_size=4).run(before, Context())
    made = cost(before)
    assert made.weight_bytes == 6 * 8 // 2 + 6 * 2 * 2
    assert sympy.expand(made.bytes_moved) == made.weight_bytes + (8 + 6) * 4 * B * S
    assert made.parameters == 6 * 8


def test_a_packed_table_is_read_a_row_a_token():
    lines = "y = aten.embedding.default(weights['w'], x)\nreturn (y,)"
    before = program(lines, {"w": torch.randn(100, 8)}, "x: i64[B, S]")
    Quantize("int4", group_size=4, embeddings=True).run(before, Context())
    assert cost(before).bind(B=2, S=3).bytes_moved == 6 * (8 // 2 + 2 * 2)


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ("causal=True", 10 * 10 - 45), ("causal=False", 100), ("causal=True, window=3", 27),
        ("causal=False, window=3", 44),
    ],
)  # fmt: skip
def test_attention_pays_for_the_pairs_it_may_see(options, pairs):
    lines = f"y = slim.attention.default(q, k, v, layer=0, scale=1.0, {options})\nreturn (y,)"
    inputs = "q: f32[B, 4, S, 8], k: f32[B, 2, S, 8], v: f32[B, 2, S, 16]"
    made = cost(program(lines, {}, inputs))
    assert made.bind(B=3, S=10, T=10).flops == 2 * 3 * 4 * (8 + 16) * pairs
    assert made.kv_bytes_per_token == 2 * (8 + 16) * 4


@pytest.mark.parametrize("queries", [128, 10, 1])
@pytest.mark.parametrize(
    ("text", "window"),
    [
        (None, None), (None, 20), (None, 500), ("window(3)", None), ("window(3)", 20), ("window(9) | columns(4)", None),
        ("0-1: dense; 2-3: window(5)", None), ("0-1: dense; 2-3: window(5)", 20),
    ],
)  # fmt: skip
def test_windows_and_columns_are_counted_exactly(text, window, queries):
    options = f"causal=True, window={window}, pattern={text!r}"
    assert counted(options, queries) == shown(text, queries, causal=True, window=window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"vertical_slash"}))
def test_patterns_are_counted_about_as_they_are(kind, causal):
    text = KINDS[kind].text(dict.fromkeys(("window", "stride", "block", "global_tokens"), 16))
    if causal or not any(term.looks_back for term in read_pattern(text).terms):
        found = counted(f"causal={causal}, pattern={text!r}", 128)
        assert found == pytest.approx(shown(text, 128, causal=causal), rel=0.25)


def test_a_prompt_that_votes_is_dense_where_it_is_short():
    options = "causal=True, pattern='vertical_slash(4, 4)'"
    assert (counted(options, 63), counted(options, 64)) == (63 * 128 - 63 * 31, 64 * 8)


def counted(options, queries, keys=128):
    lines = f"y = slim.attention.default(q, k, v, layer=0, scale=1.0, {options})\nreturn (y,)"
    made = program(lines, {}, "q: f32[B, 4, S, 8], k: f32[B, 2, S, 8], v: f32[B, 2, S, 8]")
    return float(pairs(made.attention_nodes()[0], sympy.Integer(queries), sympy.Integer(keys)))


def shown(text, queries, keys=128, **seen):
    """The mean over heads of what the mask of the newest queries keeps."""
    return float(kept_by_head(text or "dense", keys, 4, sees(keys, **seen))[:, -queries:].float().sum((1, 2)).mean())


@pytest.mark.parametrize("padding", [1, "same"])
def test_convolutions_are_counted(padding):
    made = lift(torch.nn.Conv2d(4, 6, 3, padding=padding, groups=2), torch.randn(2, 4, 5, 7))
    d1, d2 = (sympy.Symbol(name, integer=True, positive=True) for name in ("d1", "d2"))
    assert cost(made).flops == 2 * (4 // 2 * 3 * 3) * 6 * B * d1 * d2


def test_a_size_that_is_missing_is_asked_for():
    with pytest.raises(TypeError, match="B"):
        cost(lifted("llama")).bind(S=4)


def test_the_roofline_is_the_longer_of_moving_and_computing():
    made = cost(program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": torch.zeros(6, 8)}))
    sizes = {B: 1, S: 1}
    assert float(made.roofline(1.0, 1e30).subs(sizes)) == pytest.approx(made.bind(B=1, S=1).bytes_moved)
    assert float(made.roofline(1e30, 1.0).subs(sizes)) == pytest.approx(made.bind(B=1, S=1).flops)
