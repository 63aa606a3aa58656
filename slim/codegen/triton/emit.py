"""From regions to modules of Triton: a kernel that several layers share is written once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import sympy

from slim.codegen.regions.products import Linear
from slim.codegen.regions.provenance import Kernel as Placed
from slim.codegen.regions.schedule import Attention, Foreign, Norm, Reduce, Region, Schedule
from slim.codegen.regions.views import Size
from slim.codegen.regions.wants import Wants
from slim.codegen.triton import attention, linear, loops  # noqa: F401  they register what writes each region
from slim.codegen.triton.kernel import Kernel, Stage
from slim.codegen.triton.weights import QUANTIZED
from slim.codegen.triton.writer import WRITERS, Target

WANTS = Wants(
    wide=False, packed=False, formats=frozenset({"f32", "bf16", "f16", *QUANTIZED}), int8_rows=True, own_steps=True,
    requantises=True, pitched=True,
)  # fmt: skip


@dataclass
class Unit:
    """A program as stages.

    Attributes:
        steps: what to run in order.
        kernels: file name -> a kernel; each different one once.
        names: id of each stage's kernel -> the file that holds it.
        live: names of the dimensions that kernels read from memory.
    """

    steps: list[Stage | Foreign]
    kernels: dict[str, Kernel]
    names: dict[int, str]
    live: tuple[str, ...]

    def placed(self, number: int, _: Region) -> list[Placed]:
        """The kernels of a region in all its forms, by its number."""
        step = self.steps[number]
        kernels = [] if isinstance(step, Foreign) else [kernel for form in step.forms for kernel in form.kernels]
        return [Placed(kernel.name, self.names[id(kernel)]) for kernel in kernels]


def emit(schedule: Schedule, processors: int) -> Unit:
    """The kernels of a whole program."""
    live = live_dims(schedule)
    target = Target(live, processors)
    steps: list[Stage | Foreign] = [
        region if isinstance(region, Foreign) else WRITERS[type(region)](region, target) for region in schedule.regions
    ]
    alike: dict[str, list[Kernel]] = defaultdict(list)
    for stage in steps:
        if isinstance(stage, Stage):
            for form in stage.forms:
                for kernel in form.kernels:
                    alike[kernel.code].append(kernel)
    kernels: dict[str, Kernel] = {}
    names: dict[int, str] = {}
    for number, group in enumerate(alike.values()):
        first = group[0]
        more = [f"and {len(group) - 1} more like it"] if len(group) > 1 else []
        name = f"{number:02}_{first.name}.py"
        kernels[name] = replace(first, title=[*first.title, *more])
        names |= {id(kernel): name for kernel in group}
    return Unit(steps, kernels, names, live)


def live_dims(schedule: Schedule) -> tuple[str, ...]:
    """The dimensions that no grid and no memory of a call depends on: a replay may change them.

    In a step over a cache that is the number of keys: it decides how far attention looks, and nothing else.
    """
    fixed: set[str] = set()
    for region in schedule.regions:
        for buffer in (*region.writes(), *(b for b in region.reads() if b.kind != "input")):
            fixed |= _names(*buffer.shape)
        fixed |= _names(*_space(region))
    for buffer in schedule.outputs:
        fixed |= _names(*buffer.shape)
    return tuple(name for name in sorted(schedule.dims) if name not in fixed)


def _space(region: Region) -> tuple[Size, ...]:
    """The sizes that a grid over ``region`` is made of."""
    if isinstance(region, (Norm, Reduce)):
        return region.shape
    if isinstance(region, Linear):
        return region.source.view.shape
    if isinstance(region, Attention):
        chosen = region.k_bounds is not None or (region.pattern is not None and region.pattern.vote is not None)
        pages = region.pages.shape if chosen and region.pages is not None else ()  # memory is made for all their keys
        return (*region.q.shape, *pages) if region.k_cache is not None else (*region.q.shape, *region.k.shape)
    if isinstance(region, Foreign):
        return tuple(size for view in region.dtypes for size in view.shape)
    return ()


def _names(*sizes: Any) -> set[str]:
    return {str(symbol) for size in sizes for symbol in sympy.sympify(size).free_symbols}
