"""What pruning costs, by criterion and ratio: nats a held-out token, with nothing trained.

    python -m benchmarks.prune                     # every model, ratio and criterion; results/prune.json and .md
    python -m benchmarks.prune --models demo --ratios 0.2

Rows are measured one after another and kept: a run over some of them adds to the file.
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
from slim.passes import Prune
from slim.passes.pruning.sites import block_parameters
from slim.runtime.perplexity import score

RESULTS = Path(__file__).resolve().parent / "results" / "prune.json"
RATIOS = (0.1, 0.2, 0.3, 0.5)
PASSAGES = {"demo": 16}
CRITERIA = ("obs", "wanda", "flap", "taylor", "fisher", "magnitude", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--criteria", nargs="+", default=CRITERIA, choices=CRITERIA)
    parser.add_argument("--calibration", type=int, default=48, help="sequences")
    parser.add_argument("--passages", type=int, help="held-out ones to score (default: 60, of the demo model 16)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    for name in options.models:
        case = CASES[name]()
        held = {"calibration": options.calibration, "passages": options.passages or PASSAGES.get(name, 60)}
        _keep(options.output, name, "float", measure(case, None, **held))
        for ratio in options.ratios:
            for criterion in options.criteria:
                found = measure(case, Prune(ratio, criterion), **held)
                _keep(options.output, name, f"{ratio:g} {criterion}", found)
                print(
                    f"{name:14} {ratio:4.0%} {criterion:10} {found['nats']:.4f}  {found['seconds']:6.1f} s", flush=True
                )


def measure(case: Case, pass_: Prune | None, calibration: int, passages: int) -> dict[str, Any]:
    """Nats a token of the pruned model, the share of block parameters that went, and seconds."""
    start = time.perf_counter()
    passes = [] if pass_ is None else [pass_]
    made = slim.compile(case.model, passes, calibration=case.tensors()[:calibration], target="eager", verify=False)
    seconds = time.perf_counter() - start
    found = score(made, case.passages[:passages])
    parameters = block_parameters(made.program)
    return {"nats": found.nats / found.tokens, "tokens": found.tokens, "parameters": parameters, "seconds": seconds}


def _keep(path: Path, model: str, row: str, found: dict[str, Any]) -> None:
    results = read_kept(path)
    kept = results.setdefault(model, {})
    if any(each["tokens"] != found["tokens"] for each in kept.values()):
        raise SystemExit(f"{path} has rows of {model} over other passages: name another --output")
    kept[row] = found
    write_kept(path, results, table(results))


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Nats over the model as it was, a column a criterion; the last compares obs with the better of Wanda and FLAP."""
    lines = ["| model | ratio | " + " | ".join(CRITERIA) + " | obs by the better of wanda and flap |"]
    lines.append("|---" * (len(CRITERIA) + 3) + "|")
    for model, rows in results.items():
        for ratio in RATIOS:
            lost = {
                criterion: rows[key]["nats"] - rows["float"]["nats"]
                for criterion in CRITERIA
                if (key := f"{ratio:g} {criterion}") in rows
            }
            if not lost:
                continue
            cells = [f"{lost[c]:.3f}" if c in lost else "" for c in CRITERIA]
            peers = [lost[c] for c in ("wanda", "flap") if c in lost]
            share = f"{lost['obs'] / min(peers):.0%}" if peers and "obs" in lost else ""
            lines.append(f"| {model} | {ratio:.0%} | " + " | ".join(cells) + f" | {share} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
