"""From C++ source to a shared object: which compiler, which instructions, and a cache that processes share.

A build is named by what it was made from (sources, headers, flags, compiler version), so a file that is there is the
right one; it appears under its name only when it is whole, and one process makes it while others wait.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from filelock import FileLock

from slim import errors

log = logging.getLogger(__name__)

KERNELS = Path(__file__).parent / "cpp" / "kernels"
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),
)
_SHOWN = 20  # lines of a compiler's output that an error repeats


# -- instruction sets --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Isa:
    """The instructions that a build may use.

    Attributes:
        name: as ``SLIM_ISA`` has it, and as files in the cache are called.
        flags: what tells the compiler.
        needs: what the kernel must list among the processor's features (/proc/cpuinfo) for the code to run.
    """

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


def _x86(name: str, *features: str) -> Isa:
    """An x86 instruction set: gcc's flags are the features as Linux spells them, without underscores."""
    return Isa(name, tuple("-m" + feature.replace("_", "") for feature in features), frozenset(features))


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", *_AVX2)
# The best first.
ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        _x86("avx512_vnni", *_AVX512, "avx512_vnni"),
        _x86("avx512", *_AVX512),
        _x86("avx2", *_AVX2),
        Isa("neon_dotprod", ("-march=armv8.2-a+dotprod+fp16",), frozenset({"asimd", "asimddp", "asimdhp"})),
        Isa("neon", ("-march=armv8-a",), frozenset({"asimd"})),
        Isa("scalar", ("-DSLIM_SCALAR",), frozenset()),
    )
}


def host_isa() -> Isa:
    """The best instruction set that this machine has, or the one that ``SLIM_ISA`` names.

    Raises:
        BadEnvironment: where SLIM_ISA names none, or one that this machine does not have.

    Example:
        >>> host_isa().name
        'avx2'
    """
    features = _features()
    here = [isa for isa in ISAS.values() if isa.needs <= features]
    forced = os.environ.get("SLIM_ISA")
    if not forced:
        return here[0]
    for isa in here:
        if isa.name == forced:
            return isa
    reason = f"this processor has no {', '.join(sorted(ISAS[forced].needs - features))}" if forced in ISAS else ""
    raise errors.BadEnvironment(
        variable="SLIM_ISA",
        value=forced,
        reason=reason or f"there is no such instruction set (known: {', '.join(ISAS)})",
        accepted=[isa.name for isa in here],
    )


@cache
def _features() -> frozenset[str]:
    """The processor's features as Linux names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        arm = platform.machine().lower() in ("arm64", "aarch64")
        apple = {"asimddp", "asimdhp"} if sys.platform == "darwin" else set()  # all of Apple's have them
        return frozenset({"asimd", *apple} if arm else ())
    words = next((line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(words.split())


# -- the compiler ------------------------------------------------------------------------------------------------------


def compiler() -> tuple[str, ...] | None:
    """The command that compiles C++: the environment's CXX (arguments allowed), else g++, clang++ or c++.

    Returns:
        The program's full path and its arguments; None where there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for program, *arguments in [named] if named else [["g++"], ["clang++"], ["c++"]]:
        found = shutil.which(program)
        if found:
            return found, *arguments
    return None


def missing() -> str | None:
    """Why C++ cannot be built on this machine; None where it can."""
    if compiler():
        return None
    if os.environ.get("CXX"):
        return f"there is no C++ compiler '{os.environ['CXX']}', which the environment's CXX names"
    return "there is no C++ compiler (g++, clang++ or c++); install one, or name one in the environment's CXX"


@dataclass(frozen=True)
class _Toolchain:
    """A compiler with all that its results depend on, sources aside."""

    command: tuple[str, ...]
    version: str
    openmp: tuple[str, ...]  # flags that compile OpenMP
    runtime: tuple[str, ...]  # what links it

    @classmethod
    def found(cls) -> _Toolchain:
        command = compiler()
        if command is None:
            raise errors.TargetUnavailable(target="cpu", reason=str(missing()))
        version = _version(command)
        return cls(command, version, *_openmp("clang" in version))


@cache
def _version(command: tuple[str, ...]) -> str:
    return _run([*command, "--version"], f"running {command[0]}", Path(command[0]))


@cache
def _openmp(clang: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Flags that compile OpenMP, and those that link it: to the very library that torch has loaded.

    A second OpenMP in one process would mean a second pool of threads, and both fighting for the cores.
    """
    folder = Path(torch.__file__).parent
    ours = "libomp*.dylib" if sys.platform == "darwin" else "libgomp*.so*"
    libraries = sorted([*(folder / "lib").glob(ours), *(folder.parent / "torch.libs").glob(ours)])
    if libraries and sys.platform == "darwin":
        return ("-Xpreprocessor", "-fopenmp"), (str(libraries[0]),)
    if libraries and not clang:  # clang's code calls its own runtime, which libgomp is not
        return ("-fopenmp",), (str(libraries[0]),)
    reason = "clang cannot use torch's libgomp" if libraries else "torch brings no OpenMP library that it could share"
    log.warning("generated code links the compiler's own OpenMP: %s", reason)
    return ("-fopenmp",), ("-fopenmp",)


def _run(command: Sequence[str], what: str, source: Path) -> str:
    """What the command prints.

    Raises:
        BuildFailed: with the first lines of what it printed.
    """
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        output, failed = done.stdout, done.returncode != 0
    except OSError as error:
        output, failed = str(error), True
    if failed:
        lines = output.strip().splitlines()
        more = [f"... {len(lines) - _SHOWN} more lines"] if len(lines) > _SHOWN else []
        shown = "\n".join([*lines[:_SHOWN], *more])
        raise errors.BuildFailed(what=what, command=shlex.join(command), output=shown, source=source)
    return output


# -- the cache ---------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where builds are kept: ``SLIM_CACHE``, or ``slim`` in the user's cache (XDG_CACHE_HOME, ~/.cache)."""
    own = os.environ.get("SLIM_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slim"


def key(*parts: object) -> str:
    """32 hexadecimal digits that stand for ``parts``: other parts, other digits."""
    digest = hashlib.sha256()
    for part in parts:
        text = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(text).to_bytes(8, "little") + text)  # the length, so that ("ab", "c") is not ("a", "bc")
    return digest.hexdigest()[:32]


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """``target``, which ``make`` writes (to the path it is given) if it is not there; other processes wait for it.

    Raises:
        SaveFailed: where the cache cannot be written.
    """
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if target.exists():  # whoever held the lock has made it
                return target
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as folder:
                made = Path(folder) / target.name
                make(made)
                with made.open("rb") as file:
                    os.fsync(file.fileno())  # the name must not survive a crash that the contents do not
                os.replace(made, target)
    except OSError as error:
        raise errors.SaveFailed(path=target.parent, reason=str(error)) from error
    return target


# -- building ----------------------------------------------------------------------------------------------------------


def kernel_object(isa: Isa, folder: Path = KERNELS) -> Path:
    """One relocatable object with all the .cpp files of ``folder``, for ``isa``.

    Raises:
        BuildFailed, TargetUnavailable (no compiler), SaveFailed (no cache).
    """
    tools = _Toolchain.found()
    target = cache_folder() / "cpp" / f"kernels-{isa.name}-{key(tools, isa.flags, _FLAGS, *_contents(folder))}.o"
    return once(target, partial(_compile_kernels, tools, isa, folder))


def shared_object(source: str, isa: Isa, folder: Path = KERNELS) -> Path:
    """``source``, one generated translation unit, compiled and linked with the kernels of ``folder``.

    The source lies beside the result, as .cpp. It may ``#include`` the headers of ``folder``, and exports what it
    marks with ``__attribute__((visibility("default")))``.

    Raises:
        BuildFailed: saying where the source is. TargetUnavailable (no compiler), SaveFailed (no cache).

    Example:
        >>> path = shared_object('extern "C" __attribute__((visibility("default"))) int two() { return 2; }',
        ...                      host_isa())
        >>> load(path).two()
        2
    """
    tools = _Toolchain.found()
    kernels = kernel_object(isa, folder)
    target = cache_folder() / "cpp" / f"model-{isa.name}-{key(kernels.name, source)}.so"
    text = once(target.with_suffix(".cpp"), partial(_write, source))
    return once(target, partial(_compile_model, tools, isa, folder, text, kernels))


def load(path: Path) -> ctypes.CDLL:
    """A shared object in this process; torch, whose OpenMP it is linked to, is there already."""
    return ctypes.CDLL(str(path))


def _contents(folder: Path) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted(folder.glob("*")) if path.suffix in (".h", ".cpp")]


def _write(text: str, path: Path) -> None:
    path.write_text(text)


def _compile(tools: _Toolchain, isa: Isa, folder: Path, source: Path, made: Path) -> Path:
    start = time.perf_counter()
    flags = (*_FLAGS, *isa.flags, *tools.openmp, f"-I{folder}")
    _run([*tools.command, *flags, "-c", str(source), "-o", str(made)], f"compiling {source.name}", source)
    log.info("compiled %s for %s in %.1f s", source.name, isa.name, time.perf_counter() - start)
    return made


def _compile_kernels(tools: _Toolchain, isa: Isa, folder: Path, made: Path) -> None:
    sources = sorted(folder.glob("*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = [made.with_name(f"{source.name}.o") for source in sources]
        compiled = pool.map(partial(_compile, tools, isa, folder), sources, parts)
    objects = [str(path) for path in compiled]
    # one object, not an archive: a linker leaves out of an archive what generated code does not call itself
    _run([*tools.command, "-r", "-nostdlib", *objects, "-o", str(made)], "joining the kernels", folder)


def _compile_model(tools: _Toolchain, isa: Isa, folder: Path, source: Path, kernels: Path, made: Path) -> None:
    model = _compile(tools, isa, folder, source, made.with_suffix(".o"))
    complete = (
        ("-Wl,-z,defs",) if sys.platform == "linux" else ()
    )  # what is missing is said here, not when it is loaded
    command = [*tools.command, "-shared", *complete, str(model), str(kernels), *tools.runtime, "-o", str(made)]
    _run(command, f"linking {source.name}", source)
