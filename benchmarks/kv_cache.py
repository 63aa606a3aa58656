"""Decoding over smaller caches at long contexts: a Llama with random weights, one interleaved run.

    python benchmarks/kv_cache.py                     # 135M shape, int8 weights, caches of float32, int8 and int4
    python benchmarks/kv_cache.py --shape 135m-mha --kv-heads 8 4 2 1 --contexts 2048  # float32, fewer kv heads
    python benchmarks/kv_cache.py --shape 15m --contexts 512 --rounds 3

The contexts are not read but filled with random keys and values: how fast a step is does not hang on what it sees.
Every round measures each cache in turn (A B C, A B C); best and median of all rounds are printed. Compare numbers of
one run only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import slim  # noqa: E402
from benchmarks.peers.random_llama import SHAPES, ensure  # noqa: E402
from slim.runtime.cache import KVCache  # noqa: E402
from slim.runtime.compiled import CompiledModel  # noqa: E402

CACHES: tuple[Literal["int8", "int4"] | None, ...] = (None, "int8", "int4")


class Decoding:
    """Greedy steps over a cache that holds ``context`` tokens."""

    def __init__(self, model: CompiledModel, context: int, steps: int) -> None:
        cache = model.new_cache(1, context + steps + 1)
        assert isinstance(cache, KVCache)  # pages count each row's tokens; to set one length would not do
        for tensor in cache.tensors:
            if tensor.is_floating_point():
                tensor.uniform_(-0.02, 0.02)
            else:
                tensor.random_(0, 127)
        self.model, self.cache, self.context, self.steps = model, cache, context, steps
        self.prompt = torch.full((1, context + 1), 5)

    def seconds_a_token(self) -> float:
        self.cache.length = self.context
        start = time.perf_counter()
        self.model.generate(
            self.prompt, past_key_values=self.cache, max_new_tokens=self.steps, min_new_tokens=self.steps,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return (time.perf_counter() - start) / self.steps


def compared(folder: Path, passes: str, kv_heads: list[int] | None) -> Iterator[tuple[str, CompiledModel]]:
    """The models, by what their caches are; means of heads are as fast as any other merging of them."""
    if kv_heads is None:
        for dtype in CACHES:
            cache = slim.KVCacheConfig(dtype=dtype)
            yield dtype or "float32", slim.compile(folder, passes, target="cpu", verify=False, kv_cache=cache)
        return
    for number in kv_heads:
        fewer = "" if number == kv_heads[0] else f'gqa({number}, method="mean"), '
        yield f"{number} heads", slim.compile(folder, fewer + passes, target="cpu", verify=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135m", choices=list(SHAPES))
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--weights", default="int8", choices=["int8", "int4"])
    parser.add_argument("--kv-heads", type=int, nargs="+", help="compare numbers of kv heads, the model's own first")
    options = parser.parse_args()
    folder = Path(os.environ.get("SLIM_BENCH_CACHE", Path.home() / ".cache/slim-bench")) / options.shape / "model"
    ensure(SHAPES[options.shape], folder)
    models = dict(compared(folder, f'quantize("{options.weights}")', options.kv_heads))
    print(f"{options.shape}, weights {options.weights}, {torch.get_num_threads()} threads")
    for context in options.contexts:
        runs = {name: Decoding(model, context, options.steps) for name, model in models.items()}
        found: dict[str, list[float]] = {name: [] for name in models}
        for number in range(options.rounds + 1):
            for name, run in runs.items():
                seconds = run.seconds_a_token()
                if number:  # round 0 warms up
                    found[name].append(seconds)
        plain = next(iter(found.values()))
        for name, times in found.items():
            best, median = min(plain) / min(times), statistics.median(plain) / statistics.median(times)
            print(
                f"context {context:>5}  cache {name:<10} {runs[name].cache.nbytes / 1e6:7.1f} MB   "
                f"best {min(times) * 1e3:6.2f} ms/token ({best:.2f} x)   "
                f"median {statistics.median(times) * 1e3:6.2f} ({median:.2f} x)"
            )


if __name__ == "__main__":
    main()
