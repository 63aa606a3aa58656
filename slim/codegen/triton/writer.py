"""What every kernel's text is made with: its parameters, and the table of who writes which region."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from slim.codegen.regions.describe import line
from slim.codegen.regions.schedule import Region
from slim.codegen.regions.views import Buffer, Size
from slim.codegen.triton.kernel import OWN_DTYPES, Config, Kernel, Own, Pointer, Stage
from slim.compiler.program import where

DTYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "u8",  # its bits: not every GPU knows the type
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip

Emit = Callable[[Any, "Target"], Stage]
WRITERS: dict[type, Emit] = {}


def writes(kind: type) -> Callable[[Emit], Emit]:
    """Registers the function that writes the kernels of a kind of region."""

    def register(function: Emit) -> Emit:
        WRITERS[kind] = function
        return function

    return register


class Target:
    """What kernels are written for.

    Attributes:
        live: names of the dimensions that change between replays of a captured call: kernels read them from memory,
            in this order, and no grid may depend on them.
        processors: how many programs the device runs side by side, for deciding how finely to split.
    """

    def __init__(self, live: Sequence[str] = (), processors: int = 132) -> None:
        self.live = tuple(live)
        self.processors = processors


class Writer:
    """The parameters of one kernel, noted as its text asks for them; equal kernels of two layers get equal texts."""

    def __init__(self, region: Region, target: Target) -> None:
        self.region = region
        self.target = target
        self.pointers: list[Pointer] = []
        self.sizes: dict[str, Size] = {}
        self.prelude: list[str] = []  # statements that go before all others
        self.functions: set[str] = set()

    def pointer(self, memory: Buffer | Own, name: str | None = None) -> str:
        """The parameter for a buffer, called ``name`` when it is first asked for ("x", "w0", "out")."""
        for known in self.pointers:
            if known.memory is memory or (isinstance(memory, str) and known.memory == memory):
                return known.name
        chosen = memory if isinstance(memory, str) else name or f"p{len(self.pointers)}"
        if any(known.name == chosen for known in self.pointers):
            chosen = f"{chosen}_{len(self.pointers)}"
        dtype = OWN_DTYPES[memory] if isinstance(memory, str) else DTYPES[memory.dtype]
        self.pointers.append(Pointer(chosen, dtype, memory))
        return chosen

    def size(self, size: Size) -> str:
        """A literal, a parameter, or an expression over dimensions that are read from memory."""
        if isinstance(size, int):
            return str(size)
        size = sympy.expand(sympy.sympify(size))
        if size.is_Integer:
            return str(int(size))
        if not self.is_live(size):
            return self._parameter(size)
        return self._live(size)

    def is_live(self, size: Size) -> bool:
        """Whether ``size`` may change between replays."""
        return not isinstance(size, int) and any(str(s) in self.target.live for s in sympy.sympify(size).free_symbols)

    def function(self, name: str) -> str:
        """A function of functions.py."""
        self.functions.add(name)
        return name

    def kernel(
        self, name: str, body: Sequence[str], configs: Sequence[Config], grid: Sequence[str], scratch: str = "0",
        counters: str = "0",
    ) -> Kernel:  # fmt: skip
        title = [line(self.region), where(self.region.node)]
        return Kernel(
            name, title, [*self.prelude, *body], self.pointers, self.sizes, configs, grid, scratch, counters,
            sorted(self.functions),
        )  # fmt: skip

    def _parameter(self, size: Size) -> str:
        for name, known in self.sizes.items():
            if known == size:
                return name
        name = f"n{len(self.sizes)}"
        self.sizes[name] = size
        return name

    def _live(self, size: Any) -> str:
        """``size`` in a kernel's own arithmetic."""
        if size.is_Symbol and str(size) in self.target.live:
            name = f"{size}_now"
            load = f"{name} = tl.load({self.pointer('live')} + {self.target.live.index(str(size))})"
            if load not in self.prelude:
                self.prelude.append(load)
            return name
        if not self.is_live(size):
            return self.size(size)
        args = [self._live(arg) for arg in size.args]
        kind = type(size).__name__
        if kind in ("Add", "Mul"):
            return f"({(' + ' if kind == 'Add' else ' * ').join(args)})"
        if kind in ("FloorDiv", "CleanDiv"):
            return f"({args[0]} // {args[1]})"
        if kind in ("Max", "Min"):
            return f"tl.{'maximum' if kind == 'Max' else 'minimum'}({args[0]}, {args[1]})"
        raise ValueError(f"the size {size} has no form in Triton")


def indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


__all__ = ["DTYPES", "WRITERS", "Emit", "Target", "Writer", "indented", "power_of_two", "writes"]
