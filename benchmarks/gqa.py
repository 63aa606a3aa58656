"""What fewer kv heads cost the demo model, by method, with nothing trained: nats a held-out token, and seconds.

    python -m benchmarks.gqa                         # results/gqa.json and .md
    python -m benchmarks.gqa --kv-heads 1 --rows rounds

Calibration is 32,768 tokens of modules of Python's library; scored are the first passages of other modules, which the
model has not seen. Rows are kept: a run of some adds to the file.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

import slim
from benchmarks.kept import read_kept, write_kept
from benchmarks.quality_peers.cases import CASES, Case
from slim.passes import GQA
from slim.runtime.perplexity import score

RESULTS = Path(__file__).resolve().parent / "results" / "gqa.json"
FLOAT = "float"
ROWS: dict[str, dict[str, Any]] = {
    "mean": {"method": "mean"},
    "procrustes": {"method": "procrustes"},
    "closed": {"rounds": 0},
    "rounds": {},
}
TITLES = {
    "mean": "mean", "procrustes": "Procrustes, mean, norm", "closed": "closed forms (`rounds=0`)",
    "rounds": "and three rounds (the default)",
}  # fmt: skip
ASKED = {4: 1 / 10, 2: 1 / 6, 1: 1 / 5}  # of mean pooling, at most
HEADER = """# What fewer kv heads cost the demo model

Written by `python -m benchmarks.gqa`. Nats a held-out token above the model as it was ({nats:.3f}), {tokens:,} tokens;
{calibration:,} tokens of calibration; nothing is trained. In brackets: seconds of compiling, {threads} thread(s).

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-heads", nargs="+", type=int, default=list(ASKED), choices=list(ASKED))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--calibration", type=int, default=64, help="sequences")
    parser.add_argument("--passages", type=int, default=16, help="held-out passages to score")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    case = CASES["demo"]()
    keep(options.output, FLOAT, measured(case, None, options))
    for kv_heads in options.kv_heads:
        for row in options.rows:
            found = measured(case, GQA(kv_heads, **ROWS[row]), options)
            keep(options.output, f"{kv_heads} {row}", found)
            print(f"{kv_heads} {row:11} {found['nats'] / found['tokens']:.4f} {found['seconds']:6.1f} s", flush=True)


def measured(case: Case, pass_: GQA | None, options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    calibration = case.tensors()[: options.calibration]
    passes = [] if pass_ is None else [pass_]
    made = slim.compile(case.model, passes, calibration=calibration, target="eager", verify=False)
    seconds = time.perf_counter() - start
    found = score(made, case.passages[: options.passages])
    return {
        "nats": found.nats, "tokens": found.tokens, "seconds": round(seconds, 1), "threads": options.threads,
        "calibration": sum(each.numel() for each in calibration),
    }  # fmt: skip


def keep(output: Path, row: str, found: dict[str, Any]) -> None:
    results = read_kept(output)
    results[row] = found
    write_kept(output, results, table(results))


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each number of heads; the last two columns compare the last method with mean pooling."""
    exact = results[FLOAT]
    each = {name: found["nats"] / found["tokens"] for name, found in results.items()}
    lines = [f"| kv heads | {' | '.join(TITLES.values())} | of mean | asked for |", "|---" * (len(ROWS) + 3) + "|"]
    for kv_heads, asked in ASKED.items():
        lost = {row: each[key] - each[FLOAT] for row in ROWS if (key := f"{kv_heads} {row}") in each}
        cells = [
            f"{lost[row]:.3f} ({results[f'{kv_heads} {row}']['seconds']:.0f})" if row in lost else "" for row in ROWS
        ]
        share = f"{lost['rounds'] / lost['mean']:.3f}" if {"rounds", "mean"} <= lost.keys() else ""
        lines.append(f"| 8 to {kv_heads} | {' | '.join(cells)} | {share} | {asked:.3f} |")
    told = {name: exact[name] for name in ("tokens", "calibration", "threads")}
    return HEADER.format(nats=each[FLOAT], **told) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
