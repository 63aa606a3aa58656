"""What each method of Quantize loses on one model: nats a token over the float model, through the pass itself.

    python -m benchmarks.methods examples/demo_model --text examples/demo_model/heldout.txt --calibration other.txt
    python -m benchmarks.methods MODEL --text stories.txt --pieces 'Once upon a time' --calibration stories.txt:200

Numbers after a colon skip as many of the calibration text's pieces, so that one file can serve for both.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from transformers import AutoTokenizer

import slim
from slim.runtime.perplexity import Passage, pieces, reading_length, score, windows

FORMATS = ('"int3"', '"int4"', '"int4", group_size=64', '"nf4"', '"int8"')
METHODS = ("rtn", "search", "hqq", "awq", "gptq", "best")


def calibration(spec: str, marker: str | None) -> list[str]:
    """The text of a file; or its pieces, from a given one on."""
    path, _, skipped = spec.partition(":")
    text = Path(path).read_text()
    if marker is None:
        return [text]
    return [marker + part for part in text.split(f"\n{marker}")[1:]][int(skipped or 0) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", required=True, metavar="FILE[:SKIP]")
    parser.add_argument("--pieces", metavar="MARKER", help="score pieces that begin so, each on its own")
    parser.add_argument("--limit", type=int, default=200, help="pieces, or thousands of tokens, to score")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    plain = slim.compile(options.model, target="eager")
    length, tokenizer = reading_length(plain), AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text()
    passages: list[Passage] = (
        pieces(text, tokenizer, length, options.pieces, options.limit)
        if options.pieces
        else windows(text, tokenizer, length, 1000 * options.limit)
    )
    exact = score(plain, passages)
    print(f"{options.model.name}: {exact.nats / exact.tokens:.4f} nats a token, {exact.tokens:,} tokens")
    data = calibration(options.calibration, options.pieces)
    for kind in options.formats:
        for method in options.methods:
            start = time.perf_counter()
            made = slim.compile(
                options.model, f'quantize({kind}, method="{method}")', calibration=data, target="eager", verify=False
            )
            found = score(made, passages)
            lost = found.nats / found.tokens - exact.nats / exact.tokens
            print(f"{kind:24} {method:8} {lost:+.4f}   {time.perf_counter() - start:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
