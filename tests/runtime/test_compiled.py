"""A compiled model takes and returns what the original did, and refuses what it does not have."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from slim import errors
from slim.compiler.lift import lift
from slim.runtime.architecture import counts_real_tokens
from slim.runtime.cache import KVCache, KVCacheConfig
from slim.runtime.compiled import CompiledModel
from tests.compiled import difference, pair, prompt

# -- causal language models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mistral"])
@pytest.mark.parametrize("given", ["nothing", "mask", "positions"])
def test_logits_are_the_models_own(name, given):
    model, compiled = pair(name)
    tokens, mask = prompt(padded=given != "nothing")
    inputs = {"input_ids": tokens}
    if given != "nothing":  # without positions, OPT counts real tokens and Llama all of them: slim as they do
        inputs["attention_mask"] = mask
    if given == "positions":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(**inputs)
    found = compiled(**inputs)
    assert type(found) is type(expected)
    assert difference(found.logits, expected.logits, mask) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_tokens_that_experts_sum_up_are_no_positions(name, caplog):
    assert not counts_real_tokens(pair(name)[1].program.facts)
    assert "cannot ask" not in caplog.text


def test_the_loss_is_the_models_own():
    model, compiled = pair("llama")
    tokens, mask = prompt()
    labels = tokens.masked_fill(mask == 0, -100)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    assert compiled(**inputs).loss == pytest.approx(model(**inputs).loss.item(), rel=1e-5)
    items = {**inputs, "num_items_in_batch": 7}
    assert compiled(**items).loss == pytest.approx(model(**items).loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_conversation_goes_on_with_its_cache(name):
    model, compiled = pair(name)
    tokens, mask = prompt()
    expected = model(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True)
    expected = model(tokens[:, 6:], attention_mask=mask, past_key_values=expected.past_key_values)
    first = compiled(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True)
    assert isinstance(first.past_key_values, KVCache)
    second = compiled(tokens[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    assert second.past_key_values is first.past_key_values
    assert second.past_key_values.get_seq_length() == 9
    assert difference(second.logits, expected.logits) < 1e-5


def test_no_cache_is_kept_unless_asked_for():
    assert pair("llama")[1](prompt()[0]).past_key_values is None


def test_results_come_as_a_tuple_on_request():
    compiled = pair("llama")[1]
    tokens, _ = prompt()
    loss, logits, cache = compiled(tokens, labels=tokens, use_cache=True, return_dict=False)
    assert loss.dim() == 0
    assert logits.shape[:2] == tokens.shape
    assert isinstance(cache, KVCache)


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 2])], ids=str)
def test_only_some_logits_are_kept_on_request(keep):
    model, compiled = pair("llama")
    tokens, _ = prompt()
    with torch.no_grad():
        expected = model(tokens, logits_to_keep=keep).logits
    assert difference(compiled(tokens, logits_to_keep=keep).logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        ({}, errors.BadInput, "must be a tensor of token ids, not NoneType"),
        ({"input_ids": torch.rand(1, 3)}, errors.BadInput, "must be integers"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, errors.BadInput, r"\[batch, length\]"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, errors.EmptyPrompt, "empty"),
        ({"input_ids": torch.tensor([[5, 101]])}, errors.TokenOutOfRange, "token 101 at position 1 .* of 101"),
        ({"input_ids": torch.tensor([[5, 5], [-100, 5]])}, errors.TokenOutOfRange, r"token -100 at position 1, 0"),
        ({"attention_mask": torch.ones(3, 8)}, errors.BadInput, r"attention_mask: .*\[3, 9\]"),
        ({"attention_mask": torch.ones(3, 1, 9, 9)}, errors.BadInput, "attention_mask"),
        ({"position_ids": torch.zeros(3, 2)}, errors.BadInput, "position_ids"),
        ({"labels": torch.zeros(3, 2)}, errors.BadInput, "labels"),
        ({"output_attentions": True}, errors.BadInput, "output_attentions: it was not part of what was compiled"),
        ({"inputs_embeds": torch.rand(3, 9, 8)}, errors.BadInput, "inputs_embeds"),
        ({"attenton_mask": None}, errors.BadInput, "attenton_mask: the model has no such argument"),
        ({"past_key_values": ((1, 2),)}, errors.CacheMismatch, "a KVCache of this model"),
        ({"past_key_values": KVCache((), 3), "use_cache": False}, errors.ContradictoryOptions, "use_cache=False"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_refused_by_name(inputs, error, text):
    tokens, _ = prompt()
    with pytest.raises(error, match=text):
        pair("llama")[1](**{"input_ids": tokens, **inputs} if inputs else {})


def test_a_cache_of_another_model_or_batch_is_refused():
    compiled, other = pair("llama")[1], pair("gpt2")[1]
    with pytest.raises(errors.CacheMismatch, match="layers"):
        compiled(prompt()[0], past_key_values=other.new_cache(3))
    with pytest.raises(errors.CacheMismatch, match="must be for 3 rows, and is for 2"):
        compiled(prompt()[0], past_key_values=compiled.new_cache(2))


def test_positions_beyond_a_learned_table_are_refused():
    compiled = pair("gpt2")[1]
    assert compiled.position_limit == 256
    with pytest.raises(errors.PromptTooLong, match="257 tokens do not fit the positions of the model, 256"):
        compiled(torch.full((1, 257), 5))


def test_the_offset_of_a_position_table_is_not_for_tokens():
    model, compiled = pair("opt")
    assert model.model.decoder.embed_positions.weight.shape[0] == 258  # two rows for padding
    assert compiled.position_limit == 256


def test_rotary_positions_have_no_table():
    assert pair("llama")[1].position_limit is None


# -- what harnesses ask ------------------------------------------------------------------------------------------------


def test_it_answers_as_a_transformers_model_does():
    model, compiled = pair("llama")
    assert type(compiled.config) is type(model.config)
    assert compiled.config.to_dict() == model.config.to_dict()
    assert compiled.generation_config.to_dict() == model.generation_config.to_dict()
    assert (compiled.device, compiled.dtype) == (model.device, model.dtype)
    assert compiled.num_parameters() == model.num_parameters()
    assert compiled.can_generate()
    assert compiled.eval() is compiled
    compiled.tie_weights()


def test_it_goes_only_where_it_was_compiled_for():
    compiled = pair("llama")[1]
    assert compiled.to("cpu") is compiled.to(torch.float32) is compiled.to(device="cpu") is compiled
    with pytest.raises(errors.BadInput, match="compiled for cpu, not cuda"):
        compiled.to("cuda")
    with pytest.raises(errors.BadInput, match=r"not torch\.float16"):
        compiled.to(torch.float16)


def test_its_code_is_python_that_grows_with_its_use():
    compiled = CompiledModel(pair("llama")[1].program, "eager")
    assert list(compiled.code) == ["step_last/forward.py"]
    compiled(prompt()[0][:1, -2:])
    assert list(compiled.code) == ["step_last/forward.py", "whole/forward.py"]
    for source in compiled.code.values():
        compile(source, "code", "exec")


def test_a_cache_that_was_asked_for_and_cannot_be_is_refused_at_once():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(1)

    program = lift(Mean(), torch.rand(2, 3, 4))
    with pytest.raises(errors.CacheUnsupported, match="no attention"):
        CompiledModel(program, "eager", kv_cache=KVCacheConfig(max_tokens=8))


# -- encoders ----------------------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**TINY)).eval()
    return model, CompiledModel(lift(model), "eager")


@pytest.mark.parametrize("given", ["nothing", "mask", "types"])
def test_an_encoder_returns_what_it_did(encoder, given):
    model, compiled = encoder
    tokens = torch.randint(1, 60, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    inputs = {"input_ids": tokens}
    inputs |= {"mask": {"attention_mask": mask}, "types": {"token_type_ids": tokens % 2}}.get(given, {})
    with torch.no_grad():
        expected = model(**inputs)
    found = compiled(**inputs)
    assert type(found) is type(expected)
    real = inputs.get("attention_mask", torch.ones_like(tokens))
    assert difference(found.last_hidden_state, expected.last_hidden_state, real) < 1e-5
    assert difference(found.pooler_output, expected.pooler_output) < 1e-5
    assert torch.equal(compiled(tokens, return_dict=False)[0], compiled(tokens).last_hidden_state)


def test_an_encoder_does_not_generate(encoder):
    assert not encoder[1].can_generate()
    with pytest.raises(errors.NotGenerative, match="BertModel"):
        encoder[1].generate(torch.tensor([[5]]))


def test_an_encoder_refuses_what_it_does_not_take(encoder):
    with pytest.raises(errors.BadInput, match="pixel_values"):
        encoder[1](torch.tensor([[5]]), pixel_values=torch.rand(1))
    with pytest.raises(errors.BadInput, match="output_hidden_states"):
        encoder[1](torch.tensor([[5]]), output_hidden_states=True)


def test_a_masked_language_model_returns_logits():
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**TINY)).eval()
    tokens = torch.randint(1, 60, (2, 7))
    with torch.no_grad():
        expected = model(tokens).logits
    assert difference(CompiledModel(lift(model), "eager")(tokens).logits, expected) < 1e-5


# -- other modules -----------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Takes nested arguments and returns nested results."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, more):
        return {"sum": self.linear(x) + more["shift"], "list": [more["shift"] * 2, None]}


@pytest.fixture(scope="module")
def nested():
    torch.manual_seed(0)
    module = Nested()
    return module, CompiledModel(lift(module, (torch.rand(5, 4), {"shift": torch.rand(3)})), "eager")


def test_a_module_takes_and_returns_its_own_structure(nested):
    module, compiled = nested
    x, shift = torch.rand(7, 4), torch.rand(3)
    with torch.no_grad():
        expected = module(x, {"shift": shift})
    found = compiled(x, {"shift": shift})
    assert torch.allclose(found["sum"], expected["sum"])
    assert torch.equal(found["list"][0], expected["list"][0])
    assert found["list"][1] is None


def test_plain_tensors_may_come_by_name():
    class Add(nn.Module):
        def forward(self, x, y):
            return x - y

    compiled = CompiledModel(lift(Add(), (torch.rand(2, 3), torch.rand(2, 3))), "eager")
    x, y = torch.rand(4, 3), torch.rand(4, 3)
    assert torch.equal(compiled(x, y=y), x - y)
    assert torch.equal(compiled(y=y, x=x), x - y)


@pytest.mark.parametrize(
    "args", [(), (torch.rand(7, 4),), (torch.rand(7, 4), {"shift": 1.0}), (torch.rand(7, 5), {"shift": torch.rand(3)})]
)
def test_a_module_refuses_other_arguments(nested, args):
    with pytest.raises(errors.BadInput):
        nested[1](*args)
