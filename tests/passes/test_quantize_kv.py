"""QuantizeKV: what it writes into the graph, what a cache then holds, and that both are one function."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slim
from slim import KVCacheConfig, errors
from slim.codegen.build import missing
from slim.compiler.dialect.kv import held, hold
from slim.compiler.rounded_kv import pair_bits, rounded
from slim.compiler.rules import argument
from slim.passes import PASSES, QuantizeKV
from slim.runtime.binding import cache_slots
from tests.compiled import difference, pair, prompt
from tests.programs import lifted, model

CALIBRATION = [torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(1))]
KINDS = [QuantizeKV("int8"), QuantizeKV("int4"), QuantizeKV("int4", keys="int8"), QuantizeKV("int8", keys="int4")]
needs_cpp = pytest.mark.skipif(missing() is not None, reason="no C++ compiler")


def small_prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows, two of them padded, of tokens that the tiny models know."""
    tokens, mask = prompt()
    return tokens % 96, mask


def quantised(architecture: str, passes: object, target: str = "eager", **options: object) -> slim.CompiledModel:
    return slim.compile(model(architecture), passes, target=target, calibration=CALIBRATION, **options)


def in_steps(compiled: slim.CompiledModel, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits of a prefill of some tokens and then of one at a time, over a cache that has to grow."""
    first = compiled(tokens[:, :4], attention_mask=mask[:, :4], use_cache=True)
    logits = [first.logits]
    for end in range(5, tokens.shape[1] + 1):
        past = first.past_key_values
        logits.append(compiled(tokens[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=past).logits)
    return torch.cat(logits, 1)


# -- the number format -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([8, 4]), st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([1e-30, 1.0, 1e30]))
def test_what_is_held_is_what_the_nodes_of_the_graph_say(bits, half, seed, size):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 5, 2 * half, generator=generator) * size
    x[0, 0, 0] = 0.0
    width, kind = (2 * half, torch.int8) if bits == 8 else (half, torch.uint8)
    cache, scale = torch.zeros(2, 3, 9, width, dtype=kind), torch.zeros(2, 3, 9)
    hold(x, cache, scale, 2)
    step = torch.ops.slim.token_scale(x, bits=bits)
    low, high = (-128, 127) if bits == 8 else (-8, 7)
    numbers = torch.ops.slim.quantize(x, step, axis=2, low=low, high=high)
    assert torch.equal(held(cache, scale, 2, 7, x.dtype), torch.ops.slim.dequantize(numbers, step, axis=2))
    assert not cache[:, :, :2].any()
    assert not scale[:, :, 7:].any()


def test_four_bits_send_the_largest_number_to_minus_eight_and_lose_a_step_at_most():
    x = torch.randn(64, 1, 7, 16, generator=torch.Generator().manual_seed(0))
    step = torch.ops.slim.token_scale(x, bits=4)
    numbers = torch.ops.slim.quantize(x, step, axis=2, low=-8, high=7)
    largest = x.abs().argmax(-1, keepdim=True)
    assert bool((numbers.gather(-1, largest) == -8).all())
    assert bool(((numbers * step[..., None] - x).abs() <= 1.0001 * step.abs()[..., None]).all())


# -- the pass ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *(("llama", kind) for kind in KINDS),
        *((name, KINDS[i % len(KINDS)]) for i, name in enumerate(("qwen2", "gemma2", "mistral", "gpt2", "gpt_oss"))),
    ],
    ids=repr,
)
def test_a_cached_decode_is_the_whole_quantised_program(architecture, kind):
    original, plain = pair(architecture)
    compiled = slim.compile(original, kind, target="eager", calibration=CALIBRATION)
    tokens, mask = prompt()
    whole = compiled(tokens, attention_mask=mask).logits
    assert difference(in_steps(compiled, tokens, mask), whole, mask) < 1e-5
    assert 1e-5 < difference(whole, plain(tokens, attention_mask=mask).logits, mask) < 1.0


@needs_cpp
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_generated_code_is_the_program_with_a_cache_and_without(kind):
    eager, compiled = quantised("llama", kind), quantised("llama", kind, "cpu")
    tokens, mask = small_prompt()
    whole = eager(tokens, attention_mask=mask).logits
    assert difference(compiled(tokens, attention_mask=mask).logits, whole, mask) < 1e-4
    assert difference(in_steps(compiled, tokens, mask), whole, mask) < 1e-4
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(compiled.generate(tokens, **options), eager.generate(tokens, **options))
    assert not any(form.foreign for form in compiled.report.forms.values())


def test_the_mean_of_the_keys_is_taken_off_and_changes_nothing_by_itself():
    compiled = quantised("llama", QuantizeKV("int8"))
    program = compiled.program.copy()
    names = [name for name in program.weights if name.startswith("key_offset")]
    assert names == ["key_offset_0", "key_offset_1"]
    for node in program.attention_nodes():  # without the rounding, keys less their mean are all that is left
        for place, name in ((1, "k"), (2, "v")):
            part = rounded(argument(node, name))
            node.update_arg(place, part.x)
    program.clean()
    tokens, mask = small_prompt()
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    given = [inputs[value.name] for value in program.inputs]
    before = lifted("llama").run(*given)[0]
    assert difference(program.run(*given)[0], before, mask) < 1e-5


def test_keys_keep_their_mean_where_attention_would_see_it_go():
    for architecture in ("gemma2", "gpt_oss"):  # soft caps; sinks
        original, _ = pair(architecture)
        tokens = torch.randint(3, 90, (4, 16))
        compiled = slim.compile(original, QuantizeKV("int8"), target="eager", calibration=[tokens])
        assert not [name for name in compiled.program.weights if name.startswith("key_offset")]


def test_layers_that_int4_keys_would_hurt_get_int8_and_the_report_says_so():
    original = model("llama", torch.float32, rope_theta=500.0)
    with torch.no_grad():
        for name in ("q", "k"):  # sharp attention: large scores, which four bits blur
            getattr(original.model.layers[1].self_attn, f"{name}_proj").weight.mul_(4.0)
    try:
        compiled = slim.compile(original, QuantizeKV("int4"), target="eager", calibration=CALIBRATION)
    finally:
        with torch.no_grad():
            for name in ("q", "k"):
                getattr(original.model.layers[1].self_attn, f"{name}_proj").weight.div_(4.0)
    nodes = compiled.program.attention_nodes()
    assert [pair_bits(node)[1] for node in nodes] == [4, 4]
    assert pair_bits(nodes[1])[0] == 8
    assert any("layer 1: keys are int8" in note for note in compiled.report.passes[0].notes)


def test_int4_without_anything_to_measure_on_is_refused_unless_keys_are_settled():
    with pytest.raises(errors.NeedsCalibration):
        slim.compile(model("llama"), QuantizeKV("int4"), target="eager")
    assert slim.compile(model("llama"), QuantizeKV("int4", keys="int4"), target="eager").slots[0].key_bits == 4


def test_attention_that_looks_ahead_is_left_alone_and_an_encoder_has_no_other():
    from benchmarks import zoo

    with pytest.raises(errors.PassMatchedNothing, match="later tokens"):
        slim.compile(zoo.build_encoder("bert"), QuantizeKV("int8"), target="eager")


def test_the_pass_reads_back_from_its_text():
    assert PASSES["quantize_kv"] is QuantizeKV
    assert slim.passes.parse_pipeline('quantize_kv("int4", keys="int8")') == (QuantizeKV("int4", keys="int8"),)
    with pytest.raises(errors.BadPassOption):
        QuantizeKV("int2")


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "share"), [("int8", 12), ("int4", 8)])
def test_cost_and_nbytes_count_numbers_and_scales(dtype, share):
    for options in (
        dict(passes=QuantizeKV(dtype, keys=dtype)),
        dict(passes=[], kv_cache=KVCacheConfig(dtype=dtype)),
    ):
        compiled = slim.compile(model("llama"), target="eager", **options)
        cache = compiled.new_cache(2, 10)
        a_token = 2 * 2 * 2 * share  # layers, keys and values, heads; of width 8, with a scale of 4 bytes
        assert compiled.cost().kv_bytes_per_token == a_token
        assert cache.nbytes == 2 * 10 * a_token
        assert sum(slot.bytes_per_token for slot in cache.slots) == a_token


def test_growing_keeps_numbers_and_scales():
    cache = slim.compile(model("llama"), QuantizeKV("int4", keys="int8"), target="eager").new_cache(1, 3)
    for tensor in cache.tensors:
        tensor.fill_(5)
    cache.advance(3)
    cache.reserve(2)
    assert cache.capacity >= 5
    assert all(bool((tensor[:, :, :3] == 5).all()) for tensor in cache.tensors)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_cache_that_rounds_is_the_pass_without_calibration(dtype):
    by_cache = slim.compile(model("llama"), target="eager", kv_cache=KVCacheConfig(dtype=dtype))
    by_pass = slim.compile(model("llama"), QuantizeKV(dtype, keys=dtype), target="eager")
    tokens, mask = small_prompt()
    assert torch.equal(in_steps(by_cache, tokens, mask), in_steps(by_pass, tokens, mask))
    assert by_cache.slots == by_pass.slots


def test_a_cache_of_another_format_than_the_pass_contradicts_it_and_the_same_does_not():
    both = dict(target="eager", kv_cache=KVCacheConfig(dtype="int8"))
    assert slim.compile(model("llama"), QuantizeKV("int8"), **both).slots[0].value_bits == 8
    with pytest.raises(errors.ContradictoryOptions, match="int4"):
        slim.compile(model("llama"), QuantizeKV("int4", keys="int4"), **both)


def test_heads_of_odd_width_take_int8_in_the_pass_and_are_refused_by_the_cache():
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = x.unflatten(-1, (2, 5)).transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)

    compiled = slim.compile(
        Odd(), QuantizeKV("int4", keys="int4"), example_inputs=(torch.randn(2, 6, 10),), target="eager"
    )
    assert pair_bits(compiled.program.attention_nodes()[0]) == (8, 8)
    assert "even width" in compiled.report.passes[0].notes[0]
    with pytest.raises(errors.CacheUnsupported, match="two numbers in a byte"):
        cache_slots(slim.compile(Odd(), example_inputs=(torch.randn(2, 6, 10),), target="eager").program, 4)


def test_an_artifact_keeps_what_is_rounded(tmp_path):
    compiled = quantised("llama", QuantizeKV("int4"))
    compiled.save(tmp_path / "artifact")
    loaded = slim.load(tmp_path / "artifact", target="eager")
    tokens, mask = small_prompt()
    assert torch.equal(in_steps(loaded, tokens, mask), in_steps(compiled, tokens, mask))
    assert loaded.slots == compiled.slots
    assert loaded.cost().kv_bytes_per_token == compiled.cost().kv_bytes_per_token
