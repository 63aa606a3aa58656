"""What kinds of steps and of text bring a pruned model back, in plain PyTorch: KL divergence from the original.

    python -m benchmarks.heal_steps                      # stories260K, four rows; results/heal_steps.json and .md
    python -m benchmarks.heal_steps --models babyllama361 --rows adamw orthogonal

The model is pruned by slim and exported; transformers trains all of its weights, tables too. Held out are the first
hundred stories of ``benchmarks.quality_peers.cases``, which is also where the texts are from.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

import slim
from benchmarks.kept import read_kept, write_kept
from benchmarks.quality_peers.cases import CASES, Case
from slim.compiler.objective import divergence
from slim.passes.healing.steps import Steps

RESULTS = Path(__file__).resolve().parent / "results" / "heal_steps.json"
HELD_OUT = 100  # stories
WRITTEN = 1536, 300  # stories that the original writes, and tokens of each
AT_ONCE = 12  # rows that run through the models together


@dataclass(frozen=True)
class Row:
    """How a model is trained.

    Attributes:
        orthogonal: whether matrices take orthogonal steps; else all take AdamW's.
        rate: as a share of each weight's size.
        rows: sequences of a step.
        written: whether the original's own stories are among the text.
    """

    orthogonal: bool
    rate: float
    rows: int = 24
    written: bool = False


ROWS = {
    "adamw": Row(False, 0.003),
    "orthogonal": Row(True, 0.01),
    "orthogonal, written": Row(True, 0.01, written=True),
    "orthogonal, written, 48 rows": Row(True, 0.015, 48, written=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=["stories260K"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, help="instead of the rows' own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.models:
        case = CASES[name](calibration=512)
        with tempfile.TemporaryDirectory() as folder:
            slim.compile(case.model, "prune(0.2)", calibration=case.tensors(), target="eager", verify=False).export(
                f"{folder}/pruned"
            )
            for row in options.rows:
                how = ROWS[row] if options.rate is None else Row(**{**asdict(ROWS[row]), "rate": options.rate})
                found = _measured(case, Path(folder) / "pruned", how, options.steps)
                print(f"{name} {row}: {found}", flush=True)
                kept = read_kept(options.output)
                kept.setdefault(name, {})[f"{row}, {how.rate}, {options.steps} steps"] = found
                write_kept(options.output, kept, _table(kept))


def _measured(case: Case, pruned: Path, how: Row, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    teacher, student = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (case.model, pruned))
    text = [list(ids) for ids in case.calibration]
    if how.written:
        text += _write(teacher)
    held_out = [list(passage.tokens) for passage in case.passages[:HELD_OUT]]
    start, before = time.perf_counter(), _score(student, teacher, held_out)
    _train(student, teacher, text, how, steps)
    after = _score(student, teacher, held_out)
    return {
        "before": before, "after": after, "tokens": sum(map(len, text)), "seconds": round(time.perf_counter() - start)
    }  # fmt: skip


@torch.no_grad()
def _write(teacher: Any) -> list[list[int]]:
    stories, tokens = WRITTEN
    found: list[list[int]] = []
    while len(found) < stories:
        found += teacher.generate(
            torch.ones(256, 1, dtype=torch.long), do_sample=True, max_new_tokens=tokens, top_k=0, eos_token_id=None,
            pad_token_id=0,
        ).tolist()  # fmt: skip
    return found


def _train(student: Any, teacher: Any, text: Sequence[list[int]], how: Row, steps: int) -> None:
    """Changes weights by steps that are shares of their sizes, as ``Heal`` does."""
    weights = [(name, weight, max(1e-3, float(weight.detach().square().mean().sqrt()))) for name, weight in
               student.named_parameters()]  # fmt: skip
    whole = [how.orthogonal and weight.dim() == 2 and "embed" not in name for name, weight, _ in weights]
    changes = [torch.zeros_like(weight, requires_grad=True) for _, weight, _ in weights]
    matrices, others = (
        [change for change, one in zip(changes, whole, strict=True) if one is kind] for kind in (True, False)
    )
    optimizer = Steps(matrices, others, how.rate)
    began = [weight.detach().clone() for _, weight, _ in weights]
    for step, rows in enumerate(_batches(text, how.rows, steps)):
        student.zero_grad()
        total = sum(map(len, rows))
        for part in _parts(rows):
            (_distance(student, teacher, part) * sum(map(len, part)) / total).backward()
        warm = max(1, round(0.05 * steps))
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = how.rate * ((step + 1) / warm if step < warm else cosine)
        for change, (_, weight, size) in zip(changes, weights, strict=True):
            change.grad = weight.grad * size
        optimizer.step()
        with torch.no_grad():
            for change, first, (_, weight, size) in zip(changes, began, weights, strict=True):
                weight.copy_(first + size * change)


def _batches(text: Sequence[list[int]], rows: int, steps: int) -> Iterator[list[list[int]]]:
    waiting: list[int] = []
    for _ in range(steps):
        if len(waiting) < rows:
            waiting += torch.randperm(len(text)).tolist()
        yield sorted((text[waiting.pop()] for _ in range(rows)), key=len)


def _parts(rows: Sequence[list[int]]) -> Iterator[Sequence[list[int]]]:
    yield from (rows[first : first + AT_ONCE] for first in range(0, len(rows), AT_ONCE))


def _distance(student: Any, teacher: Any, rows: Sequence[list[int]]) -> Tensor:
    longest = max(map(len, rows))
    tokens = torch.stack([pad(torch.tensor(row), (0, longest - len(row))) for row in rows])
    real = torch.stack([torch.arange(longest) < len(row) for row in rows])
    with torch.no_grad():
        wanted = teacher(tokens).logits[real]
    return divergence(student(tokens).logits[real], wanted, "forward", 1.0)


@torch.no_grad()
def _score(student: Any, teacher: Any, rows: Sequence[list[int]]) -> float:
    total = sum(map(len, rows))
    parts = _parts(sorted(rows, key=len))
    return sum(float(_distance(student, teacher, part)) * sum(map(len, part)) / total for part in parts)


def _table(kept: dict[str, Any]) -> str:
    lines = ["KL divergence from the original, nats a held-out token, behind `prune(0.2)` and after training.", ""]
    lines += ["| model | steps | tokens of text | before | after | seconds |", "|---|---|---|---|---|---|"]
    for name, rows in kept.items():
        for row, found in rows.items():
            lines.append(
                f"| {name} | {row} | {found['tokens']:,} | {found['before']:.4f} | {found['after']:.4f} "
                f"| {found['seconds']} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
