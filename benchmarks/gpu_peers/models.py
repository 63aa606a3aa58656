"""Llamas with random weights, made where they run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import transformers

from benchmarks.gpu_peers.device import Device
from benchmarks.peers.random_llama import Shape

SHAPES = {
    "tiny": Shape(128, 256, 2, 4, 2, 512, "bfloat16"),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, "bfloat16"),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, "bfloat16"),
}


def build(shape: Shape, device: Device) -> Any:
    """The model in bfloat16; weights are as wide as keeps the results at one, from layer to layer."""
    config = transformers.LlamaConfig(
        **asdict(shape), head_dim=shape.head_dim, max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=shape.vocab_size - 1,
    )  # fmt: skip
    with torch.device(device.kind):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    draw = torch.Generator(device.kind).manual_seed(0)
    for weight in model.parameters():
        weight.requires_grad_(False)
        if weight.dim() == 2:
            weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=draw)
    return model


def prompt(shape: Shape, batch: int, length: int, device: Device) -> torch.Tensor:
    """Token ids [batch, length], the same each time; none is 0, which ``generate`` is told to pad with."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(1, shape.vocab_size, (batch, length), generator=draw).to(device.kind)


def cached_bytes(shape: Shape) -> int:
    """Of the keys and values of one token, in bfloat16."""
    return shape.cached // 2  # Shape counts float32


def prompt_operations(shape: Shape, length: int) -> int:
    """To read one prompt: every linear for every token but the head, which sees the last; attention is causal."""
    head = shape.vocab_size * shape.hidden_size
    linears = 2 * (shape.multiplied - head) * length + 2 * head
    return linears + 2 * shape.num_hidden_layers * shape.hidden_size * length**2
