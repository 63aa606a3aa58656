"""Compiled models that tests share: each is built and lifted once a process."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks import zoo
from slim.compiler.lift import lift
from slim.runtime.compiled import CompiledModel

PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 9])


@cache
def pair(name: str) -> tuple[Any, CompiledModel]:
    """A small random transformers model, and the same compiled."""
    torch.manual_seed(0)
    model = zoo.build(name)
    return model, CompiledModel(lift(model), "eager")


def prompt(seed: int = 0, padded: bool = True) -> tuple[Tensor, Tensor]:
    """Three rows of random tokens, two of them padded on the left, and their mask."""
    mask = PADDED if padded else torch.ones_like(PADDED)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, zoo.VOCAB, mask.shape, generator=generator) * mask, mask.clone()


def difference(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Largest difference relative to the largest number, over the rows where ``mask`` is 1."""
    if mask is not None:
        a, b = a[mask.bool()], b[mask.bool()]
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())
