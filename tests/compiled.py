"""Models of the zoo that tests share: each is built, lifted and compiled once a process."""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from benchmarks import zoo
from slim.compiler.program import Program
from slim.runtime.compiled import CompiledModel
from tests.lifting import lift_once

PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 9])


@cache
def built(name: str) -> Any:
    """The small random transformers model of that name in the zoo, language model or encoder; not to be changed."""
    return zoo.build_encoder(name) if name in zoo.ENCODERS else zoo.build(name)


def lifted(name: str) -> Program:
    """The same lifted; a copy, so that a test may rewrite it."""
    return lift_once(built(name))


@cache
def pair(name: str) -> tuple[Any, CompiledModel]:
    """The same, and compiled; neither is to be changed."""
    return built(name), CompiledModel(lifted(name), "eager")


def check_golden(name: str, text: str) -> None:
    """``text`` is what tests/golden/``name`` holds. SLIM_ACCEPT=1 writes it anew; the change then shows in the diff."""
    root = Path(__file__).resolve().parents[1]
    pinned = re.search(r"^transformers==(\S+)", (root / "constraints.txt").read_text(), re.M)
    if pinned is None or pinned[1] != transformers.__version__:
        pytest.skip(f"names and lines of models' sources are those of transformers {pinned and pinned[1]}")
    file = root / "tests" / "golden" / name
    if os.environ.get("SLIM_ACCEPT"):
        file.write_text(text)
    assert text == file.read_text(), f"{name} differs; run with SLIM_ACCEPT=1 to accept"


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
