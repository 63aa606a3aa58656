"""Decoding after prune, gqa, smooth_quant and quantize in one call, beside the model as it was: one interleaved run.

    python -m benchmarks.one_call              # results/one_call.json and .md
    python -m benchmarks.one_call --layers 4 --rounds 3

A Llama of random weights in the shape of one with 135M parameters; what it computes does not matter to its speed.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import slim
from benchmarks.kept import write_kept
from benchmarks.peers.random_llama import SHAPES, ensure
from slim.compiler.cost import cost
from slim.runtime.speed import measure

RESULTS = Path(__file__).resolve().parent / "results" / "one_call.json"
PIPELINES = (
    "",
    'prune(0.2, "magnitude", units="neurons")',
    'quantize("int8")',
    'prune(0.2, "magnitude", units="neurons"), quantize("int8")',
    'prune(0.2, "magnitude", units="neurons"), gqa(1, method="mean"), smooth_quant, '
    'quantize("int8", activations="int8")',
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = replace(SHAPES[options.shape], num_hidden_layers=options.layers, vocab_size=options.vocabulary)
    cache = Path(os.environ.get("SLIM_BENCH_CACHE", Path.home() / ".cache/slim-bench"))
    folder = cache / f"{options.shape}-{options.layers}-{options.vocabulary}" / "model"
    ensure(shape, folder)
    calibration = [torch.randint(3, options.vocabulary, (2, 64))]
    models = {}
    for text in PIPELINES:
        read = calibration if "smooth_quant" in text else None
        models[text] = slim.compile(folder, text, calibration=read, target="cpu", verify=False)
    speeds = measure(models, torch.randint(3, options.vocabulary, (1, 16)), options.tokens, options.rounds)
    rows = []
    for text, speed in speeds.items():
        moved = cost(models[text].program).bind(B=1, S=1, T=32).bytes_moved
        rows.append({
            "pipeline": text, "bytes": moved, "best": speed.decode.best, "median": speed.decode.median
        })  # fmt: skip
    write_kept(options.output, {"shape": options.shape, "layers": options.layers, "rows": rows}, table(rows))
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| pipeline | MB moved a token | of the float model | tokens/s, best (median) | times as fast |",
        "|---|---|---|---|---|",
    ]
    first = rows[0]
    for row in rows:
        share, faster = row["bytes"] / first["bytes"], row["best"] / first["best"]
        lines.append(
            f"| `{row['pipeline'] or 'float'}` | {row['bytes'] / 1e6:.1f} | {share:.2f} | "
            f"{row['best']:.1f} ({row['median']:.1f}) | {faster:.2f} (bytes: {1 / share:.2f}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
