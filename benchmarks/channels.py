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
from slim.compiler.passes_base import Context
from slim.compiler.residual import find_stream, untie
from slim.compiler.stack import find_blocks
from slim.compiler.statistics import site_values, walk
from slim.passes import FoldNorms, Prune
from slim.passes.pruning.channels import centre
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ratios", nargs="+", type=float, default=(0.1, 0.2, 0.3))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--whole", action="store_true", help="ratios of all parameters, those of tables and head too")
    parser.add_argument("--energy", action="store_true", help="what one rotation loses of the stream, and one a block")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = read_kept(options.output)
    for name in options.models:
        rows = kept.setdefault(name, {})
        if options.energy:
            rows["energy"] = {f"{ratio:g}": energy(name, ratio) for ratio in options.ratios}
            print(name, rows["energy"], flush=True)
            write_kept(options.output, kept, table(kept))
            continue
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


def energy(name: str, ratio: float) -> dict[str, float]:
    """The share of what readers see that is lost to one rotation, and to one a reader's input, at equal parameters.

    With a rotation a block two square matrices a block stand on the residual connection, so that fewer channels stay.
    """
    case = CASES[name]()
    program = slim.compile(case.model, [], target="eager", verify=False).program
    untie(program)
    FoldNorms().run(program, Context())
    program.clean()
    stream, ctx = find_stream(program), Context(calibration=case.tensors()[:48])
    centre(program, stream)
    walked = walk(program, site_values(stream.readers), ctx, asked_by="energy", gram=True, changes=False)
    grams = [found.gram.double() for block in walked for found in block.statistics.values() if found.gram is not None]
    width, blocks, numbers = stream.width, len(find_blocks(program)), block_parameters(program)
    one = int((1 - ratio) * width)
    many = next(k for k in range(one, 0, -1) if k / width * numbers + 2 * blocks * k * k <= (1 - ratio) * numbers)
    basis = torch.linalg.eigh(torch.stack([gram / gram.trace() for gram in grams]).mean(0)).eigenvectors.flip(1)
    shared = sum(1 - float((basis[:, :one].T @ gram @ basis[:, :one]).trace() / gram.trace()) for gram in grams)
    own = sum(1 - float(torch.linalg.eigvalsh(gram)[-many:].sum() / gram.trace()) for gram in grams)
    return {"channels": one, "lost": shared / len(grams), "channels a block": many, "lost a block": own / len(grams)}


def table(kept: dict[str, Any]) -> str:
    """Nats lost, and behind them the share of all parameters that went."""
    lines = ["| model | gone | of the | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 3) + "|"]
    for name, rows in kept.items():
        asked = {tuple(key.split()[:2]) for key in rows if key not in ("float", "energy")}
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
