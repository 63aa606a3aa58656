"""From kernels to calls: which form of a stage a call needs, what it is given, how large its grid is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import sympy
from torch import Tensor

from slim.codegen.regions.views import Buffer, Size
from slim.codegen.triton.kernel import Config, Form, Kernel, Own, Stage
from slim.codegen.triton.modules import Module
from slim.codegen.triton.tuning import Tuner


class Sizes:
    """All sizes that a program needs, computed together: one function of the dimensions, made when first called."""

    def __init__(self, dims: Sequence[str]) -> None:
        self.dims = tuple(dims)
        self._place: dict[Any, int] = {}
        self._function: Callable[..., tuple[int, ...]] | None = None

    def add(self, size: Size) -> None:
        """Notes a size that calls will ask for."""
        if not isinstance(size, int) and size not in self._place:
            self._place[size] = len(self._place)
            self._function = None

    def bind(self, bound: Mapping[str, int]) -> Callable[[Size], int]:
        """What each size is in a call."""
        if self._function is None:
            symbols = [sympy.Symbol(name, integer=True, positive=True) for name in self.dims]
            self._function = sympy.lambdify(symbols, tuple(self._place), modules="math")
        values = self._function(*(bound[name] for name in self.dims))
        return lambda size: size if isinstance(size, int) else int(values[self._place[size]])


@dataclass(frozen=True)
class Launch:
    """One kernel call, with everything at hand."""

    module: Module
    pointers: Sequence[Tensor]
    sizes: Sequence[int]
    config: Config

    def __call__(self) -> None:
        self.module.launch(self.pointers, self.sizes, self.config)

    def tuned(self, tuner: Tuner) -> Launch:
        """The same in the configuration that ``tuner`` chooses."""
        config = tuner.choose(self.module, self.sizes, partial(self.module.launch, self.pointers, self.sizes))
        return replace(self, config=config)


def form_of(stage: Stage, size: Callable[[Size], int]) -> Form:
    """The form of ``stage`` for a call of these sizes."""
    rows = size(stage.rows)
    return next(form for form in stage.forms if form.upto is None or rows <= form.upto)


def needs(kernel: Kernel, module: Module, config: Config, size: Callable[[Size], int]) -> tuple[int, int]:
    """(float32 of scratch, counters) of a call."""
    _, scratch, counters = module.plan([size(value) for value in kernel.sizes.values()], config)
    return scratch, counters


def prepare(
    kernel: Kernel, module: Module, config: Config, size: Callable[[Size], int],
    memory: Callable[[Buffer | Own], Tensor],
) -> Launch:  # fmt: skip
    """A call of ``kernel`` on ``memory``."""
    pointers = [memory(pointer.memory) for pointer in kernel.pointers]
    return Launch(module, pointers, [size(value) for value in kernel.sizes.values()], config)
