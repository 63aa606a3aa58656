"""What SmoothQuant does for W8A8 on the demo model, with and without planted outliers.

    python -m benchmarks.smoothing [MODEL] [--tokens N]

Prints nats a token over the float model, and the error of int8 products over all sites. Text: the first half of the
demo model's held-out text; calibration: 16 passages of the second.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

import slim
from benchmarks.outliers import PlantOutliers
from slim.compiler.passes_base import Context, Pass
from slim.compiler.scaling import scale_sites
from slim.compiler.statistics import collect
from slim.passes import Quantize, SmoothQuant
from slim.passes.smooth_quant import rounding_errors
from slim.runtime.perplexity import reading_length, score, windows

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
TEXT = DEMO / "heldout.txt"
PASSAGES, LETTERS = 16, 1500
SMOOTHING: dict[str, tuple[Pass, ...]] = {
    "none": (),
    "alpha 0.5": (SmoothQuant(0.5),),
    "alpha 0.8": (SmoothQuant(0.8),),
    "search": (SmoothQuant("search"),),
}
OUTLIERS: dict[str, tuple[Pass, ...]] = {
    "none": (),
    "60 x": (PlantOutliers(60.0),),
    "1000 x": (PlantOutliers(1000.0),),
}


class Bench:
    """One model, the text it is scored on and the text it is calibrated on."""

    def __init__(self, path: Path, tokens: int) -> None:
        text = TEXT.read_text()
        half = len(text) // 2
        self.path = path
        self.calibration = [text[half + i * LETTERS : half + (i + 1) * LETTERS] for i in range(PASSAGES)]
        length = reading_length(slim.compile(path, target="eager"))
        self.passages = windows(text[:half], AutoTokenizer.from_pretrained(path), length, tokens)

    def nats(self, passes: Sequence[Pass]) -> float:
        compiled = slim.compile(self.path, passes=passes, calibration=self.calibration or None, target="eager")
        measured = score(compiled, self.passages)
        return measured.nats / measured.tokens

    def product_error(self, passes: Sequence[Pass]) -> float:
        """The mean over sites of |Q(X) Q(W)^T - X W^T|^2 / |X W^T|^2."""
        program = slim.compile(self.path, passes=passes, calibration=self.calibration, target="eager").program
        sites, _ = scale_sites(program)
        context = Context(calibration=self.calibration)
        values = list(dict.fromkeys(value for site in sites for value in site.values))
        held = collect(program, values, context, asked_by="bench", rows=256)
        found = [rounding_errors(program, site, held, [torch.ones(site.size)]) / len(site.readers) for site in sites]
        return float(torch.cat(found).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--tokens", type=int, default=8_000)
    options = parser.parse_args()
    bench = Bench(options.model, options.tokens)
    exact = bench.nats(())
    print(
        f"{options.model.name}: float {exact:.4f} nats a token, {sum(len(p.tokens) for p in bench.passages):,} tokens"
    )
    print("\n| outliers | smoothing | nats lost | error of products |\n| :-- | :-- | --: | --: |")
    for outliers, plant in OUTLIERS.items():
        for smoothing, smooth in SMOOTHING.items():
            lost = bench.nats((*plant, *smooth, Quantize("int8", activations="int8", method="rtn"))) - exact
            print(
                f"| {outliers} | {smoothing} | {lost:+.5f} | {bench.product_error((*plant, *smooth)):.2e} |", flush=True
            )


if __name__ == "__main__":
    main()
