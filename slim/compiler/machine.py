"""What the machine at hand can do at most, measured in about a second: the roof of a roofline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_ELEMENTS = 1 << 26  # float32: 256 MB, beyond any cache
_SIDE = 1024
_ROUNDS = 5


@dataclass(frozen=True)
class Machine:
    """Attributes:
    bandwidth: bytes a second that are read from memory.
    flops_rate: floating-point operations a second of a float32 matrix product by PyTorch.
    threads: of PyTorch, with which both were measured.
    """

    bandwidth: float
    flops_rate: float
    threads: int


def measure_machine() -> Machine:
    """Best of five: reading a long array, and multiplying matrices of 1024 x 1024; on the CPU."""
    long, square = torch.ones(_ELEMENTS), torch.ones(_SIDE, _SIDE)
    return Machine(
        bandwidth=4 * _ELEMENTS / _best(lambda: long.sum()),
        flops_rate=2 * _SIDE**3 / _best(lambda: square @ square),
        threads=torch.get_num_threads(),
    )


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few rounds, after one that does not count."""
    times = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])
