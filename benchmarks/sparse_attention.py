"""What each pattern of SparseAttention keeps, and what it loses: the demo model on held-out text.

    python -m benchmarks.sparse_attention          # about four minutes, one thread; results/sparse_attention.json, .md
    python -m benchmarks.sparse_attention --rows window auto

Keys: of those that causality lets the queries of a passage see, the share that they keep, over all layers and heads.
Blocks: the same of blocks of 64 keys with any key in them, which is what the C++ kernels read at a time. What is chosen
by looking is counted on random queries and keys. Models and texts are those of ``benchmarks/quality.py``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept import read_kept, write_kept
from benchmarks.passes import measured
from benchmarks.quality_peers.cases import CASES, Case
from slim.compiler.patterns import DENSE
from slim.compiler.patterns.picture import kept_by_head, sees
from slim.compiler.program import Program
from slim.compiler.rules import argument

RESULTS = Path(__file__).resolve().parent / "results" / "sparse_attention.json"
BLOCK = 64
FLOAT = "dense"
ROWS = {
    FLOAT: "",
    "window": '"window", window=128, sinks=4',
    "window, no sinks": '"window", window=132, sinks=0',
    "strided": '"strided", window=64, stride=8',
    "fixed": '"fixed", block=64, summary=8',
    "longformer": '"longformer", window=128, global_tokens=32',
    "bigbird": '"bigbird", block=16, neighbours=4, global_tokens=16, random_blocks=4',
    "vertical_slash": '"vertical_slash", columns=64, slashes=64',
    "block_topk": '"block_topk", block=16, share=8',
    "block_topk, a quarter": '"block_topk", block=16, share=4',
    "auto, 90 %": '"auto", mass=0.9',
    "auto": '"auto"',
    "auto, 99 %": '"auto", mass=0.99',
    "windows, 90 %": '"auto", mass=0.9, among=("window",)',
    "windows": '"auto", among=("window",)',
    "windows, 99 %": '"auto", mass=0.99, among=("window",)',
}
HEADER = """# Sparse attention, without training

Written by `python -m benchmarks.sparse_attention`: nats a held-out token above dense attention, and the share of keys,
and of blocks of 64 keys, that queries still look at in passages of {length} tokens.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=["demo"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for model in options.models:
        case = CASES[model]()
        for row in dict.fromkeys([FLOAT, *options.rows]):
            found = _measured(case, ROWS[row])
            _keep(model, row, found, options.output)
            print(f"{row:24}{found['nats'] / found['tokens']:.5f} nats, keys {found['keys']:.3f}", flush=True)


def _measured(case: Case, options: str) -> dict[str, Any]:
    compiled, found = measured(case, f"sparse_attention({options})" if options else "")
    length = max(len(passage.tokens) for passage in case.passages)
    keys, blocks = kept(compiled.program, length)
    return {**found, "keys": keys, "blocks": blocks, "length": length}


def kept(program: Program, tokens: int) -> tuple[float, float]:
    """The shares of keys and of blocks that a passage of ``tokens`` still looks at."""
    seen = sees(tokens)
    totals = torch.zeros(4, dtype=torch.float64)
    for node in program.attention_nodes():
        heads = int(argument(node, "q").meta["val"].shape[1])
        left = kept_by_head(argument(node, "pattern") or DENSE, tokens, heads, seen).expand(heads, -1, -1)
        all_ = seen.expand_as(left)
        totals += torch.tensor([left.sum(), all_.sum(), _blocks(left), _blocks(all_)])
    return float(totals[0] / totals[1]), float(totals[2] / totals[3])


def _blocks(kept: torch.Tensor) -> int:
    """How many blocks of keys have any that is kept, over all queries."""
    whole = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % BLOCK))
    return int(whole.unflatten(-1, (-1, BLOCK)).any(-1).sum())


def _keep(model: str, row: str, found: dict[str, Any], output: Path) -> None:
    results = read_kept(output)
    results.setdefault(model, {})[row] = found
    header = HEADER.format(length=found["length"])
    write_kept(output, results, header + "".join(_table(name, rows) for name, rows in results.items()))


def _table(model: str, rows: dict[str, dict[str, Any]]) -> str:
    nats = {row: found["nats"] / found["tokens"] for row, found in rows.items()}
    lines = [f"\n## {model}\n", f"Dense: {nats[FLOAT]:.5f} nats a token, perplexity {math.exp(nats[FLOAT]):.4f}.\n"]
    lines += ["| pattern | keys | blocks | nats | perplexity |", "|---|---|---|---|---|"]
    for row in [row for row in ROWS if row in rows and row != FLOAT]:
        found = rows[row]
        lines.append(
            f"| `{found['passes'].removeprefix('sparse_attention(').removesuffix(')')}` | {found['keys']:.0%} "
            f"| {found['blocks']:.0%} | {nats[row] - nats[FLOAT]:+.4f} | {math.exp(nats[row]):.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
