"""What LowRank loses beside the published methods, at equal stored numbers: nats a token over the float model.

    python -m benchmarks.low_rank                        # all models, rows and shares; results/low_rank.json and .md
    python -m benchmarks.low_rank --models demo --rows whitened svd_llm

Models and texts are those of ``benchmarks/quality.py``. What was measured is kept: a run that was cut off, or is of
some rows alone, adds to the file.
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
from slim.runtime.perplexity import score

RESULTS = Path(__file__).resolve().parent / "results" / "low_rank.json"
KEEPS = (0.8, 0.6)
ROWS = {  # name -> options beside the share, and what it is
    "whitened": ("", "LowRank's default"),
    "svd_llm": (', method="svd_llm"', "directions by inputs alone, two factors, the same share everywhere"),
    "asvd": (', method="asvd"', "columns scaled by the root of their inputs' mean magnitude"),
    "svd": (', method="svd"', "of the weights alone"),
    "unweighed": (', importance="none"', "the default without gradients: the same share everywhere"),
    "factors": (', storage="factors"', "the default held as two factors"),
    "and tables": (", embeddings=True, head=True", "the default, with the embedding and the head tied to it"),
    "tables": (', embeddings=True, head=True, exclude=["*layers*"]', "embedding and head alone"),
}
FLOAT = "float"
HEADER = """# Low rank, without training

Written by `python -m benchmarks.low_rank`: nats a held-out token above floating point, in brackets the share of
SVD-LLM's loss. All rows hold the same share of the numbers of the model's linears (the order of results is counted
in); head and embeddings are left alone where a row does not say otherwise.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--keeps", nargs="+", type=float, default=KEEPS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.models:
        case = CASES[name]()
        texts = {FLOAT: ""} | {
            f"{row} {keep:g}": f"low_rank({keep:g}{ROWS[row][0]})" for keep in options.keeps for row in options.rows
        }
        for key, text in texts.items():
            found = _measured(case, text)
            print(f"{name:14}{key:16}{found['nats'] / found['tokens']:.5f} nats, {found['seconds']} s", flush=True)
            _keep(name, key, found, options.output)


def _measured(case: Case, pipeline: str) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = slim.compile(case.model, pipeline, calibration=case.tensors(), target="eager", verify=False)
    seconds = round(time.perf_counter() - start, 1)
    found = score(compiled, case.passages)
    notes = [note for item in compiled.report.passes for note in item.notes if "numbers of" in note]
    return {"nats": found.nats, "tokens": found.tokens, "pipeline": pipeline, "held": notes, "seconds": seconds}


def _keep(model: str, key: str, found: dict[str, Any], output: Path) -> None:
    results = read_kept(output)
    results.setdefault(model, {})[key] = found
    write_kept(output, results, HEADER + "".join(_table(name, rows) for name, rows in results.items()))


def _table(model: str, found: dict[str, dict[str, Any]]) -> str:
    nats = {key: value["nats"] / value["tokens"] for key, value in found.items()}
    keeps = sorted({key.rpartition(" ")[2] for key in found if key != FLOAT}, reverse=True)
    lines = [f"\n## {model}\n", f"Float: {nats[FLOAT]:.5f} nats a token, perplexity {math.exp(nats[FLOAT]):.4f}.\n"]
    lines += [f"| | {' | '.join(f'keep {keep}' for keep in keeps)} | |", "|---|" + "---|" * (len(keeps) + 1)]
    for row, (_, told) in ROWS.items():
        cells = [_cell(nats, row, keep) for keep in keeps]
        if any(cells):
            lines.append(f"| {row} | {' | '.join(cells)} | {told} |")
    return "\n".join(lines) + "\n"


def _cell(nats: dict[str, float], row: str, keep: str) -> str:
    if f"{row} {keep}" not in nats:
        return ""
    lost, published = (nats.get(f"{name} {keep}", math.nan) - nats[FLOAT] for name in (row, "svd_llm"))
    return f"{lost:+.4f}" + (f" ({lost / published:.2f})" if row != "svd_llm" and published > 0 else "")


if __name__ == "__main__":
    main()
