"""How a request draws its tokens: transformers' processors, and a generator of random numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from slim import errors

_SEEDS = 1 << 62


@dataclass(frozen=True)
class Sampling:
    """What a request asks for; each option as transformers' generate has it.

    Args:
        temperature: what logits are divided by.
        top_k: draw from so many of the likeliest tokens; None from all.
        top_p: draw from the fewest likeliest tokens whose probabilities add up to so much; None from all.
        seed: with the same seed a request draws the same tokens, whatever runs beside it; None takes any.

    Raises:
        BadInput: naming the option.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        def refuse(option: str, wanted: str) -> None:
            raise errors.BadInput(
                argument=option, reason=f"{getattr(self, option)!r} is not {wanted}", of="slim.Sampling"
            )

        if not _is_number(self.temperature) or not 0 < self.temperature < float("inf"):
            refuse("temperature", "a number above 0; without slim.Sampling the likeliest token is taken")
        if self.top_k is not None and (not _is_whole(self.top_k) or self.top_k < 1):
            refuse("top_k", "a number of tokens")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            refuse("top_p", "a probability above 0")
        if self.seed is not None and (not _is_whole(self.seed) or not 0 <= self.seed < _SEEDS):
            refuse("seed", f"a whole number from 0 to {_SEEDS - 1}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or isinstance(value, float)


@dataclass
class Sampler:
    """Draws the tokens of one request, one after another.

    Attributes:
        seed: that of ``sampling``, or the one that was taken.
    """

    sampling: Sampling
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        given = self.sampling.seed
        self.seed = int(torch.randint(_SEEDS, ()).item()) if given is None else given
        self.generator = torch.Generator().manual_seed(self.seed)


def drawn(samplers: Sequence[Sampler], logits: Tensor) -> list[int]:
    """A token for each of ``samplers``, by logits [N, V]; those that ask for the same share the work."""
    alike: dict[Sampling, list[int]] = {}
    for row, sampler in enumerate(samplers):
        alike.setdefault(replace(sampler.sampling, seed=None), []).append(row)
    tokens = [0] * len(samplers)
    for sampling, rows in alike.items():
        scores = logits[rows].float().cpu()
        for processor in _processors(sampling):
            scores = processor(None, scores)
        for row, shares in zip(rows, scores.softmax(-1), strict=True):
            tokens[row] = int(torch.multinomial(shares, 1, generator=samplers[row].generator))
    return tokens


def _processors(sampling: Sampling) -> list[Any]:
    """In the order that transformers' generate has; none of them looks at tokens."""
    found: list[Any] = []
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        found.append(TopPLogitsWarper(float(sampling.top_p)))
    return found
