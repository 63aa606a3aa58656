"""llama.cpp, through llama-cpp-python; precisions are ggml's names, ``q8_0`` and ``q4_0``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from protocol import Clock, Setup, require_one

LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


# -- converting --------------------------------------------------------------------------------------------------------


def convert(setup: Setup) -> None:
    """Writes the model as GGUF in its own type, and lets llama.cpp quantise that."""
    setup.converted.parent.mkdir(parents=True, exist_ok=True)
    plain = setup.converted.with_suffix(".plain")
    try:
        _write_plain(setup.model, plain)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{setup.precision.upper()}")
        params.nthread = setup.threads
        code = llama_cpp.llama_model_quantize(str(plain).encode(), str(setup.converted).encode(), params)
        if code:
            raise RuntimeError(f"llama_model_quantize returned {code}")
    finally:
        plain.unlink(missing_ok=True)


def _write_plain(model: Path, path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, values, kind in _tensors(model / "model.safetensors", config):
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(path: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """ggml's name, values and type of every weight; bfloat16 as the bits it is."""
    for name, values, is_bfloat16 in _safetensors(path):
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            index, part = stem.removeprefix("model.layers.").split(".", 1)
            target = f"blk.{index}.{LAYER[part]}.weight"
        else:
            target = f"{MODEL[stem]}.weight"
        if values.ndim == 1:
            wide = (values.astype(np.uint32) << 16).view(np.float32) if is_bfloat16 else values
            yield target, wide, gguf.GGMLQuantizationType.F32
            continue
        if stem.endswith(("q_proj", "k_proj")):
            values = _turn_halves(values, config["head_dim"])
        yield target, values, getattr(gguf.GGMLQuantizationType, "BF16" if is_bfloat16 else "F32")


def _safetensors(path: Path) -> Iterator[tuple[str, Any, bool]]:
    """Name, values and whether they are bfloat16 (then uint16); read here because numpy has no such type."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        is_bfloat16 = entry["dtype"] == "BF16"
        dtype = np.uint16 if is_bfloat16 else np.float32
        start = 8 + size + entry["data_offsets"][0]
        yield name, np.memmap(path, dtype, "r", start, tuple(entry["shape"])), is_bfloat16


def _turn_halves(values: Any, head_dim: int) -> Any:
    """Rows of heads [first half, second half], as transformers rotates them, to pairs by turns, as ggml does."""
    rows, columns = values.shape
    halves = values.reshape(rows // head_dim, 2, head_dim // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


# -- running -----------------------------------------------------------------------------------------------------------


class Engine:
    """A GGUF file in memory (not mapped: pages must not come from the disk while it is timed)."""

    def __init__(self, setup: Setup) -> None:
        self.nbytes = sum(
            int(tensor.n_bytes)
            for tensor in gguf.GGUFReader(setup.converted).tensors
            if len(tensor.shape) == 2 and tensor.name != "token_embd.weight"
        )
        self.versions = {"llama-cpp-python": version("llama-cpp-python")}
        self._llama = llama_cpp.Llama(
            str(setup.converted), n_ctx=setup.room, n_threads=setup.threads, n_threads_batch=setup.threads,
            n_batch=512, n_ubatch=512, use_mmap=False, logits_all=False, verbose=False,
        )  # fmt: skip

    def run(self, prompt: list[int], new: int, batch: int) -> Clock:
        require_one(batch)
        clock = Clock()
        llama = self._llama
        llama.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
        tokens = prompt
        clock.begin()
        for _ in range(new):
            llama.eval(tokens)
            tokens = [self._best()]
            clock.token(tokens[0])
        return clock

    def _best(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).argmax())
