"""What eviction costs: perplexity of real small models over caches of half the text, and of less.

    python -m benchmarks.eviction                              # results/eviction.{json,md}
    python -m benchmarks.eviction --models demo --passages 16

Texts are as long as the model's context. They are read a few tokens at a time, as many as leave a cache with eviction
together, and every token is predicted from what the cache holds then: half as many tokens as a text, or a quarter.
Beside eviction stand plain truncation to the newest tokens, and the newest with 4 sinks (StreamingLLM).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import slim  # noqa: E402
from benchmarks.kept import read_kept, write_kept  # noqa: E402
from slim import KVCacheConfig  # noqa: E402
from slim.runtime.eviction import Eviction  # noqa: E402
from slim.runtime.perplexity import pieces, windows  # noqa: E402

SHARED, DEMO = ROOT.parent / "shared", ROOT / "examples" / "demo_model"
SHARES, SINKS = (2, 4), 4
SEEN = {DEMO: 8}  # texts that the options of eviction were chosen on, and that are left out here
MODELS = {
    "stories260K": SHARED / "models" / "stories260K", "stories260K-mha": SHARED / "models" / "stories260K-mha",
    "babyllama361": SHARED / "models" / "babyllama361", "demo": DEMO,
}  # fmt: skip


def texts(folder: Path, most: int) -> Tensor:
    """Texts as long as the model's context, [B, T]: whole stories that are long enough, or held-out Python."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    if folder == DEMO:
        found = windows((DEMO / "heldout.txt").read_text(), tokenizer, context - 1)
    else:
        stories = (SHARED / "text" / "tinystories_val.txt").read_text()
        found = pieces(stories, tokenizer, context, "Once upon a time")
    long = [passage.tokens for passage in found if len(passage.tokens) == context]
    return torch.tensor(long[SEEN.get(folder, 0) :][:most])


def caches(budget: int) -> dict[str, KVCacheConfig]:
    return {
        "h2o": KVCacheConfig(eviction="h2o", budget=budget),
        "snapkv": KVCacheConfig(eviction="snapkv", budget=budget),
        f"window and {SINKS} sinks": KVCacheConfig(window=budget - SINKS, sinks=SINKS),
        "window": KVCacheConfig(window=budget),
    }


def losses(folder: Path, config: KVCacheConfig, tokens: Tensor, piece: int) -> Tensor:
    """Nats of each predicted token, [B, T - 1]; ``piece`` tokens are read at a time."""
    model = slim.compile(folder, target="cpu", verify=False, kv_cache=config)
    cache, found = model.new_cache(tokens.shape[0]), []
    for start in range(0, tokens.shape[1] - 1, piece):
        part, wanted = tokens[:, start : start + piece], tokens[:, start + 1 : start + 1 + piece]
        logits = model(part, past_key_values=cache).logits[:, : wanted.shape[1]].float()
        found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none"))
    return torch.cat(found, 1)


def measure(folder: Path, most: int) -> dict[str, Any]:
    tokens = texts(folder, most)
    whole = losses(folder, KVCacheConfig(), tokens, 64)
    context = tokens.shape[1]
    rows = []
    for share in SHARES:
        piece = Eviction("h2o", context // share).at_once
        for name, config in caches(context // share).items():
            nats, late = losses(folder, config, tokens, piece), slice(context // share, None)
            rows.append({
                "cache": name, "budget": context // share, "perplexity": math.exp(float(nats.mean())),
                "cost": math.expm1(float((nats - whole).mean())),
                "cost, late": math.expm1(float((nats - whole)[:, late].mean())),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return {"texts": len(tokens), "context": context, "perplexity": math.exp(float(whole.mean())), "rows": rows}


def written(results: dict[str, Any]) -> str:
    lines = []
    for name, found in results["models"].items():
        lines += [
            f"### {name}: {found['texts']} texts of {found['context']} tokens, "
            f"perplexity {found['perplexity']:.4f} over all of them", "",
            "| cache | tokens held | perplexity | more than over all | beyond the budget |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for row in found["rows"]:
            costs = f"{row['cost']:+.2%} | {row['cost, late']:+.2%}"
            lines.append(f"| {row['cache']} | {row['budget']} | {row['perplexity']:.4f} | {costs} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--passages", type=int, default=64, help="texts of a model, at most")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "eviction")
    options = parser.parse_args()
    file = options.out.with_suffix(".json")
    results = {"models": {}} | read_kept(file) | {"date": str(date.today()), "torch": torch.__version__}
    for name in options.models:
        print(f"{name} ...", flush=True)
        results["models"][name] = measure(MODELS[name], options.passages)
        write_kept(file, results, written(results))
    print(written(results))


if __name__ == "__main__":
    main()
