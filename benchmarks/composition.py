"""What composes with what: every pair of passes in both orders on the demo model, and some longer pipelines.

    python -m benchmarks.composition                  # results/composition.json and .md
    python -m benchmarks.composition --only 'quantize*' --heldout 8

A cell is the loss in nats a held-out token over the float model, after the pass of its row and then the pass of its
column, or the reason why slim refuses that order. What is kept is written after every cell, so a run that is cut off
goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept import read_kept, write_kept
from benchmarks.quality_peers.cases import CASES, Case
from slim import errors
from slim.compiler.lift import lift_path
from slim.compiler.passes_base import Context, Pass
from slim.compiler.pipeline import check_order
from slim.compiler.program import Program
from slim.passes import parse_pipeline
from slim.runtime.compiled import CompiledModel
from slim.runtime.perplexity import score

RESULTS = Path(__file__).resolve().parent / "results" / "composition.json"
PASSES = (
    "fold_norms", "prune(0.2)", "gqa(0.5)", "low_rank(0.8)", "smooth_quant(0.5)",
    'quantize("int8", activations="int8")', 'quantize("int4")', 'quantize_kv("int4")',
    'sparse_attention("window", window=128)', "heal(10, tokens=1024)",
)  # fmt: skip
LONGER = (
    "prune(0.2), gqa(0.5), low_rank(0.8)",
    'prune(0.2), gqa(0.5), smooth_quant(0.5), quantize("int8", activations="int8"), quantize_kv("int4")',
    'prune(0.2), gqa(0.5), low_rank(0.8), quantize("int4"), quantize_kv("int4")',
    'prune(0.2), gqa(0.5), low_rank(0.8), quantize("int4"), quantize_kv("int4"), heal(100)',
)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    case = CASES[options.model]()
    chains = Chains(case, options.calibration)
    kept = read_kept(options.output)
    found: dict[str, Any] = kept.get(options.model, {})
    kept[options.model] = found
    for text in ["", *PASSES, *(f"{a}, {b}" for a in PASSES for b in PASSES if a != b), *LONGER]:
        if text in found or (options.only and not any(fnmatchcase(text, only) for only in options.only) and text):
            continue
        found[text] = _measured(case, chains, text, options.heldout)
        print(f"{text or 'float':80} {_told(found, text)}", flush=True)
        write_kept(options.output, kept, "\n".join(map(_tables, kept, kept.values())))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CASES, default="demo")
    parser.add_argument("--only", action="append", help="pipelines to measure, by pattern of their text")
    parser.add_argument("--heldout", type=int, default=8, help="passages of text (default: %(default)s)")
    parser.add_argument("--calibration", type=int, default=24, help="sequences (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


class Chains:
    """Programs after passes; what a pass alone makes of the model is kept for all that may follow it."""

    def __init__(self, case: Case, sequences: int) -> None:
        self.calibration = case.tensors()[:sequences]
        self.lifted = lift_path(case.model)
        self._kept: dict[Pass, Program] = {}

    def after(self, passes: Sequence[Pass]) -> Program:
        """As the pipeline runs them, but for its checks of what came out."""
        check_order(passes, self.lifted)
        program = self.lifted
        for place, pass_ in enumerate(passes):
            made = self._kept.get(pass_) if place == 0 else None
            program = made if made is not None else self._applied(program, pass_)
            if place == 0:
                self._kept[pass_] = program
        return program

    def _applied(self, program: Program, pass_: Pass) -> Program:
        made = program.copy()
        report = pass_.run(made, Context(calibration=self.calibration, original=self.lifted))
        made.clean()
        if not report.matched:
            reasons = list(dict.fromkeys(skip.reason for skip in report.skipped))
            raise errors.PassMatchedNothing(pass_name=repr(pass_), tried=len(report.skipped), reasons=reasons[:3])
        return made


def _measured(case: Case, chains: Chains, text: str, heldout: int) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        compiled = CompiledModel(chains.after(parse_pipeline(text)), "eager")
    except errors.SlimError as error:
        return {"refused": str(error).partition("\n")[0]}
    said = score(compiled, case.passages[:heldout])
    seconds = round(time.perf_counter() - start, 1)
    return {"nats": said.nats / said.tokens, "bytes": compiled.program.nbytes, "seconds": seconds}


def _told(found: dict[str, Any], text: str) -> str:
    value = found[text]
    return value["refused"][:100] if "refused" in value else f"{_lost(found, text)} {value['bytes'] / 1e6:.2f} MB"


def _lost(found: dict[str, Any], text: str) -> str:
    """Nothing where it was not measured."""
    value = found.get(text)
    if value is None:
        return ""
    if "nats" in value:
        return f"{value['nats'] - found['']['nats']:+.4f}"
    return "order" if "cannot run here" in value["refused"] else "nothing"


def _tables(model: str, found: dict[str, Any]) -> str:
    """The pairs, the longer pipelines, and the reasons of refusals."""
    lines = [f"# {model}: loss in nats a token after the row's pass and then the column's\n"]
    lines.append("| first, then | alone | " + " | ".join(f"`{b}`" for b in PASSES) + " |")
    lines.append("|" + "---|" * (len(PASSES) + 2))
    for a in PASSES:
        cells = [_lost(found, f"{a}, {b}") for b in PASSES]
        lines.append(f"| `{a}` | {_lost(found, a)} | " + " | ".join(cells) + " |")
    lines += ["", "| pipeline | loss | MB |", "|---|---|---|"]
    for text in LONGER:
        if "bytes" in found.get(text, {}):
            lines.append(f"| `{text}` | {_lost(found, text)} | {found[text]['bytes'] / 1e6:.2f} |")
    lines += ["", "What was refused, and the first pipeline that was for that reason:", ""]
    reasons = {value["refused"]: text for text, value in reversed(found.items()) if "refused" in value}
    lines += [f"- `{text}`: {reason}" for reason, text in reversed(reasons.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
