"""slim itself: ``f32``, ``bf16``, and every format of ``Quantize``: integers of four and three bits in groups of 32."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import Clock, Setup

import slim
from slim.passes import Quantize

PASSES: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "w8a8": {"weights": "int8", "activations": "int8"},
    "int4": {"weights": "int4", "group_size": 32},
    "int4z": {"weights": "int4", "group_size": 32, "symmetric": False},
    "int3": {"weights": "int3", "group_size": 32},
    "nf4": {"weights": "nf4"},
    "fp8": {"weights": "fp8"},
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def convert(setup: Setup) -> None:
    """Nothing: slim compiles from the directory."""


class Engine:
    """A compiled model, timed where a user would time it: in ``generate``."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        precision, _, target = setup.precision.partition("@")
        self._compiled = slim.compile(*_source(setup, precision), target=target or "auto", verify=False)
        program = self._compiled.program
        self.nbytes = program.nbytes - _not_multiplied(program)
        self.versions = {"slim": slim.__version__, "torch": torch.__version__, "target": self._compiled.target.name}

    def run(self, prompt: list[int], new: int, batch: int) -> Clock:
        watch = _Watch()
        tokens = torch.tensor([prompt] * batch)
        watch.clock.begin()
        self._compiled.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,  # the length alone ends it
            streamer=watch,
        )
        return watch.clock


class _Watch:
    """A streamer that notes when each token came; what it is given first is the prompt."""

    def __init__(self) -> None:
        self.clock = Clock()
        self._prompt_came = False

    def put(self, tokens: torch.Tensor) -> None:
        if self._prompt_came:
            self.clock.token(int(tokens[0]))
        self._prompt_came = True

    def end(self) -> None:
        pass


def _source(setup: Setup, precision: str) -> tuple[Any, list[Any]]:
    """What to compile, and the passes."""
    if precision in PASSES:
        return setup.model, [Quantize(**PASSES[precision])]
    return transformers.AutoModelForCausalLM.from_pretrained(setup.model, dtype=DTYPES[precision]).eval(), []


def _not_multiplied(program: Any) -> int:
    """Bytes of the embedding table and of the vectors that are no weight's scale."""
    weights = program.weights
    return sum(
        weights[name].nbytes
        for name in weights
        if "embed_tokens" in name or (weights[name].dim() == 1 and not name.endswith("_scale"))
    )
