"""Which of a kernel's configurations is fastest on the device at hand: measured once, within a budget, and kept."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from slim.codegen import build
from slim.codegen.triton import modules
from slim.codegen.triton.kernel import Config
from slim.codegen.triton.modules import Module

log = logging.getLogger(__name__)

Times = list[float | None]  # milliseconds of each configuration, in their order; None where it does not run


def milliseconds(run: Callable[[], None]) -> float:
    """The median time of ``run`` on the current GPU.

    The caches are emptied before each run: a decode step finds none of its weights there.
    """
    from triton import testing

    return float(testing.do_bench(run, warmup=5, rep=20, return_mode="median"))


class Tuner:
    """Chooses configurations.

    What it measures it keeps, so that every later process chooses the same at once; what the budget leaves
    unmeasured, a later Tuner goes on with.

    Args:
        seconds: that all its measuring may take, compiling included. It ends with the configuration that exceeds it.
        device: what it measures on, as the driver calls it.
        measure: (a function that launches a kernel) -> milliseconds.
    """

    def __init__(
        self, seconds: float, device: str, measure: Callable[[Callable[[], None]], float] = milliseconds
    ) -> None:
        self._left = seconds
        self._device = device
        self._measure = measure
        self._chosen: dict[tuple[Path, tuple[int, ...]], Config] = {}  # what this process need not look up again

    def choose(self, module: Module, key: Sequence[int], run: Callable[[Config], None]) -> Config:
        """The fastest configuration of those measured; the default, which is the first, where none is.

        Args:
            key: the sizes of the call. Sizes up to the same power of two share a choice.
            run: launches the kernel once.

        Raises:
            SaveFailed: where the cache cannot be written.
        """
        if len(module.configs) == 1:
            return module.configs[0]
        sizes = tuple(_bucket(size) for size in key)
        if (module.path, sizes) not in self._chosen:
            self._chosen[module.path, sizes] = self._choose(module, sizes, run)
        return self._chosen[module.path, sizes]

    def _choose(self, module: Module, sizes: tuple[int, ...], run: Callable[[Config], None]) -> Config:
        path = self._path(module, sizes)
        known = _read(path, len(module.configs))
        times = self._extended(known, module, run)
        if all(t is None for t in times):  # a fault, or the budget: no reason to try nothing of it again
            return module.configs[0]
        if times != known:
            modules.keep(path, _text(module, self._device, sizes, times))
        best = min((i for i, t in enumerate(times) if t is not None), key=lambda i: times[i] or 0.0)
        self._say(module, sizes, times, best)
        return module.configs[best]

    def _path(self, module: Module, sizes: tuple[int, ...]) -> Path:
        import triton

        name = f"{module.path.stem}-{build.key(module.source, self._device, triton.__version__, sizes)}"
        return modules.folder() / "tuned" / f"{name}.json"

    def _extended(self, known: Times, module: Module, run: Callable[[Config], None]) -> Times:
        """``known`` and the times of the configurations after it, while the budget lasts."""
        times = list(known)
        for config in module.configs[len(known) :]:
            if self._left <= 0:
                break
            start = time.perf_counter()
            times.append(self._time(module, config, run))
            self._left -= time.perf_counter() - start
        return times

    def _time(self, module: Module, config: Config, run: Callable[[Config], None]) -> float | None:
        from triton.errors import TritonError

        try:
            return self._measure(lambda: run(config))
        except torch.AcceleratorError:  # the device is in no state to try another
            raise
        except (TritonError, RuntimeError) as error:  # RuntimeError: what Triton's passes and its launcher raise
            log.info("%s with %s does not run on %s: %s", module.path.stem, dict(config), self._device, error)
            return None

    def _say(self, module: Module, sizes: tuple[int, ...], times: Times, best: int) -> None:
        default, chosen = times[0], times[best] or 0.0
        gain = f"{default / chosen:.2f} times the default's speed" if default and chosen else "the default does not run"
        log.info(
            "%s for %s on %s: %s, %.4f ms, %s (%d of %d measured)",
            *(module.path.stem, sizes, self._device, dict(module.configs[best]), chosen, gain),
            *(len(times), len(module.configs)),
        )


def _bucket(size: int) -> int:
    """The power of two that a size is rounded up to; 0 is itself."""
    return 1 << (size - 1).bit_length() if size else 0


def _text(module: Module, device: str, sizes: tuple[int, ...], times: Times) -> str:
    """The record: names for people, and the times."""
    record = {"kernel": module.path.name, "device": device, "sizes": sizes, "milliseconds": times}
    return json.dumps(record) + "\n"


def _read(path: Path, configs: int) -> Times:
    """The times that a record holds; none where there is no record, or none that could be one of ours."""
    if not path.exists():
        return []
    try:
        times = json.loads(path.read_bytes())["milliseconds"]
        if 0 < len(times) <= configs and all(t is None or 0 <= t < float("inf") for t in times):
            return list(times)
        reason = "no times of this kernel's configurations"
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = repr(error)
    log.warning("%s cannot be used, and is measured anew: %s", path, reason)
    return []
