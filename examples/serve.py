"""Sixty-four prompts at once: continuous batching over a cache in pages, beside one after another.

Half of the requests take the likeliest token, half draw theirs by a seed of their own, here and there. The text of the
first is printed as it comes, while all of them go on. Run it as `python examples/serve.py` where slim is installed.
"""

import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything it needs lies beside it

import torch
from transformers import AutoTokenizer

import slim

MODEL = Path(__file__).parent / "demo_model"
BEGINNINGS = (
    "def read_", "class Test", "import os\n\ndef ", "for name in ", 'def add(a, b):\n    """', "if not ",
    "try:\n    ", "return ",
)  # fmt: skip
REQUESTS, NEW = 64, 48


def sampling(number: int) -> slim.Sampling | None:
    return slim.Sampling(temperature=0.8, top_p=0.95, seed=number) if number % 2 else None


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    compiled = slim.compile(MODEL, 'quantize("int8")', kv_cache=slim.KVCacheConfig(layout="paged"))
    prompts = [tokenizer(BEGINNINGS[i % len(BEGINNINGS)]).input_ids for i in range(REQUESTS)]

    scheduler = slim.Scheduler(compiled, max_tokens=16384, max_batch=32, eos_token_id=[], tokenizer=tokenizer)
    start = time.perf_counter()
    requests = [scheduler.submit(prompt, NEW, sampling(number)) for number, prompt in enumerate(prompts)]
    print(BEGINNINGS[0], end="")
    for piece in requests[0].stream():
        print(piece, end="", flush=True)
    print()
    scheduler.run()
    together = time.perf_counter() - start

    start = time.perf_counter()
    for number, prompt in enumerate(prompts):
        drawn = {"do_sample": True, "temperature": 0.8, "top_p": 0.95} if number % 2 else {"do_sample": False}
        torch.manual_seed(number)
        compiled.generate(torch.tensor([prompt]), max_new_tokens=NEW, eos_token_id=None, **drawn)
    alone = time.perf_counter() - start

    for beginning, request in zip(BEGINNINGS, requests, strict=False):
        print(repr(beginning + request.text)[:100])
    tokens = sum(len(request.tokens) for request in requests)
    speeds = f"{tokens / together:,.0f} a second together, {tokens / alone:,.0f} one after another"
    print(f"{REQUESTS} requests, {tokens} new tokens: {speeds}")


if __name__ == "__main__":
    main()
