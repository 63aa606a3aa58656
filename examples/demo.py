"""What slim does, on a small model of Python code: lift it, rewrite it, run it, and compare it with the original.

    make demo        or        python examples/demo.py
"""

import os
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything it needs lies beside it

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import slim
from slim.passes import FoldNorms, Quantize
from slim.runtime.perplexity import Score, score, windows
from slim.runtime.speed import Speed, measure

MODEL = Path(__file__).parent / "demo_model"
PASSES = [FoldNorms(), Quantize("int8")]
CONTEXT, PREDICTED = 512, 8192  # perplexity: windows of 512 tokens, over the first 8192 tokens
READ, WRITTEN, ROUNDS = 128, 64, 5  # speed: a prompt of 128 tokens, 64 new ones, five rounds
PROMPT = '''\
class Stack:
    """A stack of items."""

    def __init__(self):
        self.items = []

    def push(self, item):
'''


def main() -> None:
    start = time.perf_counter()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    original = AutoModelForCausalLM.from_pretrained(MODEL).eval()

    title(f"Compiling {MODEL.name} with {PASSES}")
    lifted = slim.compile(MODEL)
    small = slim.compile(MODEL, PASSES)
    print(small.report)

    title("The IR of the first MLP, before and after")
    print(excerpt(lifted), "\n", excerpt(small), sep="\n")

    title("Before and after")
    models = {"transformers": original, "slim, no passes": lifted, "slim, int8": small}
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")
    passages = windows(text, tokenizer, CONTEXT, PREDICTED)
    scores = {name: score(model, passages) for name, model in models.items()}
    prompt = torch.tensor([passages[0].tokens[:READ]])
    speeds = measure(models, prompt, WRITTEN, ROUNDS)
    compare(lifted, small, scores, speeds)

    title("A completion by slim, int8 (greedy)")
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    answers = [model.generate(tokens, max_new_tokens=64, do_sample=False) for model in (original, small)]
    print(textwrap.indent(tokenizer.decode(answers[1][0], skip_special_tokens=True), "    "))
    same = answers[0].shape == answers[1].shape and bool((answers[0] == answers[1]).all())
    print(f"\n(the original writes {'the same' if same else 'something else'})")
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")


def title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}", flush=True)


def excerpt(compiled: slim.CompiledModel) -> str:
    """The lines of the IR that came from the first layer's MLP, without weights' long names and file:line."""
    lines = [line for line in str(compiled.program).splitlines() if "# model.layers.0.mlp" in line]
    short = [line.split("  # ")[0].strip().replace("model.layers.0.mlp.", "") for line in lines]
    return "\n".join(textwrap.fill(line, 110, subsequent_indent="    ") for line in short)


def compare(
    lifted: slim.CompiledModel, small: slim.CompiledModel, scores: dict[str, Score], speeds: dict[str, Speed]
) -> None:
    """Everything measured, a column a model."""
    costs = [lifted.cost(), lifted.cost(), small.cost()]
    prefills = [cost.bind(B=1, S=READ, T=READ) for cost in costs]
    decodes = [cost.bind(B=1, S=1, T=READ + WRITTEN) for cost in costs]

    def row(name: str, values: list, show: Callable[[float], str] = "{:,.0f}".format) -> None:
        print(f"{name:<46}" + "".join(f"{show(value):>17}" for value in values))

    print(" " * 46 + "".join(f"{name:>17}" for name in scores))
    row("parameters", [cost.parameters for cost in costs])
    row("bytes of weights", [cost.weight_bytes for cost in costs])
    row("bytes of keys and values per token", [cost.kv_bytes_per_token for cost in costs])
    row(f"FLOPs, prefill (B=1, S=T={READ})", [cost.flops for cost in prefills])
    row(f"FLOPs, decode (B=1, S=1, T={READ + WRITTEN})", [cost.flops for cost in decodes])
    row(f"bytes moved, decode (B=1, S=1, T={READ + WRITTEN})", [cost.bytes_moved for cost in decodes])
    row("perplexity", [s.perplexity for s in scores.values()], "{:.4f}".format)
    row("bits per byte", [s.bits_per_byte for s in scores.values()], "{:.4f}".format)
    for stage in ("prefill", "decode"):
        for which in ("best", "median"):
            row(f"{stage}, tokens/s, {which}", [getattr(getattr(s, stage), which) for s in speeds.values()])
    first = next(iter(scores.values()))
    print(f"\nPerplexity: the first {first.tokens:,} tokens ({first.nbytes:,} bytes) of heldout.txt, in windows of {CONTEXT}.")
    print(f"Speed: {READ} tokens read, {WRITTEN} written, {ROUNDS} rounds by turns, {torch.get_num_threads()} threads, "
          f"target {small.target.name!r}.")  # fmt: skip
    if speeds["slim, int8"].decode.median < speeds["slim, no passes"].decode.median:
        print("int8 decodes slower than float32 here: this target has no integer kernels; it widens weights as it reads them.")


if __name__ == "__main__":
    main()
