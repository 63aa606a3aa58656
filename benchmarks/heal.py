"""What healing brings back: pipelines without and with ``heal``, on the models and texts of ``benchmarks.quality``.

python -m benchmarks.heal                                     # results/heal.json and .md
python -m benchmarks.heal --models demo --steps 200 --lossy 'prune(0.2)' 'gqa(1)'
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import slim
from benchmarks.kept import read_kept, write_kept
from benchmarks.quality_peers.cases import CASES, Case
from slim.runtime.perplexity import score

RESULTS = Path(__file__).resolve().parent / "results" / "heal.json"
LOSSY = ("prune(0.2)",)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    kept = read_kept(options.output)
    for name in options.models:
        case = CASES[name](calibration=options.sequences)
        found = kept.setdefault(name, {})
        healing = f"heal({options.steps}{f', tokens={options.tokens}' if options.tokens else ''})"
        for text in ["", *(each for lossy in options.lossy for each in (lossy, f"{lossy}, {healing}"))]:
            if text and text in found and not options.again:
                continue
            found[text] = _measured(case, text)
            lost = found[text]["nats"] - found[""]["nats"]
            print(f"{name:14} {text or 'float':60} {lost:+.4f} {found[text]['seconds']} s", flush=True)
            write_kept(options.output, kept, _table(kept))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--lossy", nargs="+", default=list(LOSSY), help="pipelines to heal")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, help="of a step (default: heal's)")
    parser.add_argument("--sequences", type=int, default=512, help="of calibration (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure what the file holds anew")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def _measured(case: Case, text: str) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = slim.compile(case.model, text, calibration=case.tensors(), target="eager", verify=False)
    seconds = round(time.perf_counter() - start, 1)
    said = score(compiled, case.passages)
    notes = compiled.report.passes[-1].notes if text else []
    return {"nats": said.nats / said.tokens, "seconds": seconds, "notes": notes}


def _table(kept: dict[str, Any]) -> str:
    lines = ["Loss in nats a held-out token over the float model; seconds are those of the compilation.", ""]
    lines += ["| model | pipeline | loss | seconds |", "|---|---|---|---|"]
    for name, found in kept.items():
        for text, value in found.items():
            if text:
                lines.append(f"| {name} | `{text}` | {value['nats'] - found['']['nats']:+.4f} | {value['seconds']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
