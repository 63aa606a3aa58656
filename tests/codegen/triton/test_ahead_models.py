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
SPARSE = ("ring", "best blocks", "bigbird")
CHOICES = {"choose_blocks_of_one", "note_bounds", "choose_blocks", "vote", "weigh_keys"}
MODEL = {"linear_one_row", "linear_few_rows", "linear_tiles", "attention_decode", "attention_prefill", "choose"}
FORMATS = {"int8", "int4", "int3", "nf4", "fp8", "int4-int4", "int3-int8", "int8 of int8", "int4 of int8", "pairs"}


@pytest.mark.slow
def test_every_kernel_of_a_1b_llama_compiles_without_spills():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", "tests.codegen.triton.ahead_models", *SHARED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("RESULT ")[2])
    for arch in SHARED:
        kernels = {(each["format"], each["kernel"]) for each in found if each["arch"] == arch}
        assert kernels >= {("bf16", kind) for kind in MODEL}
        assert kernels >= {(format, kind) for format in FORMATS for kind in ("linear_one_row", "linear_few_rows")}
        assert {kind for _, kind in kernels} >= {"dequantize_weight", "round_rows", *CHOICES}
        assert kernels >= {(name, f"attention_{kind}") for name in SPARSE for kind in ("decode", "prefill")}
    assert [each for each in found if each["spills"]] == []
    assert [each for each in found if each["shared"] > SHARED[each["arch"]]] == []
