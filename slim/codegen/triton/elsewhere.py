"""A Program as Triton kernels for a GPU that is not here: every source and binary to look at, and nothing to run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from slim import errors
from slim.codegen.regions.lower import lower
from slim.codegen.regions.provenance import Stage, stages
from slim.codegen.triton import modules
from slim.codegen.triton.ahead import Binary, compile_for
from slim.codegen.triton.device import ahead
from slim.codegen.triton.emit import WANTS, emit
from slim.codegen.triton.executable import form
from slim.compiler.program import Program


class AheadExecutable:
    """A Program compiled ahead of time, each kernel in its default configuration.

    Attributes:
        code: the modules, and beside each its assembly and its binary: "03_linear_one_row.py", ".ptx", ".cubin".
        binaries: file name of a module -> what became of it: registers, spills, shared memory.
    """

    def __init__(self, program: Program, architecture: str) -> None:
        self._architecture = architecture
        self._schedule = schedule = lower(program, WANTS)
        self._unit = unit = emit(schedule, ahead(architecture).processors)
        self.binaries: dict[str, Binary] = {name: compile_for(k, architecture) for name, k in unit.kernels.items()}
        code: dict[str, str | bytes] = {}
        for name, kernel in unit.kernels.items():
            binary, stem = self.binaries[name], name.removesuffix(".py")
            code[name] = modules.load(kernel).source
            code[f"{stem}.{'ptx' if binary.kind == 'cubin' else 'amdgcn'}"] = binary.assembly
            code[f"{stem}.{binary.kind}"] = binary.data
        self.code: Mapping[str, str | bytes] = code
        self.form = form(schedule, len(unit.kernels))

    @property
    def stages(self) -> list[Stage]:
        """The regions in the order they would run, each with its nodes and its kernels."""
        return stages(self._schedule, self._unit.placed)

    def __call__(self, *inputs: Tensor) -> NoReturn:
        self._refuse()

    def bind(self, *inputs: Tensor) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        reason = (
            f"it was compiled ahead of time, to be looked at. To run it, save it and slim.load(..., target='cuda') on "
            f"a machine with a GPU of {self._architecture}"
        )
        raise errors.TargetUnavailable(target=f"cuda:{self._architecture}", reason=reason)
