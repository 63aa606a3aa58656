"""generate: transformers' arguments, transformers' tokens, and no option ignored."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from slim import errors
from slim.runtime.cache import KVCache, KVCacheConfig
from slim.runtime.compiled import CompiledModel
from tests.compiled import difference, pair, prompt

GREEDY = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def both(name: str, *, seed: int = 0, padded: bool = True, rows: int = 3, **options):
    """What transformers generates, and what slim does, for the same prompt and options."""
    model, compiled = pair(name)
    tokens, mask = prompt(padded=padded)
    options = {"inputs": tokens[-rows:], "attention_mask": mask[-rows:], **GREEDY, **options}
    torch.manual_seed(seed)
    expected = model.generate(**options)
    torch.manual_seed(seed)
    return expected, compiled.generate(**options)


# -- the same tokens as transformers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_padded_batch_decodes_greedily_to_the_same_tokens(name, use_cache):
    expected, found = both(name, use_cache=use_cache)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_single_prompt_decodes_to_the_same_tokens(name):
    expected, found = both(name, rows=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 20},
        {"top_p": 0.8, "repetition_penalty": 1.4},
        {"min_p": 0.05, "no_repeat_ngram_size": 2},
        {"typical_p": 0.7, "num_return_sequences": 2},
        {"renormalize_logits": True, "suppress_tokens": [3, 4, 5], "epsilon_cutoff": 1e-3},
    ],
    ids=str,
)
def test_sampling_draws_the_same_tokens_from_the_same_seed(options):
    expected, found = both("llama", do_sample=True, **options)
    assert torch.equal(found, expected)
    assert not torch.equal(found, both("llama", seed=1, do_sample=True, **options)[1])


def test_rows_end_at_their_own_end_token():
    first, _ = both("llama")
    ends = first[:, 12].tolist()  # each row meets one of these, at a place of its own
    expected, found = both("llama", eos_token_id=ends)
    assert torch.equal(found, expected)
    assert (found == 0).any()


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 20},
        {"min_length": 25},
        {"max_new_tokens": None, "max_length": 15},
        {"bad_words_ids": [[7], [9, 11]]},
        {"forced_eos_token_id": 2},
        {"exponential_decay_length_penalty": (4, 1.5)},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_options_of_transformers_have_their_effect(options):
    ends = both("llama")[0][:, 14].tolist()
    expected, found = both("llama", eos_token_id=ends, **options)
    assert torch.equal(found, expected)


def test_a_generation_config_is_followed_and_keywords_go_first():
    model, compiled = pair("llama")
    tokens, mask = prompt()
    config = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    options = {"attention_mask": mask, "generation_config": config, "max_new_tokens": 5}
    assert torch.equal(compiled.generate(tokens, **options), model.generate(tokens, **options))
    assert config.max_new_tokens == 30


def test_the_models_own_generation_config_is_the_default():
    compiled = CompiledModel(pair("llama")[1].program, "eager")
    compiled.generation_config.max_new_tokens = 3
    assert compiled.generate(prompt()[0][-1:]).shape == (1, 12)


def test_scores_and_logits_are_returned_on_request():
    detailed = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, found = both("llama", repetition_penalty=1.3, max_new_tokens=6, **detailed)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(found.logits) == 6
    for one, other in zip((*found.scores, *found.logits), (*expected.scores, *expected.logits), strict=True):
        assert difference(one, other) < 1e-5
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == 14


def test_padding_is_found_by_the_pad_token_where_no_mask_is_given():
    model, compiled = pair("llama")
    tokens, _ = prompt()
    assert torch.equal(compiled.generate(tokens, **GREEDY), model.generate(tokens, **GREEDY))


def test_left_out_a_prompt_is_the_first_token():
    model, compiled = pair("llama")
    assert torch.equal(compiled.generate(**GREEDY), model.generate(**GREEDY))


def test_prompts_come_as_input_ids_too():
    _, compiled = pair("llama")
    tokens = prompt()[0][-1:]
    assert torch.equal(compiled.generate(input_ids=tokens, **GREEDY), compiled.generate(tokens, **GREEDY))


def test_positions_may_be_given():
    model, compiled = pair("llama")
    tokens, mask = prompt()
    options = {"attention_mask": mask, "position_ids": torch.arange(9).expand(3, -1) + 4, **GREEDY}
    assert torch.equal(compiled.generate(tokens, **options), model.generate(tokens, **options))


# -- processors, criteria, streams -------------------------------------------------------------------------------------


class Only(LogitsProcessor):
    """Lets one token through."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


class After(StoppingCriteria):
    """Stops each row after its own number of tokens."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


def test_a_processor_of_the_callers_own_is_applied():
    _, compiled = pair("llama")
    tokens = prompt()[0]
    found = compiled.generate(tokens, logits_processor=LogitsProcessorList([Only(42)]), **GREEDY)
    assert bool((found[:, 9:] == 42).all())


def test_criteria_of_the_callers_own_stop_rows_and_all():
    criteria = StoppingCriteriaList([After([12, 15, 14])])
    expected, found = both("llama", stopping_criteria=criteria, eos_token_id=2)
    assert torch.equal(found, expected)
    assert found.shape[1] == 15


@pytest.mark.parametrize("length", [12, 60])
def test_a_length_criterion_of_the_callers_own_takes_precedence(length):
    criteria = StoppingCriteriaList([MaxLengthCriteria(length)])
    expected, found = both("llama", stopping_criteria=criteria)
    assert torch.equal(found, expected)
    assert found.shape[1] == length


def test_allowed_tokens_are_asked_for():
    expected, found = both("llama", prefix_allowed_tokens_fn=lambda row, tokens: [5 + row, 9, len(tokens)])
    assert torch.equal(found, expected)


def test_a_streamer_gets_the_prompt_and_each_token_as_it_comes():
    class Collect:
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got.append(value)

        def end(self):
            self.ended = True

    _, compiled = pair("llama")
    streamer = Collect()
    found = compiled.generate(prompt()[0][-1:], streamer=streamer, **GREEDY)
    assert [len(part.flatten()) for part in streamer.got] == [9] + [1] * 32
    assert torch.equal(torch.cat([part.flatten() for part in streamer.got]), found[0])
    assert streamer.ended


def test_stop_strings_stop_real_text(shared: Path):
    from transformers import AutoModelForCausalLM

    from slim.compiler.lift import lift

    directory = shared / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    compiled = CompiledModel(lift(model), "eager")
    tokens = tokenizer("Once upon a time", return_tensors="pt").input_ids
    options = {"stop_strings": ["."], "tokenizer": tokenizer, "max_new_tokens": 60, "do_sample": False}
    found = compiled.generate(tokens, **options)
    assert torch.equal(found, model.generate(tokens, **options))
    assert tokenizer.decode(found[0]).endswith(".")


# -- caches ------------------------------------------------------------------------------------------------------------


def test_a_cache_of_an_earlier_call_is_gone_on_with():
    _, compiled = pair("llama")
    tokens, mask = prompt()
    options = {**GREEDY, "attention_mask": mask}
    first = compiled.generate(tokens, return_dict_in_generate=True, **{**options, "max_new_tokens": 5})
    longer = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], dim=1)
    options = {**GREEDY, "attention_mask": longer, "max_new_tokens": 8}
    again = compiled.generate(first.sequences, past_key_values=first.past_key_values, **options)
    assert torch.equal(again, compiled.generate(first.sequences, **options))


def test_a_cache_that_holds_the_whole_prompt_already_is_refused():
    _, compiled = pair("llama")
    tokens = prompt()[0][-1:]
    cache = compiled(tokens, use_cache=True).past_key_values
    with pytest.raises(errors.BadInput, match="must go on beyond the 9 tokens"):
        compiled.generate(tokens, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("cache", ["DynamicCache()", KVCache((), 3)], ids=str)
def test_a_foreign_cache_is_refused(cache):
    with pytest.raises(errors.CacheMismatch):
        pair("llama")[1].generate(prompt()[0], past_key_values=cache, **GREEDY)


def test_prompt_and_new_tokens_must_fit_the_cache_that_was_asked_for():
    compiled = CompiledModel(pair("llama")[1].program, "eager", kv_cache=KVCacheConfig(max_tokens=20))
    tokens = prompt()[0][-1:]
    assert compiled.generate(tokens, **{**GREEDY, "max_new_tokens": 11}).shape[1] == 20
    with pytest.raises(errors.PromptTooLong, match="40 tokens do not fit a cache of 20"):
        compiled.generate(tokens, **GREEDY)


def test_learned_positions_limit_the_length():
    _, compiled = pair("gpt2")
    tokens = torch.full((1, 250), 5)
    assert compiled.generate(tokens, **{**GREEDY, "max_new_tokens": 7}).shape[1] == 257
    with pytest.raises(errors.PromptTooLong, match="257 tokens do not fit the positions of the model, 256"):
        compiled.generate(tokens, **{**GREEDY, "max_new_tokens": 8})


def test_beyond_what_it_was_trained_for_a_rotary_model_only_warns(caplog):
    _, compiled = pair("llama")
    found = compiled.generate(torch.full((1, 250), 5), **GREEDY)
    assert found.shape[1] == 282
    assert "281 tokens are asked of a model made for 256" in caplog.text


def test_a_cache_with_little_room_grows_on_the_way(monkeypatch):
    monkeypatch.setattr("slim.runtime.compiled._ROOM", 2)
    expected, found = both("llama")
    assert torch.equal(found, expected)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"custom_generate": "me/mine"}, "custom_generate"),
        ({"negative_prompt_ids": torch.tensor([[1]])}, "negative_prompt_ids"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"token_healing": True}, "token_healing=True"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"max_new_token": 5}, "max_new_token: there is no such option"),
        ({"token_type_ids": torch.tensor([[1]])}, "token_type_ids"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_option_that_is_not_carried_out_is_refused_by_name(options, named):
    with pytest.raises(errors.UnsupportedGenerateOption, match=named.replace("(", r"\(")):
        pair("llama")[1].generate(prompt()[0], **GREEDY, **options)


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        ({"inputs": torch.zeros(1, 0, dtype=torch.long)}, errors.EmptyPrompt, "empty"),
        ({"inputs": torch.tensor([[5, 700]])}, errors.TokenOutOfRange, "token 700 at position 1 .* vocabulary of 101"),
        ({"inputs": [[5, 6]]}, errors.BadInput, "list"),
        ({"inputs": torch.tensor([5, 6])}, errors.BadInput, r"\[batch, length\]"),
        ({"attention_mask": torch.ones(3, 4)}, errors.BadInput, "attention_mask"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]] * 3)}, errors.BadInput, "pad on the left"),
        ({"inputs": torch.tensor([[5, 6, 0], [5, 6, 7]])}, errors.BadInput, "pad on the left"),
        ({"input_ids": torch.tensor([[5]])}, errors.ContradictoryOptions, "both are the prompt"),
        ({"max_new_tokens": None, "max_length": 4}, errors.BadInput, "max_length"),
        ({"temperature": -1.0, "do_sample": True}, errors.BadInput, "temperature"),
        ({"stop_strings": ["x"]}, errors.BadInput, "tokenizer"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_prompt_or_value_is_refused(inputs, error, text):
    with pytest.raises(error, match=text):
        pair("llama")[1].generate(**{"inputs": prompt()[0], **GREEDY, **inputs})


def test_a_model_without_a_bos_token_needs_a_prompt():
    with pytest.raises(errors.EmptyPrompt):
        pair("llama")[1].generate(generation_config=GenerationConfig(max_new_tokens=3), bos_token_id=None)


def test_where_there_can_be_no_cache_generation_goes_on_and_says_so(caplog, monkeypatch):
    def refuse(program, paging=None, eviction=None):
        raise errors.CacheUnsupported(reason="tokens are mixed")

    monkeypatch.setattr("slim.runtime.compiled.check_cacheable", refuse)
    compiled = CompiledModel(pair("llama")[1].program, "eager")
    tokens, mask = prompt()
    found = compiled.generate(tokens, attention_mask=mask, **GREEDY)
    assert torch.equal(found, both("llama")[0])
    assert "without a KV cache" in caplog.text
    assert "tokens are mixed" in caplog.text
    with pytest.raises(errors.CacheUnsupported, match="tokens are mixed"):
        compiled.generate(tokens, attention_mask=mask, use_cache=True, **GREEDY)
