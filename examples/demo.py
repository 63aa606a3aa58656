"""What slim does, on a small model of Python code: lift it, rewrite it, run it, and compare it with the original.

Run it with `make demo`, or as `python examples/demo.py` where slim is installed.
"""

import os
import textwrap
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything it needs lies beside it

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import slim
from slim.passes import FoldNorms, Quantize
from slim.runtime.compiled import CompiledModel
from slim.runtime.perplexity import Score, score, windows
from slim.runtime.speed import Speed, measure

MODEL = Path(__file__).parent / "demo_model"
PASSES = [FoldNorms(), Quantize("int8")]
CONTEXT, PREDICTED = 512, 8192  # perplexity: windows of 512 tokens, over the first 8192 tokens
READ, WRITTEN, ROUNDS = 128, 64, 5  # speed: a prompt of 128 tokens, 64 new ones, five rounds
GENERATED, SMALL = "slim, float32", "slim, int8"
PROMPTS = (
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def __repr__(self):",
    'def is_absolute(path):\n    """Return whether a path is absolute."""',
)


def main() -> None:
    start = time.perf_counter()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # enough for a model this small, and steadier beside neighbours
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    original = AutoModelForCausalLM.from_pretrained(MODEL).eval()

    title(f"slim.compile({MODEL.name!r}, passes={PASSES})")
    lifted = slim.compile(MODEL)
    small = slim.compile(MODEL, PASSES)
    eager = CompiledModel(lifted.program, "eager")
    print(small.report)

    title("The IR of the first layer's MLP, before and after")
    print(excerpt(lifted), excerpt(small), sep="\n\n")

    if small.target.name == "cpu":
        title("The C++ that the generated kernel of its gate and up projections ends in")
        print(generated(small))

    title("Before and after")
    models = {"transformers": original, "slim, eager": eager, GENERATED: lifted, SMALL: small}
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")
    passages = windows(text, tokenizer, CONTEXT, PREDICTED)
    scores = {name: score(model, passages) for name, model in models.items()}
    prompt = torch.tensor([passages[0].tokens[:READ]])
    compare(lifted, small, scores, measure(models, prompt, WRITTEN, ROUNDS))

    title("Code completed to the first blank line (greedy)")
    for beginning in PROMPTS:
        by_original, by_small = (complete(model, tokenizer, beginning) for model in (original, small))
        print(textwrap.indent(by_small, "    "))
        print(f"    # transformers, float32, writes {'the same' if by_original == by_small else 'something else'}\n")
    print(f"{time.perf_counter() - start:.0f} seconds in all")


def title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}", flush=True)


def excerpt(compiled: slim.CompiledModel) -> str:
    """The lines of the IR that came from the first layer's MLP; names shortened, file:line left out."""
    lines = [line for line in str(compiled.program).splitlines() if "# model.layers.0.mlp" in line]
    short = [line.split("  # ")[0].strip().replace("model.layers.0.mlp.", "") for line in lines]
    return "\n".join(textwrap.fill(line, 80, subsequent_indent="    ") for line in short)


def generated(compiled: slim.CompiledModel) -> str:
    """The function of the generated source that makes gate and up one, as its results leave the matrix product."""
    functions = next(iter(compiled.code.values())).split("static void ")
    return "static void " + next(text for text in functions if "silu_f" in text).split("\n}")[0].strip() + "\n}"


def complete(model: Any, tokenizer: Any, beginning: str) -> str:
    """``beginning`` and what ``model`` makes of it, up to a blank line."""
    tokens = tokenizer(beginning, return_tensors="pt").input_ids
    options = dict(max_new_tokens=48, do_sample=False, stop_strings=["\n\n"], tokenizer=tokenizer)
    return tokenizer.decode(model.generate(tokens, **options)[0], skip_special_tokens=True).rstrip()


def compare(
    lifted: slim.CompiledModel, small: slim.CompiledModel, scores: dict[str, Score], speeds: dict[str, Speed]
) -> None:
    """Prints all that was measured, a column a model."""
    whole = lifted.cost()
    costs = [whole, whole, whole, small.cost()]  # transformers' model computes what the lifted one does
    prefills = [cost.bind(B=1, S=READ, T=READ) for cost in costs]
    decodes = [cost.bind(B=1, S=1, T=READ + WRITTEN) for cost in costs]

    def row(name: str, values: Iterable[float], show: Callable[[float], str] = "{:,.0f}".format) -> None:
        print(f"{name:<32}" + "".join(f"{show(value):>15}" for value in values))

    print(" " * 32 + "".join(f"{name:>15}" for name in scores))
    row("parameters", (cost.parameters for cost in costs))
    row("weights, bytes", (cost.weight_bytes for cost in costs))
    row("keys and values, bytes a token", (cost.kv_bytes_per_token for cost in costs))
    row(f"FLOPs to read {READ} tokens", (cost.flops for cost in prefills))
    row(f"FLOPs to write token {READ + WRITTEN}", (cost.flops for cost in decodes))
    row(f"bytes moved for token {READ + WRITTEN}", (cost.bytes_moved for cost in decodes))
    row("perplexity", (found.perplexity for found in scores.values()), "{:.4f}".format)
    row("bits per byte", (found.bits_per_byte for found in scores.values()), "{:.4f}".format)
    for stage in ("prefill", "decode"):
        for which in ("best", "median"):
            row(f"{stage}, tokens/s, {which}", (getattr(getattr(s, stage), which) for s in speeds.values()))
    found = scores[SMALL]
    print(
        f"Perplexity: the first {found.tokens:,} tokens ({found.nbytes:,} bytes) of heldout.txt, windows of {CONTEXT}."
    )
    print(
        f"Speed: {READ} tokens read, {WRITTEN} written, {ROUNDS} rounds by turns, 1 thread; the last two columns on\n"
        f"target {small.target.name!r}."
    )


if __name__ == "__main__":
    main()
