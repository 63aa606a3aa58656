"""Whole models of odd sizes: heads from 8 to 256 numbers, one key/value head, any batch, any prompt."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import slim
from slim.codegen import build
from slim.runtime.compiled import CompiledModel
from tests.compiled import difference

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"no C++ code here: {build.missing()}")

VOCABULARY = 99
# head_dim, heads, kv_heads, passes, and how far the target may be from the IR's own numbers
SIZES = {
    "head 8": (8, 3, 1, "", 1e-4),
    "head 80, int4": (80, 2, 1, 'quantize("int4", group_size=16)', 0.06),
    "head 256, int8": (256, 2, 2, 'quantize("int8")', 0.06),
}


@cache
def compiled(name: str) -> tuple[CompiledModel, CompiledModel]:
    """One model on both targets."""
    head_dim, heads, kv_heads, passes, _ = SIZES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=head_dim * heads, head_dim=head_dim, intermediate_size=72, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=VOCABULARY,
    )  # fmt: skip
    eager = slim.compile(LlamaForCausalLM(config).eval(), passes, target="eager", verify=False)
    return CompiledModel(eager.program, "cpu"), eager


@pytest.mark.parametrize("name", SIZES)
@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 9),
    length=st.sampled_from([1, 2, 3, 15, 16, 17, 63, 64, 65, 130, 257, 513]),
    seed=st.integers(0, 99),
)
def test_any_batch_and_any_prompt(name: str, batch: int, length: int, seed: int):
    tokens = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    generated, eager = compiled(name)
    tolerance = SIZES[name][-1]
    caches = [model.new_cache(batch, length + 1) for model in (generated, eager)]
    for part in (tokens, tokens[:, :1]):  # the prompt, then a step over the cache
        got, wanted = (
            model(part, past_key_values=held).logits for model, held in zip((generated, eager), caches, strict=True)
        )
        assert difference(got, wanted) < tolerance
