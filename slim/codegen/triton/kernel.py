"""What a Triton kernel is before it is text in a file: its statements, what it takes, its configurations.

A generated module holds one kernel, ``CONFIGS``, ``grid``, ``scratch`` and ``launch``; see ``Kernel.source``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from slim.codegen.regions.views import Buffer, Size

Config = Mapping[str, int]  # constants of a kernel, num_warps and num_stages

# Memory that the runtime owns: float32 partial results, int32 counters that are zero before and after every kernel,
# the int64 values of the dimensions that change between replays, an int32 that is set where an index was out of range.
# What is "given" the kernel's one caller passes by itself.
Own = Literal["scratch", "counters", "live", "fault", "given"]
OWN_DTYPES: dict[str, str] = {"scratch": "fp32", "counters": "i32", "live": "i64", "fault": "i32"}


@dataclass(frozen=True)
class Pointer:
    """A parameter that is memory.

    Attributes:
        name: of the parameter.
        dtype: as Triton spells it, "bf16".
        memory: whose address is passed.
    """

    name: str
    dtype: str
    memory: Buffer | Own


@dataclass
class Kernel:
    """One kernel, and how it is called.

    Attributes:
        name: of the function, in words: "linear_one_row".
        title: the region in one line, and where in the model it comes from; the header comment.
        body: statements.
        pointers: in the order of the parameters; sizes follow, named ``sizes``' keys, then the constants.
        sizes: parameter -> its value as an expression in the dimensions of a call.
        configs: what may be chosen; the first is the default.
        grid: an expression for each axis, over the sizes, the constants and ``triton.cdiv``.
        scratch: number of float32 that the kernel keeps partial results in, as such an expression.
        counters: the same for int32 counters.
        functions: names that the body uses out of ``slim.codegen.triton.functions``.
    """

    name: str
    title: Sequence[str]
    body: list[str]
    pointers: list[Pointer]
    sizes: dict[str, Size]
    configs: Sequence[Config]
    grid: Sequence[str]
    scratch: str = "0"
    counters: str = "0"
    functions: Sequence[str] = ()

    @property
    def constants(self) -> list[str]:
        return [name for name in self.configs[0] if name not in ("num_warps", "num_stages")]

    @property
    def source(self) -> str:
        """The module, as it is written to a file."""
        return "\n".join([*(f"# {line}" for line in self.title), self.code])

    @property
    def code(self) -> str:
        """The same without its title: equal for kernels that do the same in different layers."""
        constants = self.constants
        parameters = [*(p.name for p in self.pointers), *self.sizes, *(f"{name}: tl.constexpr" for name in constants)]
        unpack = [f"    {name} = n[{i}]" for i, name in enumerate(self.sizes)]
        unpack += [f'    {name} = c["{name}"]' for name in constants]
        functions = [f"from slim.codegen.triton.functions import {', '.join(sorted(set(self.functions)))}"]
        lines = [
            "import triton",
            "import triton.language as tl",
            *(["", *functions] if self.functions else []),
            "",
            "# The first is taken unless the kernel was tuned.",
            "CONFIGS = [",
            *(f"    dict({', '.join(f'{k}={v}' for k, v in config.items())})," for config in self.configs),
            "]",
            f"POINTERS = {[(p.name, p.dtype) for p in self.pointers]!r}",
            f"SIZES = {list(self.sizes)!r}",
            "", "",
            "@triton.jit",
            f"def {self.name}({', '.join(parameters)}):",
            *(f"    {line}" if line else "" for line in self.body),
            "", "",
            "def plan(n, c):",
            '    """(grid, float32 of scratch, counters) for the sizes ``n`` under the configuration ``c``."""',
            *_used(unpack, [*self.grid, self.scratch, self.counters]),
            f"    return ({', '.join(self.grid)},), {self.scratch}, {self.counters}",
            "", "",
            "def launch(pointers, n, c):",
            f"    {self.name}[plan(n, c)[0]](*pointers, *n, **c)",
            "",
        ]  # fmt: skip
        return "\n".join(lines)


def _used(assignments: Sequence[str], expressions: Sequence[str]) -> list[str]:
    """Those assignments whose name an expression reads."""
    words = set(re.findall(r"\w+", " ".join(expressions)))
    return [line for line in assignments if line.split()[0] in words]


@dataclass
class Form:
    """The kernels of a region, in order, for calls of up to ``upto`` rows; None where there is no limit."""

    kernels: list[Kernel]
    upto: int | None = None


@dataclass
class Stage:
    """A region as kernels: the first form whose limit ``rows`` keeps is run.

    Attributes:
        temps: memory that its own kernels pass between them.
    """

    forms: list[Form]
    rows: Size = 1
    temps: list[Buffer] = field(default_factory=list)
