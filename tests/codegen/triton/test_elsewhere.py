"""A target that is not here: everything to look at, and a plain word when it is called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import json, sys
import torch
from torch import nn
import slim

model = nn.Sequential(nn.Linear(64, 48), nn.ReLU()).eval()
compiled = slim.compile(model, example_inputs=torch.randn(1, 64), target=sys.argv[1], dump=sys.argv[2])
try:
    compiled(torch.randn(1, 64))
    said = ""
except slim.errors.TargetUnavailable as error:
    said = str(error)
kinds = {name: type(content).__name__ for name, content in compiled.code.items()}
print("RESULT", json.dumps({"code": kinds, "said": said, "report": str(compiled.report)}))
"""


@pytest.mark.parametrize(("arch", "ending"), [("sm_90", "cubin"), ("gfx942", "hsaco")])
def test_sources_and_binaries_are_there_and_a_call_is_refused(arch: str, ending: str, tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-c", SCRIPT, f"cuda:{arch}", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.partition("RESULT ")[2])
    binaries = [name for name, kind in result["code"].items() if kind == "bytes"]
    assert binaries
    for name in binaries:
        assert name.endswith(ending)
        assert (tmp_path / "generated" / name).read_bytes()[:4] == b"\x7fELF"
        source = (tmp_path / "generated" / name).with_suffix(".py").read_text()
        assert "@triton.jit" in source
    assert f"cuda:{arch}" in result["said"]
    assert "slim.load" in result["said"]
    assert "in one piece" in result["report"]
