"""Caches in pages and rings: the same tokens as one tensor a layer gives, for rows of lengths of their own."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import slim
from slim import KVCacheConfig, errors
from slim.codegen import build
from slim.compiler.lift import lift
from slim.runtime.compiled import CompiledModel
from slim.runtime.paged import PagedKVCache
from tests.compiled import difference, pair, prompt

TARGETS = ["eager", pytest.param("cpu", marks=pytest.mark.skipif(build.missing() is not None, reason="no C++ here"))]
PAGED = KVCacheConfig(layout="paged")


def compiled(name: str, target: str, config: KVCacheConfig) -> CompiledModel:
    return CompiledModel(pair(name)[1].program.copy(), target, kv_cache=config)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_generate_writes_the_same_in_pages(name: str, target: str) -> None:
    tokens, mask = prompt()
    options = dict(attention_mask=mask, max_new_tokens=70, do_sample=False, eos_token_id=None, pad_token_id=0)
    wanted = pair(name)[1].generate(tokens, **options)
    assert torch.equal(compiled(name, target, PAGED).generate(tokens, **options), wanted)


@pytest.mark.parametrize("rows", [[[5, 6, 7], [9]], [[9], [5, 6, 7]]])
def test_a_row_of_one_token_goes_beside_longer_ones(rows: list[list[int]]) -> None:
    tokens = torch.tensor([[0] * (3 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (3 - len(row)) + [1] * len(row) for row in rows])
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = compiled("llama", "eager", PAGED).generate(tokens, **options)
    assert torch.equal(got, pair("llama")[1].generate(tokens, **options))


@pytest.mark.parametrize("target", TARGETS)
def test_calls_with_padding_and_a_growing_cache_return_the_same_logits(target: str) -> None:
    tokens, mask = prompt()
    whole = pair("llama")[1](tokens, attention_mask=mask).logits
    model = compiled("llama", target, PAGED)
    first = model(tokens[:, :5], attention_mask=mask[:, :5], use_cache=True)
    assert isinstance(first.past_key_values, PagedKVCache)
    rest = model(tokens[:, 5:], attention_mask=mask, past_key_values=first.past_key_values).logits
    assert difference(torch.cat([first.logits, rest], 1), whole, mask) < 1e-5
    assert [row.length for row in first.past_key_values.rows] == mask.sum(1).tolist()


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_pages_hold_what_one_tensor_a_layer_holds(bits: str) -> None:
    tokens, mask = prompt()
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    wanted = compiled("llama", "eager", KVCacheConfig(dtype=bits)).generate(tokens, **options)  # type: ignore[arg-type]
    config = KVCacheConfig(layout="paged", dtype=bits)  # type: ignore[arg-type]
    assert torch.equal(compiled("llama", "auto", config).generate(tokens, **options), wanted)


KINDS = {"contiguous": KVCacheConfig(), "int8": KVCacheConfig(dtype="int8"), "paged": PAGED}


def test_beams_that_fork_hold_twice_only_what_differs() -> None:
    model = compiled("llama", "eager", PAGED)
    cache = model.new_cache(3)
    model(prompt(padded=False)[0], past_key_values=cache)
    cache.fork([1, 1, 0])
    assert cache.stats().shared == 1
    model(torch.tensor([[5], [6], [7]]), past_key_values=cache)
    assert cache.stats().copies == 1


@pytest.mark.parametrize("kind", KINDS)
def test_forked_rows_go_on_as_their_originals_would(kind: str) -> None:
    model = compiled("llama", "eager", KINDS[kind])
    tokens, _ = prompt(padded=False)
    cache = model.new_cache(3)
    model(tokens, past_key_values=cache)
    order, step = [1, 1, 0, 2], torch.tensor([[5], [6], [7], [8]])
    cache.fork(order)
    got = model(step, past_key_values=cache).logits[:, 0]
    fresh = model.new_cache(4)
    model(tokens[order], past_key_values=fresh)
    assert difference(got, model(step, past_key_values=fresh).logits[:, 0]) < 1e-5
    assert cache.batch == 4


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_tried_is_rolled_back(kind: str) -> None:
    model = compiled("llama", "eager", KINDS[kind])
    tokens, mask = prompt()
    cache, fresh = model.new_cache(3), model.new_cache(3)
    for each in (cache, fresh):
        model(tokens, attention_mask=mask, past_key_values=each)
    model(torch.full((3, 70), 5), past_key_values=cache)
    cache.truncate(tokens.shape[1])
    step = torch.tensor([[5], [6], [7]])
    again, once = (model(step, past_key_values=each).logits for each in (cache, fresh))
    assert difference(again, once) < 1e-5
    assert cache.get_seq_length() == fresh.get_seq_length() == tokens.shape[1] + 1


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_forked_are_apart_after_a_reset(kind: str) -> None:
    model = compiled("llama", "eager", KINDS[kind])
    first, then = torch.randint(3, 90, (2, 2, 200), generator=torch.Generator().manual_seed(0))
    cache, fresh = model.new_cache(2), model.new_cache(2)
    model(first, past_key_values=cache)
    cache.fork([0, 0])
    cache.reset()
    for each in (cache, fresh):
        model(then[:, :150], past_key_values=each)
    got, wanted = (model(then[:, 150:], past_key_values=each).logits for each in (cache, fresh))
    assert difference(got, wanted) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_lengths_that_there_are_not_are_refused(kind: str) -> None:
    cache = compiled("llama", "eager", KINDS[kind]).new_cache(2)
    for order in ([0, 2], [-1], [True]):
        with pytest.raises(errors.BadInput, match="is no row; there are 2"):
            cache.fork(order)
    for length in (-1, 2.5, None):
        with pytest.raises(errors.BadInput, match="is no number of tokens"):
            cache.truncate(length)  # type: ignore[arg-type]


# -- rings -------------------------------------------------------------------------------------------------------------


def ringed(window: int, sinks: int, layers: int = 2, target: str = "auto") -> tuple[LlamaForCausalLM, CompiledModel]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return model, CompiledModel(lift(model), target, kv_cache=KVCacheConfig(window=window, sinks=sinks))


TEXT = torch.randint(3, 96, (2, 900), generator=torch.Generator().manual_seed(1))  # more than goes in at once


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("window", "sinks"), [(32, 4), (100, 0), (64, 65)])
def test_a_ring_reads_sinks_and_window_as_if_they_were_the_whole_text(window: int, sinks: int, target: str) -> None:
    model, ring = ringed(window, sinks, layers=1, target=target)  # with one layer nothing else reaches the last token
    cache = ring.new_cache(2)
    ring(TEXT, past_key_values=cache)
    for step in range(3):
        token = torch.full((2, 1), 5 + step)
        got = ring(token, past_key_values=cache).logits[:, -1]
        seen = torch.cat([TEXT, *(torch.full((2, 1), 5 + past) for past in range(step + 1))], 1)
        left = torch.cat([seen[:, :sinks], seen[:, -window:]], 1)
        assert difference(got, model(left).logits[:, -1]) < 1e-4
    assert cache.stats().evicted > 0


@pytest.mark.parametrize(("window", "sinks"), [(32, 4), (64, 65)])
def test_a_ring_writes_the_same_on_every_target(window: int, sinks: int) -> None:
    options = dict(max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0)
    eager, generated = (ringed(window, sinks, target=target)[1] for target in ("eager", "auto"))
    assert torch.equal(generated.generate(TEXT, **options), eager.generate(TEXT, **options))


def test_sinks_that_cannot_be_kept_near_are_refused() -> None:
    data = [torch.randint(3, 96, (4, 32))]
    with pytest.raises(errors.CacheUnsupported, match="takes a mean off its keys"):
        slim.compile(pair("llama")[0], 'quantize_kv("int8")', calibration=data, target="eager",
                     kv_cache=KVCacheConfig(window=64, sinks=4))  # fmt: skip


def test_the_memory_of_a_ring_does_not_depend_on_how_much_is_written() -> None:
    _, ring = ringed(32, 4)
    sizes = []
    for tokens in (5, 2000):
        options = dict(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        out = ring.generate(torch.ones(1, 3, dtype=torch.long), return_dict_in_generate=True, **options)
        sizes.append(out.past_key_values.nbytes)
    assert sizes[0] == sizes[1]


def test_a_ring_refuses_to_fork_and_to_go_back_beyond_what_it_holds() -> None:
    _, ring = ringed(32, 4)
    cache = ring.new_cache(1)
    ring(torch.full((1, 800), 5), past_key_values=cache)
    with pytest.raises(errors.CacheUnsupported, match="cannot fork"):
        cache.fork([0, 0])
    with pytest.raises(errors.CacheUnsupported, match="cannot go back"):
        cache.truncate(5)


def test_a_window_of_the_cache_and_a_pattern_of_the_model_are_not_mixed_silently() -> None:
    with pytest.raises(errors.CacheUnsupported, match="keeps window"):
        slim.compile(pair("llama")[0], "sparse_attention(window=8)", kv_cache=KVCacheConfig(window=64), target="eager")


def test_blocks_that_no_page_is_made_of_are_refused() -> None:
    with pytest.raises(errors.CacheUnsupported, match="no whole blocks of 24"):
        slim.compile(pair("llama")[0], 'sparse_attention("block_topk", block=24)', kv_cache=PAGED, target="eager")


@pytest.mark.parametrize(("options", "match"), [
    (dict(sinks=4), "without a window"), (dict(window=0), "no number of tokens"),
    (dict(sinks=-1, window=4), "no number"), (dict(layout="tiled"), "is not one of"),
    (dict(window=True), "no number of tokens"),
])  # fmt: skip
def test_configurations_without_sense_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(errors.SlimError, match=match):
        KVCacheConfig(**options)  # type: ignore[arg-type]


def test_more_tokens_than_the_cache_may_hold_are_refused() -> None:
    model = compiled("llama", "eager", KVCacheConfig(layout="paged", max_tokens=8))
    with pytest.raises(errors.PromptTooLong):
        model.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=5)
    assert model.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=4, eos_token_id=None).shape[1] == 9
