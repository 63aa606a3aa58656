"""The library's kernels against double precision: every instruction set that runs here, and under sanitizers."""

import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from slim.codegen import build

SOURCES = Path(__file__).parent / "kernels"
TESTS = ["linear_test", "attention_test", "attention_kept_test", "greedy_test"]
pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"no C++ code here: {build.missing()}")

SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
AARCH64 = "aarch64-linux-gnu-g++"
OPTIONS = (
    *("-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp-simd", "-pthread"),
)


@cache
def version(command: str) -> str:
    return subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout


def compiled(name: str, command: str, flags: tuple[str, ...], sources: Sequence[Path], *objects: Path) -> Path:
    """A program, or an object of several sources, in the cache: tests of the same kernels share it."""
    headers = [path for folder in (build.KERNELS, SOURCES) for path in sorted(folder.glob("*.h"))]
    texts = [path.read_bytes() for path in (*sources, *headers)]
    key = build.key(version(command), flags, [path.name for path in objects], *texts)
    target = build.cache_folder() / "tests" / f"{name}-{key}"

    def make(path: Path) -> None:
        subprocess.run(
            [command, *flags, f"-I{build.KERNELS}", *map(str, (*sources, *objects)), "-o", str(path)],
            check=True, capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return build.once(target, make)


def driver(name: str, command: str, *flags: str, kernels: Path | None = None) -> Path:
    """A test program, linked with the kernels that it tests: ``kernels``, or what its own flags make of them."""
    needed = "team.cpp" if name == "greedy_test" else "*.cpp"
    flags = (*OPTIONS, *flags)
    objects = [kernels] if kernels else [
        compiled(source.name, command, (*flags, "-c"), [source]) for source in sorted(build.KERNELS.glob(needed))
    ]  # fmt: skip
    return compiled(name, command, flags, [SOURCES / f"{name}.cpp"], *objects)


def passes(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def runs_here(isa: build.Isa) -> bool:
    return isa.needs <= build._features()


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("isa", ["avx512_vnni", "avx2", "scalar"])
def test_kernels_compute_what_doubles_do(name: str, isa: str):
    """Those of this machine as they are shipped, of others as they are quickly built."""
    if not runs_here(build.ISAS[isa]):
        pytest.skip(f"this processor has no {isa}")
    shipped = build.kernel_object(build.ISAS[isa]) if isa == build.host_isa().name else None
    passes([str(driver(name, "g++", "-O1", *build.ISAS[isa].flags, kernels=shipped)), "3", "30"])


@pytest.mark.parametrize("name", TESTS)
def test_kernels_touch_no_memory_that_is_not_theirs(name: str):
    isa = build.ISAS["avx2" if runs_here(build.ISAS["avx2"]) else "scalar"]
    passes([str(driver(name, "g++", *SANITIZED, *isa.flags)), "5", "25"])


@pytest.mark.parametrize("name", TESTS)
def test_kernels_are_right_on_arm(name: str):
    if shutil.which(AARCH64) is None or shutil.which("qemu-aarch64") is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    binary = driver(name, AARCH64, "-O1", *build.ISAS["neon_dotprod"].flags)
    passes(["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", str(binary), "7", "4"])
