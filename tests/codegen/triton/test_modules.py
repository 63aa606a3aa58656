"""A generated module is written once, imported once, and is what was generated whatever its file holds."""

import importlib.util
import logging
import py_compile
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from slim import errors
from slim.codegen.triton import modules
from tests.codegen.triton import small

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def added(module: modules.Module) -> torch.Tensor:
    """What the kernel makes of 0, 1, ..., 999 and tens."""
    x = torch.arange(1000.0, device=DEVICE)
    out = torch.full_like(x, -1.0)
    module.launch([x, torch.full_like(x, 10.0), out], [1000], module.configs[0])
    return out


def test_a_kernel_runs_out_of_its_file(empty_cache: Path) -> None:
    module = modules.load(small.add())
    assert torch.equal(added(module), torch.arange(1000.0, device=DEVICE) + 10)
    assert module.path.parent == empty_cache / "triton"
    assert module.path.read_text() == module.source == small.add().source


def test_a_module_says_what_it_holds(empty_cache: Path) -> None:
    kernel = small.add(scratch="2 * n", counters="n // BLOCK")
    module = modules.load(kernel)
    assert list(module.configs) == kernel.configs
    assert module.plan([1000], module.configs[0]) == ((4,), 2000, 3)
    assert module.function.__name__ == "add"


def test_the_same_text_is_one_module(empty_cache: Path) -> None:
    assert modules.load(small.add()) is modules.load(small.add())
    assert len(list((empty_cache / "triton").glob("*.py"))) == 1


def test_another_text_is_another_module(empty_cache: Path) -> None:
    other = small.add(body=["tl.store(out, 1.0)"])
    assert modules.load(other).path != modules.load(small.add()).path
    assert added(modules.load(other))[0] == 1.0
    assert added(modules.load(small.add()))[0] == 10.0


def test_a_changed_file_is_never_run(empty_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = modules.load(small.add()).path
    path.write_text("raise AssertionError('run')")
    modules._imported.cache_clear()  # as another process
    with caplog.at_level(logging.WARNING):
        module = modules.load(small.add())
    assert path.read_text() == module.source
    assert "not what slim wrote" in caplog.text
    assert added(module)[1] == 11


def test_a_compiled_file_beside_it_is_never_run(empty_cache: Path, tmp_path: Path) -> None:
    path = modules.load(small.add()).path
    evil = tmp_path / path.name
    evil.write_text("raise AssertionError('run')")
    py_compile.compile(
        str(evil),
        importlib.util.cache_from_source(str(path)),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    modules._imported.cache_clear()
    assert added(modules.load(small.add()))[1] == 11


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIM_CACHE", str(tmp_path / "file"))
    with pytest.raises(errors.SaveFailed, match="file"):
        modules.load(small.add())


def test_two_processes_load_the_same_kernel_at_once(empty_cache: Path) -> None:
    script = textwrap.dedent("""
        from slim.codegen.triton import modules
        from tests.codegen.triton import small
        print(modules.load(small.add()).plan([1000], {"BLOCK": 256}))
    """)
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in running] == ["((4,), 0, 0)"] * 2
    assert [path.read_text() for path in (empty_cache / "triton").glob("*.py")] == [small.add().source]


# -- where Triton compiles ---------------------------------------------------------------------------------------------


def test_triton_compiles_into_the_cache_of_slim(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    before = knobs.cache.dir
    with modules.compiling():
        assert knobs.cache.dir == str(empty_cache / "triton" / "compiled")
    assert knobs.cache.dir == before


def test_a_place_that_the_user_names_is_kept(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    with modules.compiling():
        assert knobs.cache.dir == "/somewhere"
    assert knobs.cache.dir == "/somewhere"
