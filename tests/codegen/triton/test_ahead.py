"""Kernels compile to machine code for GPUs that are not here, and what they spill is known."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sympy

from slim import errors
from slim.codegen import build
from slim.codegen.triton import ahead, interpreter
from tests.codegen.triton import small

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
ARCHS = ("sm_80", "sm_90", "gfx942")


@pytest.fixture(scope="module", params=ARCHS)
def built(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What ahead_script prints for an architecture."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", "tests.codegen.triton.ahead_script", request.param]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {"arch": request.param, "stdout": done.stdout} | json.loads(done.stdout.partition("RESULT ")[2])


def test_the_binary_is_code_for_the_architecture(built: dict[str, Any]) -> None:
    binary = built["add"]
    assert binary["arch"] == built["arch"]
    assert binary["kind"] == ("hsaco" if built["arch"].startswith("gfx") else "cubin")
    assert binary["elf"]
    assert built["arch"] in binary["assembly"]


def test_a_small_kernel_has_registers_and_spills_nothing(built: dict[str, Any]) -> None:
    assert 0 < built["add"]["registers"] < 64
    assert built["add"]["spills"] == built["add"]["shared"] == 0


def test_what_does_not_fit_the_registers_is_reported(built: dict[str, Any]) -> None:
    assert built["spilling"]["spills"] > 0
    assert built["spilling"]["registers"] >= 255


def test_with_more_warps_the_same_kernel_spills_nothing(built: dict[str, Any]) -> None:
    assert built["fitting"]["spills"] == 0
    assert built["fitting"]["shared"] > 0


def test_a_kernel_compiled_again_is_the_same(built: dict[str, Any]) -> None:
    assert built["again"] == built["add"]


def test_a_configuration_can_be_named(built: dict[str, Any]) -> None:
    assert built["wider"]["assembly"] != built["add"]["assembly"]


def test_rows_known_to_be_aligned_are_read_wide(built: dict[str, Any]) -> None:
    wide = r"ld\.global\.v[24]" if built["arch"].startswith("sm") else r"(?:global|buffer)_load_dwordx[24]"
    assert re.search(wide, built["aligned"]["assembly"])
    assert not re.search(wide, built["unaligned"]["assembly"])


def test_a_wrong_kernel_says_what_and_where(built: dict[str, Any]) -> None:
    kind, text = built["wrong"]
    assert kind == "KernelFailed"
    assert "nothing is not defined" in text
    assert f"compiling the kernel 'wrong' for {built['arch']}" in text
    path = Path(re.search(r"source: (.*\.py)", text)[1])
    assert "tl.store(out, nothing)" in path.read_text()
    assert built["stdout"].startswith("RESULT"), "Triton's own print of the failure"


def test_a_machine_that_ptxas_does_not_know_is_unavailable(built: dict[str, Any]) -> None:
    if "no_such" in built:
        assert built["no_such"][0] == "TargetUnavailable"
        assert "ptxas does not know it" in built["no_such"][1]


def test_compiled_kernels_lie_in_the_cache_of_slim(built: dict[str, Any]) -> None:
    kind = built["add"]["kind"]
    assert list((build.cache_folder() / "triton" / "compiled").glob(f"*/add.{kind}"))


# -- without a compiler ------------------------------------------------------------------------------------------------

S, T = sympy.symbols("S T", integer=True, positive=True)
X = sympy.Symbol("X")


@pytest.mark.parametrize(
    "size", [0, 16, 4096, 16 * S, 4096 * S * T, 32 * S + 48, 16 * (S + 1), (4 * S) ** 2, 16 * sympy.floor(S / 2)]
)
def test_a_multiple_of_16_whatever_the_symbols_is_seen(size: Any) -> None:
    assert ahead._divisible(size)


@pytest.mark.parametrize("size", [1, 8, S, 8 * S, 16 * S + 8, 16 * X, 16 / S, sympy.floor(16 * S / 2), 16 * S / 2])
def test_what_may_be_no_multiple_of_16_is_not_taken_for_one(size: Any) -> None:
    assert not ahead._divisible(size)


@pytest.mark.parametrize("arch", ["toaster", "sm_", "sm_9", "sm90", "gfx9", "sm_90a", ""])
def test_an_unknown_architecture_is_refused(arch: str) -> None:
    with pytest.raises(errors.UnknownTarget, match="gfx942"):
        ahead.compile_for(small.add(), arch)


def test_a_process_that_interprets_cannot_compile() -> None:
    if not interpreter.interpreting():
        pytest.skip("Triton compiles in this process")
    with pytest.raises(errors.TargetUnavailable, match="TRITON_INTERPRET"):
        ahead.compile_for(small.add(), "sm_90")
