"""Programs for tests: written by hand as IR text, or lifted from tiny models with random weights."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from slim.compiler.program import Facts, Program
from slim.compiler.text import HEADER, parse
from slim.compiler.weights import Deferred, Weights
from tests.lifting import lift_once


class Counted:
    """A weight on disk, as far as a Program can tell: counts its reads, and how many of the tensors read are alive."""

    alive = 0
    most = 0

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.reads = 0

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.shape)

    def load(self) -> Tensor:
        self.reads += 1
        tensor = self._tensor.clone()
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)
        weakref.finalize(tensor, Counted._died)
        return tensor

    @staticmethod
    def _died() -> None:
        Counted.alive -= 1

    @staticmethod
    def reset() -> None:
        Counted.alive = Counted.most = 0


def program(
    lines: str, weights: dict[str, Tensor | Deferred], inputs: str = "x: f32[B, S, 8]", **facts: Any
) -> Program:
    """A Program from the lines of its body; types on the left are not needed."""
    body = "\n".join(f"    {_typed(line.strip())}" for line in lines.strip().splitlines())
    text = f"{HEADER}: hand-written\n\n\ndef forward(weights, {inputs}):\n{body}\n"
    return parse(text, Weights(weights), Facts(**facts))


def _typed(line: str) -> str:
    return line if line.startswith("return") else line.replace(" = ", ": any = ", 1)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, norms and biases too, which models make ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            value = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(value + (1.0 if "norm" in name or "ln_" in name else 0.0))
    return model.eval()


TINY = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@functools.cache
def model(architecture: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny random transformers causal LM: llama with two layers; qwen2, gemma, mixtral, gpt2, ... with one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = TINY if architecture == "llama" else {**TINY, "num_hidden_layers": 1}
    if architecture == "gpt2":
        sizes = dict(n_embd=32, n_layer=1, n_head=4, n_positions=64, vocab_size=96, bos_token_id=1, eos_token_id=2)
    config = AutoConfig.for_model(architecture, **{**sizes, **options})
    return randomised(AutoModelForCausalLM.from_config(config)).to(dtype)


def lifted(architecture: str, dtype: torch.dtype = torch.float32, **options: Any) -> Program:
    """``model(...)`` lifted; a copy, so that a test may rewrite it."""
    return lift_once(model(architecture, dtype, **options))
