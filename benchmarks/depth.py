"""What whole blocks cost, by how they are chosen: nats a held-out token, with nothing trained.

python -m benchmarks.depth                     # results/depth.json and .md
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import slim
from benchmarks.kept import read_kept, write_kept
from benchmarks.quality_peers.cases import CASES
from slim.passes import Prune
from slim.runtime.perplexity import score

RESULTS = Path(__file__).resolve().parent / "results" / "depth.json"
PASSAGES = {"demo": 16}  # held-out ones; 60 elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--blocks", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = read_kept(options.output)
    for name in options.models:
        kept[name] = measure(name, options.blocks)
        print(name, kept[name], flush=True)
        write_kept(options.output, kept, table(kept))


def measure(name: str, depths: list[int]) -> dict[str, Any]:
    """Nats lost, and seconds of the pass, by number of blocks and way to choose them."""
    case = CASES[name]()
    calibration, passages = case.tensors()[:48], case.passages[: PASSAGES.get(name, 60)]

    def nats(passes: list[Prune]) -> tuple[float, list[str]]:
        made = slim.compile(case.model, passes, calibration=calibration, target="eager", verify=False)
        found = score(made, passages)
        return found.nats / found.tokens, made.report.passes[0].matched if passes else []

    before, _ = nats([])
    found: dict[str, Any] = {}
    for depth in depths:
        for blocks in ("loss", "influence"):
            start = time.perf_counter()
            after, gone = nats([Prune(depth=depth, blocks=blocks)])
            seconds = round(time.perf_counter() - start, 1)
            found[f"{depth} {blocks}"] = {"lost": after - before, "gone": gone, "seconds": seconds}
    return found


def table(kept: dict[str, Any]) -> str:
    lines = ["| model | blocks gone | loss | influence |", "|---|---|---|---|"]
    for name, found in kept.items():
        for depth in sorted({key.split()[0] for key in found}, key=int):
            cells = [f"{found[f'{depth} {blocks}']['lost']:.3f}" for blocks in ("loss", "influence")]
            lines.append(f"| {name} | {depth} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
