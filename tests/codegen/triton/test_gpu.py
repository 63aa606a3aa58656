"""What only a GPU shows: graphs that are captured and replayed, tuning, weights that move."""

import copy
import logging

import pytest
import torch

import slim
from slim.codegen.triton.executable import TritonExecutable
from slim.passes import Quantize
from slim.runtime.compiled import CompiledModel
from tests import programs
from tests.compiled import difference, pair, prompt

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return CompiledModel(pair("llama")[1].program, "cuda")


def test_a_replayed_graph_writes_what_the_first_run_did(model: CompiledModel):
    tokens, _ = prompt(padded=False)
    step = model.step(masked=False, last_only=True)
    cache = model.new_cache(len(tokens), 64)
    cache.prepare(tokens.shape[1])
    for tensor in cache.tensors:
        tensor.normal_()
    new = tokens[:, -1:].to(model.device)
    inputs = {"input_ids": new, "position_ids": torch.full_like(new, 9), "attention_mask": torch.ones_like(new)}
    call = step.executable.bind(*step.arguments(cache, cache.mask[:, :10], inputs))
    first, second, third = (call()[0] for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert call._replay._graph is not None
    call.set(step.mask_index, cache.mask[:, :20])
    longer = call()[0]
    fresh = step.executable(*step.arguments(cache, cache.mask[:, :20], inputs))[0]
    assert torch.equal(longer, fresh)
    assert not torch.equal(longer, first)


def test_bursts_and_single_steps_write_the_same(model: CompiledModel):
    from transformers import LogitsProcessorList

    tokens, mask = prompt()
    options = {
        "attention_mask": mask,
        "max_new_tokens": 40,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    single = LogitsProcessorList([lambda ids, scores: scores])
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, logits_processor=single, **options))


@pytest.mark.parametrize("passes", [[], [Quantize("int8")], [Quantize("int4", group_size=16)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_say_what_the_ir_does(passes: list, dtype: torch.dtype):
    model = copy.deepcopy(programs.model("llama")).to(dtype)
    compiled = slim.compile(model, passes, target="cuda", strict=False)
    assert compiled.report.error < {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    assert next(model.parameters()).device.type == "cpu", "the user's model stays where it was"


def test_a_tuned_model_says_the_same_and_is_not_tuned_twice(empty_cache, caplog):
    model = programs.model("llama")
    tokens = torch.tensor([[5, 17, 33]])
    with caplog.at_level(logging.INFO, logger="slim"):
        tuned = slim.compile(model, target="cuda", tune=20.0)
        wanted = tuned.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert any("measured" in record.message for record in caplog.records)
    plain = slim.compile(model, target="cuda")
    assert difference(tuned(tokens).logits, plain(tokens).logits) < 1e-3
    assert torch.equal(plain.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None), wanted)


def test_many_rows_and_long_prompts_equal_eager():
    model = copy.deepcopy(programs.model("llama", max_position_embeddings=2048)).cuda()
    compiled = slim.compile(model, target="cuda", verify=False)
    for batch, length in ((1, 1), (1, 513), (9, 65), (2, 1025)):
        tokens = torch.randint(3, 90, (batch, length), device="cuda")
        with torch.no_grad():
            assert difference(compiled(tokens).logits, model(tokens).logits) < 2e-3


def test_an_executable_needs_no_more_memory_the_second_time():
    compiled = slim.compile(copy.deepcopy(programs.model("llama")).cuda(), target="cuda", verify=False)
    tokens = torch.randint(3, 90, (2, 40), device="cuda")
    assert isinstance(compiled._executable, TritonExecutable)
    compiled(tokens)
    before = torch.cuda.memory_allocated()
    compiled(tokens)
    assert torch.cuda.memory_allocated() <= before
