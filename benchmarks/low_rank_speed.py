"""Decoding with linears of low rank beside dense ones: a Llama with random weights, one interleaved run.

    python benchmarks/low_rank_speed.py                                   # 1B shape, bf16, int8 and int4 weights
    python benchmarks/low_rank_speed.py --shape 135m --weights int8 --rounds 3

Every linear but the head is a pair in pivot storage that holds the share of its numbers that --keeps says (the model
holds more: the head stays whole). How fast it is does not hang on what it computes, so the pairs are random. Each round
measures every model in turn (A B C, A B C); best and median of all rounds are printed, in milliseconds a token, with
how many times as fast as dense. Compare numbers of one run only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import slim  # noqa: E402
from benchmarks.pairs import RandomPairs  # noqa: E402
from benchmarks.peers.random_llama import SHAPES, ensure  # noqa: E402
from slim.passes import Quantize  # noqa: E402
from slim.runtime.compiled import CompiledModel  # noqa: E402


def built(
    folder: Path, keep: float, weights: Literal["bf16", "int8", "int4"], storage: Literal["pivot", "factors"]
) -> CompiledModel:
    passes: list[slim.passes.Pass] = [] if keep == 1 else [RandomPairs(keep, storage)]
    if weights != "bf16":
        group = 32 if weights == "int4" else None
        passes.append(Quantize(weights, group_size=group, method="rtn", head=True))
    return slim.compile(folder, passes, target="cpu", verify=False)


def seconds_a_token(model: CompiledModel, steps: int) -> float:
    """Of greedy steps over a short context."""
    prompt = torch.full((1, 8), 5)
    cache = model.new_cache(1, 8 + steps + 1)
    model(prompt[:, :-1], past_key_values=cache)
    start = time.perf_counter()
    model.generate(
        prompt, past_key_values=cache, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--vocabulary", type=int, help="smaller than the shape's: the head is dense in all models")
    parser.add_argument("--weights", nargs="+", default=["bf16", "int8", "int4"], choices=["bf16", "int8", "int4"])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--storage", default="pivot", choices=["pivot", "factors"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    layers, words = options.layers or shape.num_hidden_layers, options.vocabulary or shape.vocab_size
    shape = replace(shape, num_hidden_layers=layers, vocab_size=words)
    cache = Path(os.environ.get("SLIM_BENCH_CACHE", Path.home() / ".cache/slim-bench"))
    folder = cache / f"{options.shape}-{layers}-{words}" / "model"
    ensure(shape, folder)
    threads = torch.get_num_threads()
    print(f"{options.shape}, {layers} layers, {words} words, {options.storage}, {threads} threads", flush=True)
    results = []
    for weights in options.weights:
        models = {keep: built(folder, keep, weights, options.storage) for keep in (1, *options.keeps)}
        found: dict[float, list[float]] = {keep: [] for keep in models}
        for number in range(options.rounds + 1):
            for keep, model in models.items():
                seconds = seconds_a_token(model, options.steps)
                if number:  # round 0 warms up
                    found[keep].append(seconds)
        for keep, times in found.items():
            best, median = min(times), statistics.median(times)
            faster = min(found[1]) / best, statistics.median(found[1]) / median
            results.append({"weights": weights, "keep": keep, "best": best, "median": median, "faster": faster})
            print(
                f"{weights:<5} keep {keep:<4}   best {best * 1e3:7.2f} ms/token ({faster[0]:.2f} x)   "
                f"median {median * 1e3:7.2f} ({faster[1]:.2f} x)",
                flush=True,
            )
        del models
    if options.out is not None:
        options.out.write_text(json.dumps({"shape": options.shape, "storage": options.storage, "results": results}))


if __name__ == "__main__":
    main()
