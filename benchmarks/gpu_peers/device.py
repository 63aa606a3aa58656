"""Where a run computes: its clock, its memory, and what it can do at best.

Everything takes the device as a value, so that a dry run on the CPU goes through the same lines.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("torch", "triton", "transformers", "torchao")


@dataclass(frozen=True)
class Device:
    """The GPU, or the CPU in its place.

    Attributes:
        kind: "cuda" or "cpu".
    """

    kind: str

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any]) -> float:
        """How long ``call`` takes until its last kernel has ended."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def allocated(self) -> int:
        """Bytes in use through PyTorch; 0 on the CPU, which does not count them."""
        return torch.cuda.memory_allocated() if self.is_cuda else 0

    def peak(self) -> int:
        """The most bytes in use since ``reset_peak``."""
        return torch.cuda.max_memory_allocated() if self.is_cuda else 0

    def reset_peak(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def best(self, call: Callable[[], Any]) -> float:
        """Seconds of the fastest of many calls, by the device's own events where it has them."""
        if not self.is_cuda:
            return min(self.seconds(call) for _ in range(3))
        from triton.testing import do_bench

        milliseconds: Any = do_bench(call, warmup=50, rep=200, return_mode="min")
        return float(milliseconds) / 1e3


class Memory:
    """What one engine holds, counted through its turns, with the others' left out."""

    def __init__(self, device: Device, shared: int = 0) -> None:
        """``shared``: bytes of the one model's weights that the engine reads as they are."""
        self._device = device
        self.held = shared
        self.peak = shared

    def watch(self, call: Callable[[], Any]) -> Any:
        """Runs a turn of the engine; what it leaves allocated is its own from then on."""
        before = self._device.allocated()
        self._device.reset_peak()
        try:
            return call()
        finally:
            self.peak = self.held + self._device.peak() - before
            self.held += self._device.allocated() - before


# -- ceilings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the device does with nothing else to do.

    Attributes:
        copy: bytes a second of a large copy, those read and those written counted.
        read: bytes a second of a sum over a large array.
        matmul: bfloat16 operations a second of the better of two large cubes.
    """

    copy: float
    read: float
    matmul: float

    def __str__(self) -> str:
        rates = f"copy {self.copy / 1e9:,.0f} GB/s, read {self.read / 1e9:,.0f} GB/s"
        return f"{rates}, matmul {self.matmul / 1e12:,.1f} TFLOP/s"


def ceilings(device: Device) -> Ceilings:
    """Measured on random numbers: a product of zeros is faster than any real one."""
    nbytes, sides = (1 << 32, (4096, 8192)) if device.is_cuda else (1 << 25, (256, 512))
    copy, read = _bandwidths(device, nbytes)
    return Ceilings(copy, read, max(_matmul_rate(device, side) for side in sides))


def _bandwidths(device: Device, nbytes: int) -> tuple[float, float]:
    source = torch.randn(nbytes // 4, device=device.kind)
    target = torch.empty_like(source)
    copy = 2 * nbytes / device.best(lambda: target.copy_(source))
    return copy, nbytes / min(device.best(source.sum), device.best(source.amax))


def _matmul_rate(device: Device, side: int) -> float:
    left, right = (torch.randn(side, side, device=device.kind, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> Tensor:
        return torch.matmul(left, right, out=out)

    return 2 * side**3 / device.best(multiply)


# -- names -------------------------------------------------------------------------------------------------------------


def machine(device: Device) -> dict[str, Any]:
    """The device, and the versions of all that runs on it."""
    found: dict[str, Any] = {"device": platform.processor() or platform.machine(), "system": platform.platform()}
    if device.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory": properties.total_memory, "driver": _driver()}
        found |= {"multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}
    return found | {"python": platform.python_version(), "versions": dict(_versions())}


def _versions() -> list[tuple[str, str]]:
    found = []
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            found.append((package, "not installed"))
    return found


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown: there is no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()
