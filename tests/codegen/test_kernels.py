"""The library's kernels against double precision: every instruction set that runs here, and under sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

from slim.codegen import build

SOURCES = Path(__file__).parent / "kernels"
pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"no C++ code here: {build.missing()}")

SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
AARCH64 = "aarch64-linux-gnu-g++"


def driver(name: str, folder: Path, command: str, *flags: str) -> Path:
    """A test program, compiled with the kernels that it tests."""
    binary = folder / name
    needed = "team.cpp" if name == "greedy_test" else "*.cpp"
    kernels = sorted(str(path) for path in build.KERNELS.glob(needed))
    options = ["-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-pthread"]
    subprocess.run(
        [command, *options, *flags, f"-I{build.KERNELS}", str(SOURCES / f"{name}.cpp"), *kernels, "-o", str(binary)],
        check=True, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return binary


def passes(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def runs_here(isa: build.Isa) -> bool:
    return isa.needs <= build._features()


@pytest.mark.parametrize("name", ["linear_test", "attention_test", "greedy_test"])
@pytest.mark.parametrize("isa", ["avx512_vnni", "avx2", "scalar"])
def test_kernels_compute_what_doubles_do(name: str, isa: str, tmp_path: Path):
    if not runs_here(build.ISAS[isa]):
        pytest.skip(f"this processor has no {isa}")
    passes([str(driver(name, tmp_path, "g++", "-O1", *build.ISAS[isa].flags)), "3", "30"])


@pytest.mark.parametrize("name", ["linear_test", "attention_test", "greedy_test"])
def test_kernels_touch_no_memory_that_is_not_theirs(name: str, tmp_path: Path):
    isa = build.ISAS["avx2" if runs_here(build.ISAS["avx2"]) else "scalar"]
    passes([str(driver(name, tmp_path, "g++", *SANITIZED, *isa.flags)), "5", "25"])


@pytest.mark.parametrize("name", ["linear_test", "attention_test", "greedy_test"])
def test_kernels_are_right_on_arm(name: str, tmp_path: Path):
    if shutil.which(AARCH64) is None or shutil.which("qemu-aarch64") is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    binary = driver(name, tmp_path, AARCH64, "-O1", *build.ISAS["neon_dotprod"].flags)
    passes(["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", str(binary), "7", "4"])
