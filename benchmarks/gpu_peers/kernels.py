"""Where the time of one decode step goes, kernel by kernel.

Two lengths are profiled and taken from each other, so that what is done once a call (the prompt, a graph's capture)
drops out, whatever the engine does inside.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_peers.device import Device
from benchmarks.gpu_peers.engines import Engine

SHORT, LONG = 9, 41  # new tokens
SHOWN, WIDTH = 40, 90  # kernels in the table, and characters of a name


@dataclass
class Spent:
    """What ran, by name: how often, and for how many microseconds."""

    calls: Counter[str] = field(default_factory=Counter)
    times: Counter[str] = field(default_factory=Counter)


def step_table(engine: Engine, device: Device, prompt: Tensor, floor: float) -> str:
    """The kernels of a step in Markdown; ``floor`` is the seconds that reading the weights takes at least."""
    for new in (LONG, SHORT):
        engine.decode(prompt, new)  # tuned, captured and warm
    wall = min(engine.decode(prompt, LONG) for _ in range(3))
    long, short = (_spent(engine, device, prompt, new) for new in (LONG, SHORT))
    steps = LONG - SHORT
    times = {name: (long.times[name] - short.times[name]) / steps for name in long.times}
    calls = {name: (long.calls[name] - short.calls[name]) / steps for name in long.times}
    busy = sum(times.values())
    lines = ["| kernel | calls a step | us a step | % of kernels |", "|---|---|---|---|"]
    names = sorted((name for name in times if calls[name] > 0), key=lambda name: -times[name])
    lines += [
        f"| `{_short(n)}` | {calls[n]:.1f} | {times[n]:.1f} | {100 * times[n] / busy:.1f} |" for n in names[:SHOWN]
    ]
    lines += ["", f"{len(names)} kernels by name, {sum(calls[name] for name in names):.0f} calls a step."]
    gaps = f"so {1e6 * wall - busy:.1f} us are gaps (below zero where kernels overlap)"
    lines.append(f"A step takes {1e6 * wall:.1f} us unprofiled; kernels take {busy:.1f} us, {gaps}.")
    lines.append(f"Reading weights and cache once, at copy bandwidth, takes {1e6 * floor:.1f} us.")
    return "\n".join(lines)


def _spent(engine: Engine, device: Device, prompt: Tensor, new: int) -> Spent:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * device.is_cuda
    with profile(activities=activities) as found:
        engine.decode(prompt, new)
        device.synchronize()
    spent = Spent()
    for event in found.events() or ():
        if _counts(event, device):
            spent.calls[event.name] += 1
            spent.times[event.name] += event.time_range.elapsed_us() if device.is_cuda else event.self_cpu_time_total
    return spent


def _counts(event: Any, device: Device) -> bool:
    """Kernels and copies; annotations cover the kernels that are counted already."""
    kind = DeviceType.CUDA if device.is_cuda else DeviceType.CPU
    return event.device_type == kind and not event.is_user_annotation


def _short(name: str) -> str:
    plain = name.replace("|", "/")
    return plain if len(plain) <= WIDTH else plain[: WIDTH - 3] + "..."
