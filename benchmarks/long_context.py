"""Long contexts and many requests: what patterns, smaller caches, rings and continuous batching gain.

    python benchmarks/long_context.py                       # everything; results/long_context.{json,md}
    python benchmarks/long_context.py --only decode --rounds 3
    python benchmarks/long_context.py --only endless --tokens 20000

prefill   8192 tokens, dense and with a window of 1024: a Llama of 135M with random weights
decode    at context 8192: caches of float32 and int8, dense and with the best eighth of blocks of two sizes.
          Contexts are filled with random keys and values: how fast a step is does not hang on what it sees
batching  32 requests of ragged lengths, one after another and together
endless   tokens written over a ring of 256 and 4 sinks: seconds a token and resident memory along the way; and the
          perplexity of a long text over that ring beside that of windows of 260 tokens run anew (a real small model)

Every round measures each variant in turn (A B A B); best and median. Compare numbers of one run only.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import slim  # noqa: E402
from benchmarks.kept import read_kept, write_kept  # noqa: E402
from benchmarks.kv_cache import Decoding  # noqa: E402
from benchmarks.peers.random_llama import SHAPES, ensure  # noqa: E402

SHARED = ROOT.parent / "shared"
BLOCKS = (16, 64)  # tokens; an eighth of them is chosen


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each, best and median, after a round that warms up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            seconds = run()
            if number:
                found[name].append(seconds)
    return {name: {"best": min(all_), "median": statistics.median(all_)} for name, all_ in found.items()}


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def model_folder() -> Path:
    folder = Path(os.environ.get("SLIM_BENCH_CACHE", Path.home() / ".cache/slim-bench")) / "135m" / "model"
    ensure(SHAPES["135m"], folder)
    return folder


def compiled(passes: str, **options: Any) -> slim.CompiledModel:
    return slim.compile(model_folder(), passes, target="cpu", verify=False, **options)


def prefill(options: argparse.Namespace) -> dict[str, Any]:
    tokens = torch.randint(0, SHAPES["135m"].vocab_size, (1, options.context))
    passes = {"dense": "", "window 1024": 'sparse_attention("window", window=1024), '}
    models = {name: compiled(text + 'quantize("int8")') for name, text in passes.items()}
    runs = {
        name: partial(timed, partial(model.generate, tokens, max_new_tokens=1, eos_token_id=None))
        for name, model in models.items()
    }
    return interleaved(runs, max(2, options.rounds // 2))


def decode(options: argparse.Namespace) -> dict[str, Any]:
    weights = f'quantize("{options.weights}")'
    int8 = slim.KVCacheConfig(dtype="int8")
    models = {"float32": compiled(weights), "int8": compiled(weights, kv_cache=int8)}
    for block in BLOCKS:
        passes = f'sparse_attention("block_topk", block={block}, share=8), {weights}'
        models[f"float32, 1/8 of blocks of {block}"] = compiled(passes)
        models[f"int8, 1/8 of blocks of {block}"] = compiled(passes, kv_cache=int8)
    runs = {name: Decoding(model, options.context, options.steps) for name, model in models.items()}
    found = interleaved({name: run.seconds_a_token for name, run in runs.items()}, options.rounds)
    for name, run in runs.items():
        found[name]["cache MB"] = run.cache.nbytes / 1e6
    return found


def batching(options: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(0)
    model = compiled('quantize("int8")', kv_cache=slim.KVCacheConfig(layout="paged"))
    work = [
        ([rng.randrange(SHAPES["135m"].vocab_size) for _ in range(rng.randint(8, 128))], rng.randint(16, 96))
        for _ in range(32)
    ]

    def one_by_one() -> None:
        for prompt, limit in work:
            model.generate(torch.tensor([prompt]), max_new_tokens=limit, do_sample=False, eos_token_id=None)

    def together() -> None:
        scheduler = slim.Scheduler(model, max_tokens=16384, max_batch=32, eos_token_id=[], share_prefixes=False)
        for prompt, limit in work:
            scheduler.submit(prompt, limit)
        scheduler.run()

    runs = {"one after another": lambda: timed(one_by_one), "together": lambda: timed(together)}
    found = interleaved(runs, max(2, options.rounds // 2))
    return found | {"new tokens": sum(limit for _, limit in work)}


def endless(options: argparse.Namespace) -> dict[str, Any]:
    folder = SHARED / "models" / "stories260K"
    ring = slim.KVCacheConfig(window=256, sinks=4)
    model = slim.compile(folder, target="cpu", verify=False, kv_cache=ring)
    cache = model.new_cache(1)
    marks: list[dict[str, float]] = []
    tokens = torch.full((1, 1), 1)
    while tokens.shape[1] < options.tokens:
        piece = 999 if not marks else max(1, (options.tokens - 1000) // 20)  # flat after the first 1,000 is the claim
        start = time.perf_counter()
        tokens = model.generate(
            tokens, past_key_values=cache, max_new_tokens=piece, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        marks.append({
            "tokens": tokens.shape[1], "ms a token": (time.perf_counter() - start) / piece * 1e3,
            "resident MB": resident_mb(), "cache bytes": cache.nbytes,
        })  # fmt: skip
    return {"marks": marks} | long_text(model, options.tokens)


def resident_mb() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def long_text(model: slim.CompiledModel, most: int) -> dict[str, float]:
    """Perplexity of one long text over the ring, and of the same tokens after 259 others in a window of their own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    text = (SHARED / "text" / "tinystories_val.txt").read_text()
    tokens = torch.tensor([tokenizer(text[: 5 * most]).input_ids[:most]])
    cache, found = model.new_cache(1), []
    for start in range(0, tokens.shape[1] - 1, 512):
        part = tokens[:, start : start + 512]
        logits = model(part, past_key_values=cache).logits[0]
        found.append(losses(logits, tokens[0, start + 1 : start + 1 + part.shape[1]]))
    ring = torch.cat(found)
    whole = slim.compile(SHARED / "models" / "stories260K", target="cpu", verify=False)
    places = torch.arange(1000, tokens.shape[1] - 1, max(1, tokens.shape[1] // 4000))
    windows = []
    for some in places.split(64):
        rows = torch.stack([tokens[0, place - 259 : place + 1] for place in some.tolist()])
        windows.append(losses(whole(rows, logits_to_keep=1).logits[:, 0], tokens[0, some + 1]))
    return {
        "places": len(places), "perplexity, ring": math.exp(float(ring[places].mean())),
        "perplexity, windows run anew": math.exp(float(torch.cat(windows).mean())),
    }  # fmt: skip


def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[: len(targets)].float(), targets, reduction="none")


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "prefill": prefill, "decode": decode, "batching": batching, "endless": endless,
}  # fmt: skip


def written(results: dict[str, Any]) -> str:
    """The tables."""
    lines: list[str] = []
    for part, found in results["parts"].items():
        lines += [f"### {part}", ""]
        if part == "endless":
            first, last = found["marks"][0], found["marks"][-1]
            lines += ["| tokens | ms a token | resident MB | cache bytes |", "|---|---|---|---|"]
            lines += [
                f"| {m['tokens']:,} | {m['ms a token']:.3f} | {m['resident MB']:.1f} | {m['cache bytes']:,} |"
                for m in found["marks"]
            ]
            growth = last["resident MB"] - first["resident MB"]
            lines += ["", f"Resident memory grew by {growth:.1f} MB from the first mark to the last. Perplexity over "
                      f"the ring {found['perplexity, ring']:.4f}, of windows run anew "
                      f"{found['perplexity, windows run anew']:.4f}, at {found['places']} places.", ""]  # fmt: skip
            continue
        rows = {name: row for name, row in found.items() if isinstance(row, dict)}
        base = next(iter(rows.values()))
        lines += ["| | best | median | gain, best | gain, median |", "|---|---|---|---|---|"]
        for name, row in rows.items():
            gains = [f"{base[kind] / row[kind]:.2f}" for kind in ("best", "median")]
            lines.append(f"| {name} | {_time(row['best'])} | {_time(row['median'])} | {' | '.join(gains)} |")
        lines.append("")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=100_000, help="that are written without end")
    parser.add_argument("--weights", default="int8", choices=["int8", "int4"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "long_context")
    options = parser.parse_args()
    file = options.out.with_suffix(".json")
    results = {"parts": {}} | read_kept(file) | {
        "date": str(date.today()), "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    for part in options.only:
        print(f"{part} ...", flush=True)
        results["parts"][part] = PARTS[part](options)
        write_kept(file, results, written(results))
    print(written(results))


if __name__ == "__main__":
    main()
