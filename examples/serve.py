"""Sixty-four prompts at once: continuous batching over a cache in pages, beside one after another.

Run it as `python examples/serve.py` where slim is installed.
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


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    compiled = slim.compile(MODEL, 'quantize("int8")', kv_cache=slim.KVCacheConfig(layout="paged"))
    prompts = [tokenizer(BEGINNINGS[i % len(BEGINNINGS)]).input_ids for i in range(REQUESTS)]

    scheduler = slim.Scheduler(compiled, max_tokens=16384, max_batch=32, eos_token_id=[])
    start = time.perf_counter()
    requests = [scheduler.submit(prompt, NEW) for prompt in prompts]
    scheduler.run()
    together = time.perf_counter() - start

    start = time.perf_counter()
    for prompt in prompts:
        compiled.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    alone = time.perf_counter() - start

    for request in requests[: len(BEGINNINGS)]:
        print(repr(tokenizer.decode(request.prompt + request.tokens))[:100])
    tokens = sum(len(request.tokens) for request in requests)
    speeds = f"{tokens / together:,.0f} a second together, {tokens / alone:,.0f} one after another"
    print(f"{REQUESTS} requests, {tokens} new tokens: {speeds}")


if __name__ == "__main__":
    main()
