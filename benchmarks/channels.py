"""What channels of the residual stream cost beside neurons and heads: nats a held-out token, with nothing trained.

python -m benchmarks.channels                     # results/channels.json and .md
python -m benchmarks.channels --whole             # the same shares of all parameters, not of the blocks' alone
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
from slim.passes.pruning.sites import block_parameters
from slim.runtime.perplexity import score

RESULTS = Path(__file__).resolve().parent / "results" / "channels.json"
PASSAGES = {"demo": 16}  # held-out ones; 60 elsewhere
BLOCKS, WHOLE = "blocks", "model"  # what a ratio is of
_CHANNELS: dict[str, Any] = {"units": "channels", "multiple": 1, "reload": False}
WAYS: dict[str, dict[str, Any]] = {
    "neurons and heads": {},
    "neurons": {"units": "neurons"},
    "channels": _CHANNELS,
    "not fitted": {**_CHANNELS, "refit": False},
    "magnitude": {**_CHANNELS, "criterion": "magnitude"},
    "random": {**_CHANNELS, "criterion": "random"},
    "half by channels": {},
}


def passes(way: str, ratio: float, whole: int | None) -> list[Prune]:
    """What takes ``ratio`` of the blocks' parameters, or leaves no more of all than ``whole``."""
    if way == "half by channels":  # two passes, as much of what is there by each
        each = 1 - (1 - ratio) ** 0.5
        first = Prune(each, **_CHANNELS)
        return [first, Prune(each) if whole is None else Prune(parameters=whole)]
    return [Prune(ratio, **WAYS[way]) if whole is None else Prune(parameters=whole, **WAYS[way])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ratios", nargs="+", type=float, default=(0.1, 0.2, 0.3))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--whole", action="store_true", help="ratios of all parameters, those of tables and head too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = read_kept(options.output)
    for name in options.models:
        rows = kept.setdefault(name, {})
        rows["float"] = measure(name, [])
        for ratio in options.ratios:
            for way in options.ways:
                most = int((1 - ratio) * rows["float"]["all"]) if options.whole else None
                found = measure(name, passes(way, ratio, most))
                rows[f"{ratio:g} {WHOLE if options.whole else BLOCKS} {way}"] = found
                print(f"{name:14} {ratio:.0%} {way:18} {found['nats'] - rows['float']['nats']:.4f}", flush=True)
                write_kept(options.output, kept, table(kept))


def measure(name: str, passes: list[Prune]) -> dict[str, Any]:
    """Nats a token, numbers of the blocks and of the whole model, and seconds."""
    case = CASES[name]()
    start = time.perf_counter()
    made = slim.compile(case.model, passes, calibration=case.tensors()[:48], target="eager", verify=False)
    seconds = round(time.perf_counter() - start, 1)
    found = score(made, case.passages[: PASSAGES.get(name, 60)])
    program = made.program
    return {
        "nats": found.nats / found.tokens, "blocks": block_parameters(program), "all": program.parameters,
        "seconds": seconds,
    }  # fmt: skip


def table(kept: dict[str, Any]) -> str:
    """Nats lost, and behind them the share of all parameters that went."""
    lines = ["| model | gone | of the | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 3) + "|"]
    for name, rows in kept.items():
        asked = {tuple(key.split()[:2]) for key in rows if key != "float"}
        for ratio, of in sorted(asked, key=lambda each: (each[1], float(each[0]))):
            cells = [_cell(rows.get(f"{ratio} {of} {way}"), rows["float"]) for way in WAYS]
            lines.append(f"| {name} | {float(ratio):.0%} | {of} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any] | None, before: dict[str, Any]) -> str:
    if found is None:
        return ""
    share = 1 - found["all"] / before["all"]
    return f"{found['nats'] - before['nats']:.3f} ({max(share, 0.0):.0%})"


if __name__ == "__main__":
    main()
