"""Peak memory and time of compiling a large model by path, in a process of its own.

    python benchmarks/memory.py --out benchmarks/results/memory.json

Writes a random Llama (1.2B parameters, bfloat16, sharded safetensors) into a temporary directory, compiles it with
int8 weights in a fresh process, and reports that process's peak resident memory beside the size of the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
SHARD = 1 << 30


def write_model(directory: Path, tied: bool) -> int:
    """A random model as transformers would save it; returns the bytes of its weights."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SHAPE, tie_word_embeddings=tied, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    shards: list[dict[str, torch.Tensor]] = [{}]
    files: dict[str, int] = {}
    for name, shape in shapes.items():
        if sum(t.nbytes for t in shards[-1].values()) > SHARD:
            save_file(shards[-1], directory / f"model-{len(shards):05d}.safetensors", metadata={"format": "pt"})
            shards[-1].clear()
            shards.append({})
        scale = 1.0 if len(shape) == 1 else 1.0 / math.sqrt(shape[-1])
        shards[-1][name] = torch.ones(shape).bfloat16() if len(shape) == 1 else (torch.randn(shape) * scale).bfloat16()
        files[name] = len(shards)
    save_file(shards[-1], directory / f"model-{len(shards):05d}.safetensors", metadata={"format": "pt"})
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {n: f"model-{i:05d}.safetensors" for n, i in files.items()},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def measure(directory: str) -> dict[str, float]:
    """Compiles in this process; peak resident memory in bytes, seconds a stage."""
    import slim

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    compiled = slim.compile(directory, passes='quantize("int8")')
    seconds = time.perf_counter() - start
    stages = {f"seconds {name}": value for name, value in compiled.report.seconds.items()}
    stages |= {f"seconds pass {name}": value for name, value in compiled.report.passes[0].seconds.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "peak": peak,
        "after import": imported,
        "compiled bytes": compiled.program.nbytes,
        "seconds": seconds,
        **stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tied", action="store_true", help="one table for embedding and head")
    parser.add_argument("--keep", type=Path, help="where to keep the model (made there if absent)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.keep or Path(temporary)
        if not (directory / "config.json").exists():
            directory.mkdir(parents=True, exist_ok=True)
            write_model(directory, options.tied)
        weights = json.loads((directory / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        command = [sys.executable, __file__, "--measure", str(directory)]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
    found |= {"weights": weights, "peak beyond weights": found["peak"] - weights}
    for name, value in found.items():
        print(f"{name:24} {value:10.1f} s" if name.startswith("seconds") else f"{name:24} {value / 1e9:10.2f} GB")
    if options.out:
        about = {"date": str(date.today()), "machine": platform.processor() or platform.machine(),
                 "torch": torch.__version__, "python": platform.python_version(), "tied": options.tied}  # fmt: skip
        options.out.write_text(json.dumps({**about, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
