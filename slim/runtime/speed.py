"""How fast language models read a prompt and write tokens, several of them in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Rate:
    """Tokens a second, over all rows: the best round, and the middle one."""

    best: float
    median: float

    @classmethod
    def of(cls, rounds: list[float]) -> Rate:
        return cls(max(rounds), statistics.median(rounds))


@dataclass
class Speed:
    """One model's rounds, in tokens a second."""

    prefills: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)

    @property
    def prefill(self) -> Rate:
        """Tokens of the prompt, over the time until the first new token is there."""
        return Rate.of(self.prefills)

    @property
    def decode(self) -> Rate:
        """New tokens after the first, over the time between the first and the last."""
        return Rate.of(self.decodes)


def measure(
    models: Mapping[str, Any], prompt: Tensor, new_tokens: int, rounds: int, progress: Progress | None = None
) -> dict[str, Speed]:
    """Times greedy ``generate`` of every model, A B A B, after one round that does not count.

    Neighbours on the machine slow all of them alike this way; compare only within one call.

    Args:
        models: by name; compiled models or transformers' own.
        prompt: token ids [B, S].
        new_tokens: how many each row gets, two at least; end tokens do not stop it.
        rounds: how many times each is timed.
    """
    speeds = {name: Speed() for name in models}
    for index in range(rounds + 1):
        for turn, (name, model) in enumerate(models.items()):
            if progress is not None:
                progress("timing", index * len(models) + turn, (rounds + 1) * len(models))
            prefill, decode = _generate(model, prompt, new_tokens)
            if index:
                speeds[name].prefills.append(prompt.numel() / prefill)
                speeds[name].decodes.append(prompt.shape[0] * (new_tokens - 1) / decode)
    return speeds


def random_prompt(vocabulary: int, length: int) -> Tensor:
    """Token ids [1, length], the same each time: how fast a model is does not hang on what it reads."""
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


class _Clock:
    """A streamer that notes when the prompt, and each new token, came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generate(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds until the first new token, and from there to the last."""
    clock = _Clock()
    prompt = prompt.to(model.device)
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,  # the length alone ends it
        streamer=clock,
    )
    _, first, *_, last = clock.times
    return first - start, last - first
