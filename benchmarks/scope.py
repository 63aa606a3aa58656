"""What it gains to let layers lose different numbers of units: nats a held-out token, by scope and ratio.

python -m benchmarks.scope                     # results/scope.json and .md
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import slim
from benchmarks.kept import read_kept, write_kept
from benchmarks.quality_peers.cases import CASES, Case
from slim.passes import Prune
from slim.runtime.perplexity import Passage, score

RESULTS = Path(__file__).resolve().parent / "results" / "scope.json"
SCOPES: dict[str, dict[str, Any]] = {
    "layer": {"reload": False},
    "global": {"reload": False, "scope": "global"},
    "global fisher": {"reload": False, "scope": "global", "criterion": "fisher", "refit": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["babyllama361", "stories260K"], choices=list(CASES))
    parser.add_argument("--ratios", nargs="+", type=float, default=(0.2, 0.3))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = read_kept(options.output)
    for name in options.models:
        case = CASES[name]()
        calibration, passages = case.tensors()[:48], case.passages[:60]

        def nats(
            passes: list[Prune], case: Case = case, calibration: list[Tensor] = calibration,
            passages: tuple[Passage, ...] = passages,
        ) -> float:  # fmt: skip
            made = slim.compile(case.model, passes, calibration=calibration, target="eager", verify=False)
            found = score(made, passages)
            return found.nats / found.tokens

        before = nats([])
        for ratio in options.ratios:
            for scope, more in SCOPES.items():
                lost = nats([Prune(ratio, **more)]) - before
                kept.setdefault(name, {})[f"{ratio:g} {scope}"] = lost
                print(f"{name:14} {ratio:.0%} {scope:14} {lost:.4f}", flush=True)
        write_kept(options.output, kept, table(kept))


def table(kept: dict[str, dict[str, float]]) -> str:
    lines = ["| model | ratio | " + " | ".join(SCOPES) + " |", "|---" * (len(SCOPES) + 2) + "|"]
    for name, found in kept.items():
        for ratio in sorted({key.split()[0] for key in found}, key=float):
            cells = [f"{found[f'{ratio} {scope}']:.3f}" for scope in SCOPES]
            lines.append(f"| {name} | {float(ratio):.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
