"""Compiles a kernel for a GPU that need not be here, and says what of the GPU it takes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sympy

from slim import errors
from slim.codegen.regions.views import Size
from slim.codegen.triton import interpreter, modules
from slim.codegen.triton.kernel import Config, Kernel

_KNOWN = ("sm_80", "sm_90", "gfx942")  # what slim is tested with; others of their kind are tried
_ALIGNED = 16  # bytes of an address, or a divisor of a size, that Triton makes wide loads of


@dataclass(frozen=True)
class Binary:
    """A kernel as machine code.

    Attributes:
        arch: "sm_90", "gfx942".
        assembly: PTX for NVIDIA, GCN for AMD.
        registers: that a thread holds (AMD: the vector ones).
        spills: 0 where all fits into them. Else the bytes that a thread stores and loads for it (NVIDIA, as ptxas
            says), or those of memory that a thread has for it (AMD; scalars that lie in lanes of vector registers cost
            no memory, and are not counted).
        shared: bytes of shared memory that a block takes.
    """

    arch: str
    kind: Literal["cubin", "hsaco"]
    data: bytes
    assembly: str
    registers: int
    spills: int
    shared: int


def compile_for(
    kernel: Kernel, arch: str, config: Config | None = None, sizes: Mapping[str, int] | None = None
) -> Binary:
    """The kernel compiled for ``arch``, "sm_NN" or "gfxNNN", under a configuration or under its default.

    Triton keeps the result in slim's cache and finds it again.

    Args:
        sizes: their values in a call, by parameter: the kernel is then special to them as a launch would make it.
            None compiles what any call can use.

    Raises:
        UnknownTarget: where ``arch`` is neither.
        TargetUnavailable: where this Triton cannot compile for it, or interprets kernels in this process.
        KernelFailed: with what Triton said.

    Example:
        >>> compile_for(kernel, "sm_90").spills
        0
    """
    target = _target(arch)
    module = modules.load(kernel)
    try:
        # Triton prints what ptxas says; where that fails, with all of the PTX, and ptxas' own words are in the error
        said = io.StringIO()
        with modules.compiling(), _verbose(), contextlib.redirect_stdout(said):
            compiled = _compile(kernel, module, target, config or kernel.configs[0], sizes)
        return _nvidia(arch, compiled, said.getvalue()) if target.backend == "cuda" else _amd(arch, compiled)
    except Exception as error:  # of any class: Triton's passes, its code generator and its backends have no common one
        if "not defined for option 'gpu-name'" in str(error):
            raise errors.TargetUnavailable(target=arch, reason="Triton's ptxas does not know it") from error
        output = str(error).strip() or type(error).__name__
        raise errors.KernelFailed(what=kernel.name, arch=arch, output=output, source=module.path) from error


# -- what Triton is told -----------------------------------------------------------------------------------------------


def _target(arch: str) -> Any:
    """Triton's name for the GPU."""
    nvidia, amd = re.fullmatch(r"sm_(\d{2,3})", arch), re.fullmatch(r"gfx(\d{1,2})[0-9a-f]{2}", arch)
    if not nvidia and not amd:
        raise errors.UnknownTarget(target=arch, known=_KNOWN)
    if importlib.util.find_spec("triton") is None:
        raise errors.TargetUnavailable(target=arch, reason="Triton is not installed")
    if interpreter.interpreting():
        reason = "Triton interprets kernels in this process, for the environment has TRITON_INTERPRET"
        raise errors.TargetUnavailable(target=arch, reason=reason)
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    if ("nvidia" if nvidia else "amd") not in backends:
        raise errors.TargetUnavailable(target=arch, reason="this Triton was built without its compiler")
    if nvidia:
        return GPUTarget("cuda", int(nvidia[1]), 32)
    return GPUTarget("hip", arch, 32 if amd and int(amd[1]) >= 10 else 64)


def _compile(
    kernel: Kernel, module: modules.Module, target: Any, config: Config, sizes: Mapping[str, int] | None
) -> Any:
    import triton
    from triton.compiler import ASTSource

    constants = {name: config[name] for name in kernel.constants}
    options = {name: value for name, value in config.items() if name not in constants}
    known = kernel.sizes if sizes is None else sizes
    signature = _signature(kernel)
    for name, size in known.items():
        if size == 1:  # as Triton's launcher does
            constants[name], signature[name] = 1, "constexpr"
    source = ASTSource(module.function, signature, constants, _attributes(kernel, known))
    return triton.compile(source, target=target, options=options)


def _signature(kernel: Kernel) -> dict[str, str]:
    """Parameter -> its type as Triton spells it, in the order of the parameters."""
    pointers = {pointer.name: f"*{pointer.dtype}" for pointer in kernel.pointers}
    return pointers | dict.fromkeys(kernel.sizes, "i32") | dict.fromkeys(kernel.constants, "constexpr")


def _attributes(kernel: Kernel, sizes: Mapping[str, Size]) -> dict[tuple[int], list[list[Any]]]:
    """What a launch tells Triton about the values of pointers and sizes: which are multiples of 16."""
    aligned = [True] * len(kernel.pointers) + [_divisible(sizes[name]) for name in kernel.sizes]
    return {(i,): [["tt.divisibility", _ALIGNED]] for i, yes in enumerate(aligned) if yes}


def _divisible(size: Size) -> bool:
    """Whether a size is a multiple of 16 whatever its symbols are: 4096 * S is, S + 16 is not."""
    terms: Mapping[Any, Any] = sympy.sympify(size).expand().as_coefficients_dict()
    return all(term.is_integer and coefficient % _ALIGNED == 0 for term, coefficient in terms.items())


# -- what it takes -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _verbose() -> Iterator[None]:
    """Inside, Triton prints what ptxas says of a kernel that it compiles."""
    from triton import knobs

    with knobs.nvidia.scope():
        knobs.nvidia.dump_ptxas_log = True
        yield


def _nvidia(arch: str, compiled: Any, said: str) -> Binary:
    """``said`` is nothing where Triton found the kernel in its cache: it is assembled again."""
    ptx: str = compiled.asm["ptx"]
    if "registers" not in said:
        said = _assembled(ptx)
    spills = sum(_numbers(r"(\d+) bytes spill (?:stores|loads)", said))
    registers = max(_numbers(r"Used (\d+) registers", said))
    return Binary(arch, "cubin", compiled.asm["cubin"], ptx, registers, spills, compiled.metadata.shared)


def _assembled(ptx: str) -> str:
    """What ptxas says of the kernel; the PTX names the machine, such as sm_90a for sm_90."""
    from triton import knobs

    machine = re.search(r"^\.target (sm_(\d+)\w*)", ptx, re.MULTILINE)
    assert machine is not None, "PTX without a target"
    ptxas = knobs.nvidia.ptxas_blackwell if int(machine[2]) >= 100 else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [ptxas.path, "-v", "-lineinfo", f"--gpu-name={machine[1]}", str(file), "-o", f"{file}.o"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(done.stdout)
    return done.stdout


def _amd(arch: str, compiled: Any) -> Binary:
    gcn: str = compiled.asm["amdgcn"]
    spills = max(_numbers(r"\.private_segment_fixed_size: +(\d+)", gcn))
    registers = max(_numbers(r"\.vgpr_count: +(\d+)", gcn))
    return Binary(arch, "hsaco", compiled.asm["hsaco"], gcn, registers, spills, compiled.metadata.shared)


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, text)]
