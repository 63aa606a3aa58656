"""Which transformers architectures slim compiles exactly: every model of the zoo against its own transformers self.

    python benchmarks/coverage.py                  # all of them, into docs/coverage.md
    python benchmarks/coverage.py llama gpt2 bert  # these alone, to the screen
    python benchmarks/coverage.py --cache runs.jsonl --jobs 2

What is claimed of a causal language model, on a left-padded batch of three (of an encoder: all but the third and
fourth, right-padded):

1. its float32 outputs are the model's own within 1e-4 of their largest value, at real tokens;
2. there is exactly one attention node for each attention that the model's own code computes;
3. 32 greedy tokens are those of transformers' ``generate``;
4. decoding token by token over slim's KV cache gives the logits of the whole sequence at once, within the same bound;
5. the printed IR, run as Python, and read back and printed, is the same program.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import logging
import math
import multiprocessing
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import transformers
from torch import Tensor, nn

from benchmarks import zoo
from slim import errors
from slim.compiler.lift import lift
from slim.compiler.program import Program
from slim.compiler.text import parse
from slim.runtime.compiled import CompiledModel

TOLERANCE = 1e-4
LENGTH, PADDED, NEW = 23, (0, 5, 11), 32
TWO_A_LAYER = frozenset({"diffllama"})
"""One module, two attentions: the difference of the two is what its paper is about."""
NOT_SOFTMAX = ("Lightning", "Rwkv", "Linear")
"""Modules called attention that are recurrences."""


@dataclass
class Result:
    """What was found of one model; ``failures`` is empty where every claim holds."""

    name: str
    kind: str = "causal"
    architecture: str = ""
    error: float | None = None
    greedy: str = ""
    cached: float | None = None
    attention: int | None = None
    expected: int | None = None
    rope: int = 0
    norms: int = 0
    linears: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def claim(self, what: str, check: Callable[[], str | None]) -> None:
        """Runs ``check``; what it returns or raises is why the claim fails."""
        try:
            reason = check()
        except errors.SlimError as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        except Exception as error:  # one model's trouble is its own line in the table
            reason = f"{type(error).__name__} (not slim's own): {(str(error).strip() or '?').splitlines()[0]}"
        if reason:
            self.failures.append(f"{what}: {reason}")


# -- one model ---------------------------------------------------------------------------------------------------------


def measure(name: str) -> Result:
    """Every claim about the zoo's ``name``."""
    began = time.perf_counter()
    encoder = name in zoo.ENCODERS
    result = Result(name, "encoder" if encoder else "causal")
    try:
        _measure(result, zoo.build_encoder(name) if encoder else zoo.build(name), encoder)
    finally:
        result.seconds = time.perf_counter() - began
    return result


def _measure(result: Result, model: Any, encoder: bool) -> None:
    result.architecture = type(model).__name__
    batch = _batch(model, right=encoder)
    with _CountedAttention(model) as counted, torch.no_grad():
        own = model(**_accepted(model, batch))
    result.expected = counted.calls * (2 if result.name in TWO_A_LAYER else 1)
    programs: list[Program] = []
    result.claim("lift", lambda: programs.append(lift(model)))
    if not programs:
        return
    program = programs[0]
    _count(result, program)
    result.claim("text", lambda: _text(program, batch))
    compiled = CompiledModel(program, "eager")
    result.claim("outputs", lambda: _outputs(result, compiled, own, batch))
    result.claim("attention", lambda: _attention(result))
    if not encoder:
        result.claim("greedy", lambda: _greedy(result, model, compiled, batch))
        result.claim("cache", lambda: _cached(result, compiled, batch))


def _batch(model: Any, right: bool) -> dict[str, Tensor]:
    """Three rows of random tokens, two of them padded."""
    generator = torch.Generator().manual_seed(7)
    config = model.config.get_text_config()
    tokens = torch.randint(3, config.vocab_size, (len(PADDED), LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate(PADDED):
        mask[row, LENGTH - padding if right else 0 : LENGTH if right else padding] = 0
    tokens = torch.where(mask.bool(), tokens, config.pad_token_id or 0)
    batch = {"input_ids": tokens, "attention_mask": mask}
    if not right:
        batch["position_ids"] = _positions(mask)
    return batch


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def _accepted(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What of the batch the model's forward takes."""
    names = model.forward.__code__.co_varnames if hasattr(model.forward, "__code__") else ()
    import inspect

    names = set(inspect.signature(model.forward).parameters)
    options = {"use_cache": False} if "use_cache" in names else {}
    return {**{name: value for name, value in batch.items() if name in names}, **options}
