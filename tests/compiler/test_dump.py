"""What slim leaves for people: artifacts in torch's structured trace, and reproducers that run."""

import importlib
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import slim
from slim import errors
from slim.compiler.origin import Origin, needed, origin_of
from slim.compiler.passes_base import Context, Pass
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


def test_a_pipeline_that_fails_leaves_the_report_of_what_was_done(tmp_path):
    with pytest.raises(errors.PassMatchedNothing):
        slim.compile(model("llama"), 'fold_norms, prune(0.2, "magnitude", units="experts")', dump=tmp_path)
    assert [report.text for report in PipelineReport.from_json((tmp_path / "report.json").read_text()).passes] == [
        "fold_norms()"
    ]


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


def linear():
    return program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": torch.randn(6, 8)})


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    (tmp_path / "faulty_passes.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    import faulty_passes

    yield faulty_passes.Faulty
    sys.modules.pop("faulty_passes", None)


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


# -- the pass goes along -----------------------------------------------------------------------------------------------

SCRIPT = """
from __future__ import annotations
import re
from dataclasses import dataclass
import torch
from slim import errors
from slim.compiler.passes_base import Context, Pass
from slim.compiler.pipeline import run_pipeline
from slim.compiler.report import Report
from tests.programs import program

LIMIT = 0.0
TABLE = {}
TABLE["why"] = "too large"

def check(value: torch.Tensor):
    if value.abs().max() > LIMIT:
        raise ValueError(TABLE["why"])

class Base(Pass):
    def run(self, program, ctx):
        for name in program.weights:
            self.judge(program.weights[name])
        return Report(matched=["all"])

@dataclass(frozen=True)
class Mine(Base):
    judge = staticmethod(check)

start = program("y = aten.linear.default(x, weights['w'])\\nreturn (y,)", {"w": torch.randn(6, 8)})
FILE = None
try:
    run_pipeline(start, [Mine()], Context())
except errors.PassFailed as error:
    FILE = error.reproducer
    assert "cannot run" not in str(error)
"""


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIM_CACHE", str(tmp_path / "cache"))


def run_alone(file, folder):
    """The reproducer in a process of its own, in an empty folder."""
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, file]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def test_a_reproducer_carries_what_its_pass_needs_of_the_script_it_is_defined_in(tmp_path, empty_cache):
    script = tmp_path / "experiment.py"
    script.write_text(SCRIPT)
    file = runpy.run_path(str(script), run_name="__main__")["FILE"]
    script.unlink()
    text = Path(file).read_text()
    assert "run_pipeline" not in text.partition("OPTIONS")[0], "the script itself would compile again"
    ended = run_alone(file, tmp_path / "empty")
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "it fails again: ValueError: too large" in ended.stdout


def test_a_reproducer_carries_a_module_that_is_not_installed(faulty, tmp_path, monkeypatch):
    file = reproducer(linear(), faulty(0.0), tmp_path)
    (tmp_path / "faulty_passes.py").unlink()
    del sys.modules["faulty_passes"]
    assert exit_of(file) == 1


def test_a_reproducer_says_which_modules_it_needs_and_finds_them_where_they_were(tmp_path, monkeypatch, empty_cache):
    home = tmp_path / "home"
    (home / "my_package").mkdir(parents=True)
    (home / "my_package" / "__init__.py").touch()
    (home / "my_package" / "limits.py").write_text("LIMIT = 0.0\n")
    (home / "my_package" / "passes.py").write_text(FAULTY.replace("import torch", "from .limits import LIMIT"))
    (home / "beside.py").write_text(FAULTY.replace("import torch", "import torch, my_package.limits"))
    monkeypatch.syspath_prepend(str(home))
    files = []
    for name in ("my_package.passes", "beside"):
        files.append(reproducer(linear(), importlib.import_module(name).Faulty(0.0), tmp_path))
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.startswith(("my_package", "beside"))]:
        del sys.modules[name]
    for file in files:
        assert f"imports modules from {home}: it runs where those are" in " ".join(Path(file).read_text().split())
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(home)])
        assert exit_of(file) == 1


def test_a_reproducer_that_cannot_have_its_pass_says_so_at_its_head_and_in_the_error(tmp_path, capsys):
    @dataclass(frozen=True)
    class Inner(Pass):
        def run(self, program, ctx):
            raise ValueError

    with pytest.raises(
        errors.PassFailed, match=r"\(it cannot run as it is: Inner is defined inside a function\)"
    ) as raised:
        run_pipeline(linear(), [Inner()], Context(dump=tmp_path))
    file = raised.value.reproducer
    assert "It cannot run as it is: Inner is defined inside a function." in Path(file).read_text().split('"""')[1]
    assert exit_of(file) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_class_of_an_interactive_session_has_no_source():
    kind = type("Typed", (), {"__module__": "typed_by_hand"})
    assert "defined in typed_by_hand, which has no file" in origin_of(kind).missing
    assert "its source" not in origin_of(Path).missing
    assert origin_of(slim.passes.FoldNorms) == Origin("slim.passes.fold_norms")


def test_only_what_a_class_refers_to_is_taken_from_a_script():
    source = """\
import a, b as c
from d import e
try:
    import fast
except ImportError:
    fast = None
if __name__ == "__main__":
    K = 1
K = 2
model = e.load(K)
K.x = 3
@c.register
class A:
    f: "K" = fast
class B(A): pass
B().run(model)
"""
    kept = needed(source, "B")
    assert kept.splitlines()[0] == "import a, b as c"
    assert "K = 2\nK.x = 3\n@c.register\nclass A:" in kept
    assert "fast = None" in kept
    for left in ("from d", "model", "__main__"):
        assert left not in kept
    with pytest.raises(ValueError, match="does not define C"):
        needed(source, "C")
