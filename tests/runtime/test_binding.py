"""A step over a KV cache is the same function as running everything: for every spelling, chunk and padding."""

import pytest
import torch

from slim import errors
from slim.codegen import select
from slim.compiler.program import Program
from slim.compiler.text import parse
from slim.compiler.verify import verify
from slim.compiler.weights import Weights
from slim.runtime.binding import bind_cache, cache_slots
from slim.runtime.cache import KVCache
from slim.runtime.steps import Step
from tests.compiled import difference, pair, prompt

EAGER = select("eager")
MODELS = ["llama", "gpt2", "mistral", "gemma2", "gpt_oss"]  # plain; learned positions; windows; soft caps; sinks


def step_of(program: Program, **options) -> Step:
    bound = bind_cache(program, **options)
    verify(bound, "bind_cache")
    return Step(bound, EAGER.lower(bound))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("chunks", [(9,), (4, 5), (1,) * 9, (6, 1, 1, 1)], ids=str)
def test_a_cached_call_equals_the_whole(name, masked, chunks):
    _, compiled = pair(name)
    tokens, mask = prompt(padded=masked)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    whole = compiled.run(inputs)[0]
    step = step_of(compiled.program, masked=masked)
    cache = KVCache(step.slots, 3, capacity=2)  # so that it has to grow
    start = 0
    for new in chunks:
        part = {key: value[:, start : start + new] for key, value in inputs.items()}
        logits = step(cache, part["attention_mask"].bool(), part)[0]
        assert difference(logits, whole[:, start : start + new], part["attention_mask"]) < 1e-5
        start += new


@pytest.mark.parametrize("name", MODELS)
def test_the_last_token_alone_is_the_last_of_all(name):
    _, compiled = pair(name)
    tokens, mask = prompt(padded=False)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1}
    step = step_of(compiled.program, masked=False, last_only=True)
    logits = step(KVCache(step.slots, 3), None, inputs)[0]
    assert logits.shape[1] == 1
    assert difference(logits[:, 0], compiled.run(inputs)[0][:, -1]) < 1e-5


def test_binding_leaves_the_program_as_it_was():
    program = pair("llama")[1].program
    text = str(program)
    bind_cache(program, last_only=True)
    assert str(program) == text


def test_a_bound_program_is_ir_that_reads_back():
    program = pair("llama")[1].program
    bound = bind_cache(program)
    assert str(parse(str(bound), bound.weights, bound.facts)) == str(bound)


def test_it_takes_no_attention_mask_where_only_attention_read_it():
    bound = bind_cache(pair("llama")[1].program)
    names = [value.name for value in bound.inputs]
    assert names == ["input_ids", "position_ids", "key_mask", "k_cache_0", "v_cache_0", "k_cache_1", "v_cache_1"]


def test_a_step_that_raises_leaves_the_cache_as_it_was():
    _, compiled = pair("llama")
    step = step_of(compiled.program)
    cache = KVCache(step.slots, 1)
    bad = torch.tensor([[10**6]])
    with pytest.raises(IndexError):
        step(cache, None, {"input_ids": bad, "position_ids": bad})
    assert cache.length == 0


# -- small programs ----------------------------------------------------------------------------------------------------

TEXT = """# slim IR 1: test
def forward(weights, input_ids: i64[B, S], attention_mask: i64[B, S]):
    b: int = aten.sym_size.int(attention_mask, 0)
    s: int = aten.sym_size.int(attention_mask, 1)
    seen: bool[B, S] = aten._to_copy.default(attention_mask, dtype=torch.bool)
    hidden: bool[B, S] = aten.logical_not.default(seen)
    x: f32[B, S, 8] = aten.embedding.default(weights["e"], input_ids)
    h: f32[B, S, 2, 4] = aten.reshape.default(x, [b, s, 2, 4])
    q: f32[B, 2, S, 4] = aten.transpose.int(h, 1, 2)
    bias: f32[2, 1, 1] = aten.reshape.default(weights["bias"], [2, 1, 1])
    {attention}
    out: f32[B, S, 2, 4] = aten.transpose.int(a, 1, 2)
    y: f32[B, S, 8] = aten.reshape.default(out, [b, s, 8])
    return (y,)
"""
PLAIN = "a: f32[B, 2, S, 4] = slim.attention.default(q, q, q, seen, layer=0, scale=1.0)"


def small(attention: str) -> Program:
    program = parse(TEXT.format(attention=attention), Weights({"e": torch.randn(20, 8), "bias": torch.randn(2)}))
    program.clean()
    return program


def test_a_program_by_hand_is_bound():
    assert [slot.heads for slot in cache_slots(bind_cache(small(PLAIN)))] == [2]


def test_layers_that_share_keys_and_values_share_a_slot():
    second = "a: f32[B, 2, S, 4] = slim.attention.default(first, q, q, seen, layer=1, scale=1.0)"
    bound = bind_cache(small(PLAIN.replace("a:", "first:") + "\n    " + second))
    assert len(cache_slots(bound)) == 1
    assert len(bound.attention_nodes()) == 2


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (PLAIN.replace("scale", "causal=False, scale"), "looks at later tokens"),
        (PLAIN.replace("seen", "seen, bias"), "adds a tensor to its scores"),
        (PLAIN.replace("seen", "hidden"), "masks keys by more than attention_mask"),
        ("a: f32[B, 2, S, 4] = aten.relu.default(q)", "no attention that slim recognises"),
        (
            "m: f32[B, 2, S, 4] = aten.cumsum.default(q, 2)\n    " + PLAIN.replace("(q, q", "(m, m"),
            "aten.cumsum looks at more than one token",
        ),
    ],
)
def test_what_cannot_be_cached_is_refused_with_the_reason(attention, reason):
    with pytest.raises(errors.CacheUnsupported, match=reason):
        bind_cache(small(attention))
