"""Whole architectures as generated C++: in one piece, and equal to the eager target, with a cache and without."""

import pytest
import torch
from torch import Tensor

import slim
from benchmarks import zoo
from slim.codegen import build
from slim.runtime.compiled import CompiledModel
from tests.compiled import difference, lifted, pair, prompt

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"no C++ code here: {build.missing()}")

CAUSAL = (
    "llama", "llama-biases", "llama-llama3rope", "mistral", "gemma", "gemma2", "gemma3", "qwen2", "qwen3", "phi",
    "phi3", "olmo2", "cohere", "stablelm", "glm4", "nemotron", "gpt2", "gpt_bigcode", "gptj",
    "gpt_neo", "gpt_neox", "opt", "bloom", "mpt", "falcon", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3",
)  # fmt: skip
ENCODERS = ("bert", "roberta", "distilbert")
GREEDY = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_language_model_is_one_piece_and_says_the_same(name: str):
    _, eager = pair(name)
    generated = CompiledModel(eager.program, "cpu", report=slim.compiler.report.PipelineReport())
    tokens, mask = prompt()
    got, wanted = (model(tokens, attention_mask=mask).logits for model in (generated, eager))
    assert difference(got, wanted, mask) < 1e-4
    texts = [model.generate(tokens, attention_mask=mask, **GREEDY) for model in (generated, eager)]
    assert torch.equal(*texts)
    assert not any(form.foreign for form in generated.report.forms.values())


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_one_piece_and_says_the_same(name: str):
    program = lifted(name)
    tokens, mask = prompt()
    inputs = {"input_ids": tokens.flip(1), "attention_mask": mask.flip(1)}
    generated, eager = (CompiledModel(program, target) for target in ("cpu", "eager"))
    for got, wanted in zip(generated(**inputs).values(), eager(**inputs).values(), strict=True):
        hidden = inputs["attention_mask"] if wanted.dim() == 3 else None
        assert difference(got, wanted, hidden) < 1e-4
    assert not generated._executable.form.foreign


@pytest.mark.parametrize(
    "passes", ['quantize("int8")', 'quantize("int4", group_size=16)', 'quantize("int8", group_size=16)']
)
def test_quantised_weights_differ_by_the_rounding_of_activations_alone(passes: str):
    """Kernels round inputs to int8 by groups: random weights damp none of that."""
    model, _ = pair("llama")
    compiled = slim.compile(model, passes, target="cpu", strict=False)
    assert compiled.report.error is not None
    assert compiled.report.error < 0.06
    assert "off by" in str(compiled.report)
    assert not any(form.foreign for form in compiled.report.forms.values())


def test_quantised_experts_have_kernels():
    model, _ = pair("mixtral")
    compiled = slim.compile(model, 'quantize("int8")', target="cpu")
    assert compiled.report.error is not None
    assert compiled.report.error < 0.06
    assert not compiled.report.forms["whole"].foreign


def test_experts_have_scratch_for_any_share_of_the_rows():
    """1,040 rows are chunks of 347; an expert that gets 490 of them takes those in one."""
    _, eager = pair("mixtral")
    generated = CompiledModel(eager.program, "cpu")
    needs = [line for line in "\n".join(map(str, generated.code.values())).splitlines() if "+ expert_scratch(" in line]
    assert any("size_max(" in line for line in needs)
    assert all("linear_scratch_up_to(" in line for line in needs if "size_max(" in line)
    tokens = torch.cat([torch.full((1, 490), 5), torch.arange(3, 33)[None]], 1)
    assert difference(generated(tokens).logits, eager(tokens).logits) < 1e-4


def test_a_step_after_a_prompt_equals_the_whole():
    _, eager = pair("qwen3")
    generated = CompiledModel(eager.program, "cpu")
    tokens, _ = prompt(padded=False)
    for chunk in (1, 2, 5):
        cache = generated.new_cache(len(tokens), tokens.shape[1])
        parts = [
            generated(tokens[:, i : i + chunk], past_key_values=cache, use_cache=True).logits
            for i in range(0, tokens.shape[1], chunk)
        ]
        assert difference(torch.cat(parts, 1), eager(tokens).logits) < 1e-5


@pytest.mark.parametrize("batch", [1, 2, 5, 9])
@pytest.mark.parametrize("length", [1, 2, 17, 70])
def test_every_batch_and_length(batch: int, length: int):
    _, eager = pair("gemma2")
    tokens = torch.randint(3, zoo.VOCAB, (batch, length))
    assert difference(_generated("gemma2")(tokens).logits, eager(tokens).logits) < 1e-5


def _generated(name: str) -> CompiledModel:
    return CompiledModel(pair(name)[1].program, "cpu")


def test_packed_weights_are_held_once_and_come_back_whole(tmp_path):
    model, _ = pair("llama")
    eager = slim.compile(model, 'quantize("int4")', target="eager", strict=False)
    generated = slim.compile(model, 'quantize("int4")', target="cpu", strict=False)
    tokens, _ = prompt(padded=False)
    generated(tokens)
    before = {name: generated.program.weights.raw(name) for name in generated.program.weights}
    generated.generate(tokens, **GREEDY)
    assert all(generated.program.weights.raw(name) is value for name, value in before.items())
    for name in eager.program.weights:
        assert torch.equal(generated.program.weights[name], eager.program.weights[name]), name
    generated.save(tmp_path / "model")
    again = slim.load(tmp_path / "model", target="cpu")
    assert torch.equal(again(tokens).logits, generated(tokens).logits)


def test_a_quantised_table_that_is_the_head_too_is_held_once_in_each_form():
    model, _ = pair("gemma")
    compiled = slim.compile(model, 'quantize("int8")', target="cpu")
    tokens, _ = prompt(padded=False)
    eager = slim.compile(model, 'quantize("int8")', target="eager")
    assert difference(compiled(tokens).logits, eager(tokens).logits) < 0.06
    compiled.generate(tokens, **GREEDY)
    forms = [compiled._executable, *(step.executable for step in compiled._steps.values())]
    held = [
        {tensor.data_ptr() for tensor in form._weights if tensor.dtype in (torch.int8, torch.uint8)} for form in forms
    ]
    assert held[0] == held[1]


def test_bfloat16_models_keep_their_types():
    _, eager = pair("llama")
    model = zoo.build("llama").to(torch.bfloat16)
    generated = slim.compile(model, target="cpu")
    tokens, mask = prompt()
    logits: Tensor = generated(tokens, attention_mask=mask).logits
    assert logits.dtype == torch.bfloat16
    assert difference(logits, eager(tokens, attention_mask=mask).logits, mask) < 0.1
    assert generated.generate(tokens, attention_mask=mask, **GREEDY).shape == (3, 33)
