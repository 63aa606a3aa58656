"""Every kernel of a 1B Llama compiles for GPUs that are not here, and fits their registers; so does every format."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes that a block may have


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
def test_every_kernel_of_a_1b_llama_compiles_without_spills(arch: str):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", "tests.codegen.triton.ahead_models", arch]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("RESULT ")[2])
    kinds = {each["kernel"] for each in found if each["format"] == "bf16"}
    assert {"linear_one_row", "linear_tiles", "attention_decode", "attention_prefill", "choose"} <= kinds
    for format in {each["format"] for each in found} - {"bf16"}:
        kinds = {each["kernel"] for each in found if each["format"] == format}
        assert kinds >= {"linear_one_row", "linear_few_rows", "dequantize_weight"}
    assert [each for each in found if each["spills"]] == []
    assert [each for each in found if each["shared"] > SHARED[arch]] == []
