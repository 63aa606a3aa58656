"""Writes Llamas with random weights as transformers would save them, a made-up tokenizer included.

How fast a model is does not hang on what it has learnt. The weights are drawn so that values keep their size from layer
to layer, as in a trained model, and engines can be held to agree on the next token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 1 << 24  # numbers drawn at a time


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, under the names that its configuration has for them; the head is no view of the embedding."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    dtype: str = "float32"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def cached(self) -> int:
        """Bytes of keys and values a token, in float32."""
        return 2 * 4 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    @property
    def multiplied(self) -> int:
        """Weights that every new token is multiplied by."""
        return sum(math.prod(size) for name, size in self.tensors() if len(size) == 2 and "embed" not in name)

    @property
    def parameters(self) -> int:
        return sum(math.prod(size) for _, size in self.tensors())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and sizes of all weights."""
        hidden, inner = self.hidden_size, self.intermediate_size
        keys = self.num_key_value_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in (f"model.layers.{index}" for index in range(self.num_hidden_layers)):
            yield f"{layer}.input_layernorm.weight", (hidden,)
            yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
            yield f"{layer}.self_attn.k_proj.weight", (keys, hidden)
            yield f"{layer}.self_attn.v_proj.weight", (keys, hidden)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
            yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab_size, hidden)


SHAPES = {
    "15m": Shape(288, 768, 6, 6, 6, 32000),
    "135m": Shape(576, 1536, 30, 9, 3, 49152),
    "135m-mha": Shape(512, 1536, 30, 8, 8, 49152),  # as many kv heads as query heads: for GQA
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, "bfloat16"),  # float32 would be 6 GB of disk, and again of memory
}


def ensure(shape: Shape, directory: Path) -> None:
    """Writes the model unless it is there; config.json comes last, and says that it is whole."""
    config = directory / "config.json"
    wanted = json.dumps(_config(shape), indent=2)
    if config.exists() and config.read_text() == wanted:
        return
    directory.mkdir(parents=True, exist_ok=True)
    config.unlink(missing_ok=True)
    _write_weights(shape, directory / "model.safetensors")
    _write_tokenizer(shape.vocab_size, directory)
    config.write_text(wanted)


def _config(shape: Shape) -> dict[str, Any]:
    last = shape.vocab_size - 1
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(shape), "head_dim": shape.head_dim,
        "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "use_cache": True, "bos_token_id": 1, "eos_token_id": last, "pad_token_id": None,
    }  # fmt: skip


def _write_weights(shape: Shape, path: Path) -> None:
    """safetensors: the size of a JSON header, the header, the numbers."""
    itemsize = 2 if shape.dtype == "bfloat16" else 4
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in shape.tensors():
        start, end = end, end + itemsize * math.prod(size)
        kind = "BF16" if itemsize == 2 else "F32"
        header[name] = {"dtype": kind, "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)  # numbers start on a line of the processor's cache
    draw = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, size in shape.tensors():
            for values in _values(draw, size):
                file.write(_bfloat16(values).tobytes() if itemsize == 2 else values.tobytes())


def _values(draw: np.random.Generator, size: tuple[int, ...]) -> Iterator[Any]:
    """A weight's numbers in blocks: ones for a norm, else normal, as wide as keeps the results at one."""
    left = math.prod(size)
    while left:
        count = min(BLOCK, left)
        left -= count
        if len(size) == 1:
            yield np.ones(count, np.float32)
        else:
            yield draw.standard_normal(count, np.float32) / np.float32(math.sqrt(size[-1]))


def _bfloat16(values: Any) -> Any:
    """The upper half of float32, rounded half up; no value here is large enough to overflow."""
    return ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)


def _write_tokenizer(vocabulary: int, directory: Path) -> None:
    """A word for every id: converters ask for a tokenizer, and nothing here reads text."""
    words = {f"t{index}": index for index in range(vocabulary)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "t0"}
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "bos_token": "t1",
                "eos_token": f"t{vocabulary - 1}"}  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
