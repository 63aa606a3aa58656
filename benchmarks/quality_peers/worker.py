"""Runs one peer in this process: ``python -m benchmarks.quality_peers.worker compressor DATA.json``.

Reads lines of JSON, ``{"model": directory, "odd": [patterns], "recipe": {...}}``, and answers each with
``{"nats": ..., "tokens": ..., "bits": a weight, "versions": {...}}`` or ``{"error": text}``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.quality_peers import cases
from slim.runtime.perplexity import score


def main() -> None:
    name, data, threads = sys.argv[1:]
    answers = _own_stdout()
    torch.set_num_threads(int(threads))
    peer = importlib.import_module(f"benchmarks.quality_peers.{name}")
    calibration, passages = cases.read(Path(data))
    for line in sys.stdin:
        try:
            answer = _measured(peer, json.loads(line), calibration, passages)
        except Exception as error:  # the next recipe may work
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _measured(peer: Any, told: dict[str, Any], calibration: list[list[int]], passages: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(told["model"], dtype=torch.float32).eval()
    skipped = ["lm_head", *(f"re:.*{pattern.removeprefix('*.').removesuffix('.weight')}$" for pattern in told["odd"])]
    model, bits = peer.quantised(model, told["recipe"], calibration, skipped)
    found = score(model, passages)
    return {"nats": found.nats, "tokens": found.tokens, "bits": bits, "versions": peer.versions()}


def _own_stdout() -> TextIO:
    """The pipe to the driver; what libraries print goes to the log instead."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return pipe


if __name__ == "__main__":
    main()
