"""transformers in PyTorch: ``eager-*``, ``compile-*`` (torch.compile, static cache) and ``torchao-int8`` (compiled)."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
import transformers
from protocol import Clock, Setup

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def convert(setup: Setup) -> None:
    """Nothing: transformers reads the directory."""


class Engine:
    """A transformers model; the precision is how it runs, a dash, and the type of its weights."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        how, kind = setup.precision.split("-")
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        dtype: Any = DTYPES.get(kind, "auto")
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype).eval()
        if how == "torchao":
            self._quantise(kind)
        linears = [module for module in self._model.modules() if isinstance(module, torch.nn.Linear)]
        self.nbytes = sum(_nbytes(linear.weight) for linear in linears)
        self._static = how != "eager"
        self._forward = torch.compile(self._model.forward, dynamic=False) if self._static else self._model.forward

    def _quantise(self, kind: str) -> None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        if kind != "int8":
            raise ValueError(f"torchao-{kind} is not measured here")
        quantize_(self._model, Int8WeightOnlyConfig())
        self.versions["torchao"] = version("torchao")

    @torch.inference_mode()
    def run(self, prompt: list[int], new: int, batch: int) -> Clock:
        clock = Clock()
        tokens = torch.tensor([prompt] * batch)
        cache = self._cache(batch, len(prompt) + new)
        clock.begin()
        position = 0
        for _ in range(new):
            positions = torch.arange(position, position + tokens.shape[1])[None]
            out = self._forward(
                input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            position += tokens.shape[1]
            tokens = out.logits[:, -1:].argmax(-1)
            clock.token(int(tokens[0]))
        return clock

    def _cache(self, batch: int, room: int) -> Any:
        config = self._model.config
        if not self._static:
            return transformers.DynamicCache(config=config)
        cache = transformers.StaticCache(config=config, max_cache_len=room)
        cache.early_initialization(
            batch, config.num_key_value_heads, config.head_dim, self._model.dtype, torch.device("cpu")
        )
        return cache


def _nbytes(weight: Any) -> int:
    """Of a tensor, or of the tensors that torchao's kind of tensor holds."""
    if not hasattr(type(weight), "__tensor_flatten__"):
        return int(weight.nbytes)
    names, _ = weight.__tensor_flatten__()
    return sum(_nbytes(getattr(weight, name)) for name in names)
