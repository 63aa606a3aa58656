"""What slim leaves for people: artifacts in torch's structured trace, and reproducers that run."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slim import errors
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from tests.programs import lifted, program

ROOT = Path(__file__).resolve().parents[2]
TRACED = """
import torch
from slim.compiler.dump import Dump
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.passes import Quantize
from tests.programs import program
start = program("y = aten.linear.default(x, weights['w'])\\nreturn (y,)", {"w": torch.randn(6, 8)})
run_pipeline(start, [Quantize("int8")], Context())
Dump(None).code({"whole/program.cpp": "int main;", "whole/a.cubin": b"binary"})
"""


def test_every_stage_and_all_code_are_artifacts_of_torchs_trace(tmp_path):
    environment = os.environ | {"TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", TRACED], env=environment, check=True, cwd=ROOT)
    (file,) = tmp_path.glob("*.log")
    text = file.read_text()
    for name in ("slim_00_lift.py", "slim_01_quantize.py", "slim_generated_whole_program.cpp"):
        assert f'"artifact": {{"name": "{name}", "encoding": "string"}}' in text
    assert "slim.dequantize.default(" in text
    assert "int main;" in text
    assert "cubin" not in text


# -- reproducers -------------------------------------------------------------------------------------------------------

FAULTY = """
from dataclasses import dataclass
import torch
from slim.compiler.passes_base import Pass
from slim.compiler.report import Report

@dataclass(frozen=True)
class Faulty(Pass):
    largest: float
    name_of: str = "it's"

    def run(self, program, ctx):
        for name in program.weights:
            if program.weights[name].float().abs().max() > self.largest:
                raise ValueError(f"{name} is too large\\nfor this pass")
        return Report(matched=["all"])
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    (tmp_path / "faulty_passes.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    import faulty_passes

    yield faulty_passes.Faulty
    del sys.modules["faulty_passes"]


def reproducer(start, pass_, tmp_path, calibration=None):
    with pytest.raises(errors.PassFailed) as raised:
        run_pipeline(start, [pass_], Context(dump=tmp_path, calibration=calibration))
    return raised.value.reproducer


def exit_of(file):
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(file, run_name="__main__")
    return ended.value.code


def test_a_reproducer_is_one_file_that_fails_again(faulty, tmp_path, capsys):
    file = reproducer(lifted("llama"), faulty(0.0), tmp_path, calibration=[torch.zeros(1, 4, dtype=torch.long)])
    assert Path(file).is_file()
    assert exit_of(file) == 1
    assert "it fails again: ValueError: " in capsys.readouterr().out


def test_it_says_so_where_the_fault_hangs_on_the_numbers(faulty, tmp_path, capsys):
    start = program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": torch.full((6, 8), 1e6)})
    assert exit_of(reproducer(start, faulty(1e3), tmp_path)) == 0
    assert "it does not fail: the ValueError hangs on the numbers" in capsys.readouterr().out


def test_it_holds_indices_and_buffers_as_they_are_and_no_parameter(faulty, tmp_path):
    lines = (
        "y = aten.index_select.default(x, 2, weights['order'])\nz = aten.linear.default(y, weights['w'])\nreturn (z,)"
    )
    weights = {"order": torch.tensor([3, 1]), "w": torch.full((2, 2), 0.4375)}
    file = reproducer(program(lines, weights), faulty(0.0), tmp_path)
    assert "[3, 1]" in Path(file).read_text()
    assert "0.4375" not in Path(file).read_text()
    assert exit_of(file) == 1


def test_names_with_quotes_and_backslashes_do_not_break_it(faulty, tmp_path):
    name = "a'''b\\c\"\"\"d"
    start = program(f"y = aten.add.Tensor(x, weights[{name!r}])\nreturn (y,)", {name: torch.ones(8)})
    assert exit_of(reproducer(start, faulty(0.0, name_of='"""\\'), tmp_path)) == 1


def test_it_runs_in_a_process_of_its_own(faulty, tmp_path):
    start = program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": torch.randn(6, 8)})
    file = reproducer(start, faulty(0.0), tmp_path)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    ended = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "it fails again" in ended.stdout
