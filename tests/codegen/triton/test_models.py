"""Whole architectures as Triton kernels, by the interpreter: the same as eager, with a cache and without."""

import pytest
import torch

import slim
from slim.runtime.compiled import CompiledModel
from tests.compiled import difference, lifted, pair

# One of each kind of block; the other architectures of the coverage table are these in other combinations.
CAUSAL = (
    "gemma2", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "mixtral", "gpt_oss", "deepseek_v3",
)  # fmt: skip
EXPERTS = ("mixtral", "gpt_oss", "deepseek_v3")  # one row: each token's experts are programs of their own
GREEDY = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
TOKENS = torch.tensor([[0, 17, 5], [3, 44, 71]])
MASK = (TOKENS != 0).long()

pytestmark = pytest.mark.slow  # Triton's interpreter takes its time


@pytest.mark.parametrize("name", CAUSAL)
def test_a_language_model_says_the_same_as_eager(name: str):
    _, eager = pair(name)
    kernels = CompiledModel(eager.program, "cuda", report=slim.compiler.report.PipelineReport())
    rows = slice(1, None) if name in EXPERTS else slice(None)
    tokens, mask = TOKENS[rows], MASK[rows]
    got = kernels(tokens.to(kernels.device), attention_mask=mask.to(kernels.device)).logits
    assert difference(got.cpu(), eager(tokens, attention_mask=mask).logits, mask) < 1e-4
    texts = [model.generate(tokens, attention_mask=mask, **GREEDY).cpu() for model in (kernels, eager)]
    assert torch.equal(*texts)
    assert not any(form.foreign for form in kernels.report.forms.values())


def test_an_encoder_says_the_same_as_eager():
    program = lifted("bert")
    inputs = {"input_ids": TOKENS.flip(1), "attention_mask": MASK.flip(1)}
    wanted = CompiledModel(program, "eager")(**inputs)
    kernels = CompiledModel(program, "cuda")
    got = kernels(**{name: value.to(kernels.device) for name, value in inputs.items()})
    for a, b in zip(got.values(), wanted.values(), strict=True):
        assert difference(a.cpu(), b, inputs["attention_mask"] if b.dim() == 3 else None) < 1e-4
