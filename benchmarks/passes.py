"""What each pass alone does to the demo model: bytes, FLOPs, and nats on held-out text.

    python -m benchmarks.passes                      # results/passes.json and .md
    python -m benchmarks.passes --rows gqa "low rank"

The model and its texts are those of ``benchmarks/quality.py``: all of the held-out text in passages of 512 tokens,
other modules of Python's library for calibration. Each row is one run of the generated code on this machine. What was
measured is kept: a run of some rows alone adds to the file.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch

import slim
from benchmarks.kept import read_kept, write_kept
from benchmarks.quality_peers.cases import CASES, Case
from slim.compiler.report import short_bytes
from slim.runtime.perplexity import score

RESULTS = Path(__file__).resolve().parent / "results" / "passes.json"
TOKENS = 512  # that the FLOPs are for
FLOAT = "float32"
ROWS = {
    FLOAT: "",
    "norms": "fold_norms",
    "int8": 'quantize("int8")',
    "int4": 'quantize("int4")',
    "int3": 'quantize("int3")',
    "W8A8": 'quantize("int8", activations="int8")',
    "W8A8, smoothed": 'smooth_quant("search"), quantize("int8", activations="int8")',
    "kv int8": 'quantize_kv("int8")',
    "kv int4": 'quantize_kv("int4")',
    "gqa": "gqa(4)",
    "gqa, a quarter": "gqa(2)",
    "low rank": "low_rank(0.8)",
    "sparse": 'sparse_attention("auto")',
    "prune": "prune(0.2)",
    "prune, healed": "prune(0.2), heal(200)",
}
HEADER = """# What each pass does to the demo model

Written by `python -m benchmarks.passes`. Nats: a held-out token, above float32. Keys and values: bytes a token of all
layers. FLOPs: of reading {tokens} tokens.

| passes | weights | keys, values | FLOPs | perplexity | nats |
|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = CASES["demo"]()
    for row in options.rows:
        _, found = measured(case, ROWS[row])
        print(f"{row:16}{found['nats'] / found['tokens']:.5f} nats, {found['seconds']} s", flush=True)
        keep(options.output, row, found)


def measured(case: Case, passes: str) -> tuple[slim.CompiledModel, dict[str, Any]]:
    """The model after ``passes``, and what it holds, costs and loses."""
    start = time.perf_counter()
    compiled = slim.compile(case.model, passes, calibration=case.tensors(), verify=False)
    found, whole = score(compiled, case.passages), compiled.cost()
    return compiled, {
        "passes": passes, "nats": found.nats, "tokens": found.tokens, "weights": whole.weight_bytes,
        "kv": whole.kv_bytes_per_token, "flops": whole.bind(B=1, S=TOKENS, T=TOKENS).flops,
        "target": compiled.target.name, "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def keep(output: Path, row: str, found: dict[str, Any]) -> None:
    results = read_kept(output)
    results[row] = found
    lines = [_line(results[name], results.get(FLOAT)) for name in ROWS if name in results]
    write_kept(output, results, HEADER.format(tokens=TOKENS) + "\n".join(lines))


def _line(found: dict[str, Any], exact: dict[str, Any] | None) -> str:
    nats = found["nats"] / found["tokens"]
    lost = "" if exact is None or exact is found else f"{nats - exact['nats'] / exact['tokens']:+.4f}"
    name = f"`{found['passes']}`" if found["passes"] else "none: float32"
    sizes = f"{short_bytes(found['weights'])} | {found['kv']:,} B | {found['flops'] / 1e9:.2f} G"
    return f"| {name} | {sizes} | {math.exp(nats):.3f} | {lost} |"


if __name__ == "__main__":
    main()
