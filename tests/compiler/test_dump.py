"""What slim leaves for people: artifacts in torch's structured trace, and reproducers that run."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slim
from slim import errors
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.report import PipelineReport
from tests.programs import lifted, model, program

ROOT = Path(__file__).resolve().parents[2]
TRACED = """
import torch
import slim
from slim.compiler.dump import Dump
slim.compile(torch.nn.Linear(8, 6), 'quantize("int8")', example_inputs=torch.randn(2, 8), target="eager")
Dump(None).code({"whole/a.cubin": b"binary"})
"""


def test_every_stage_all_code_and_the_report_are_artifacts_of_torchs_trace(tmp_path):
    environment = os.environ | {"TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", TRACED], env=environment, check=True, cwd=ROOT)
    (file,) = tmp_path.glob("*.log")
    text = file.read_text()
    names = ("slim_00_lift.py", "slim_01_quantize.py", "slim_generated_whole_forward.py", "slim_report.json")
    for name in names:
        assert f'"artifact": {{"name": "{name}", "encoding": "string"}}' in text
    assert "slim.dequantize.default(" in text
    assert text.count('"text": "quantize') == 2, "the report, after the passes and again with what was generated"
    assert '"whole": {' in text
    assert "cubin" not in text


# -- folders -----------------------------------------------------------------------------------------------------------


def files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_each_compilation_has_a_folder_of_its_own_with_the_code_of_every_form(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIM_DUMP", str(tmp_path))
    first = slim.compile(model("llama"), "fold_norms", target="eager")
    slim.compile(model("llama"), target="eager")
    last = "generated/step_last/forward.py"
    assert files(tmp_path) == sorted(
        ["00_lift.py", "01_fold_norms.py", "report.json", last, "2/00_lift.py", "2/report.json", f"2/{last}"]
    )
    assert "step_last" in PipelineReport.from_json((tmp_path / "report.json").read_text()).forms
    first(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert (tmp_path / "generated/whole/forward.py").read_text() == first.code["whole/forward.py"]
    assert not (tmp_path / "2/generated/whole").exists()


def test_graphs_of_torch_compile_are_dumped_with_their_code(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIM_DUMP", str(tmp_path))
    fast = torch.compile(torch.nn.Linear(8, 6), backend="slim", options={"target": "eager"})
    with torch.no_grad():
        fast(torch.randn(2, 8))
    assert files(tmp_path) == ["00_lift.py", "generated/whole/forward.py", "report.json"]


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
