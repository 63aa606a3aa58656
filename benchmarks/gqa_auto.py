"""As many kv heads in every layer beside a number for each, at equal bytes of keys and values; nothing is trained.

    python -m benchmarks.gqa_auto                    # results/gqa_auto.json and .md

Both by the closed forms alone (``rounds=0``). The demo model is calibrated and scored as ``benchmarks.gqa`` does, the
others on 48 and 60 stories of ``benchmarks.quality_peers.cases``. Rows are kept: a run of some adds to the file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import slim
from benchmarks.kept import read_kept, write_kept
from benchmarks.quality_peers.cases import CASES, Case, shared
from slim.passes import GQA
from slim.runtime.perplexity import score

RESULTS = Path(__file__).resolve().parent / "results" / "gqa_auto.json"


@dataclass(frozen=True)
class Model:
    """Attributes:
    case: what makes it. calibration: sequences. passages: to score. shares: of the bytes of keys and values.
    """

    case: partial[Case] | Any
    calibration: int
    passages: int
    shares: tuple[float, ...]


MODELS = {
    "demo": Model(CASES["demo"], 64, 16, (0.5, 0.25)),
    "stories260K-mha": Model(partial(shared, "stories260K-mha"), 48, 60, (0.5, 0.25)),
    "babyllama361": Model(CASES["babyllama361"], 48, 60, (0.5, 0.25)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = read_kept(options.output)
    for name in options.models:
        model = MODELS[name]
        case = model.case()
        exact, _ = measured(case, model, None)
        held = json.loads((case.model / "config.json").read_text())["num_key_value_heads"]
        for share in model.shares:
            every, _ = measured(case, model, GQA(round(share * held), rounds=0))
            auto, heads = measured(case, model, GQA("auto", kv_bytes=share, rounds=0))
            row = {"every layer": every - exact, "auto": auto - exact, "kv heads": heads}
            kept.setdefault(name, {})[f"{share:g}"] = row
            print(f"{name:16} {share:.0%} {row}", flush=True)
            write_kept(options.output, kept, table(kept))


def measured(case: Case, model: Model, pass_: GQA | None) -> tuple[float, list[int]]:
    """Nats a token, and the kv heads of each layer."""
    passes = [] if pass_ is None else [pass_]
    calibration = case.tensors()[: model.calibration]
    made = slim.compile(case.model, passes, calibration=calibration, target="eager", verify=False)
    found = score(made, case.passages[: model.passages])
    keys: list[Any] = [node.args[1] for node in made.program.attention_nodes()]
    return found.nats / found.tokens, [int(key.meta["val"].shape[1]) for key in keys]


def table(kept: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = ["| model | bytes of keys and values | every layer | auto | kv heads |", "|---" * 5 + "|"]
    for name, rows in kept.items():
        for share, row in sorted(rows.items(), key=lambda item: -float(item[0])):
            heads = ", ".join(map(str, row["kv heads"]))
            lines.append(f"| {name} | {float(share):.0%} | {row['every layer']:.3f} | {row['auto']:.3f} | {heads} |")
    return "# Nats a held-out token over the model as it was\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
