"""A build is made once, by one process, from what it is named after; and what cannot be built says why."""

import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from slim import errors
from slim.codegen import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason=f"{build.missing()}")

HEADER = "int kernel(int x);\n"
KERNEL = '#include "kernels.h"\nint kernel(int x) { return 2 * x; }\n'
EXPORT = 'extern "C" __attribute__((visibility("default")))'
SOURCE = f'#include "kernels.h"\n{EXPORT} int entry(int x) {{ return kernel(x) + 1; }}\n'
THREADS = f"""
{EXPORT} int entry() {{
    int count = 0;
#pragma omp parallel num_threads(3) reduction(+ : count)
    count += 1;
    return count;
}}
"""


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A kernels folder of the test's own."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "kernels.h").write_text(HEADER)
    (folder / "kernel.cpp").write_text(KERNEL)
    return folder


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one line for each file that was compiled: CXX writes it, and calls the real compiler."""
    log, script = tmp_path / "compiled.txt", tmp_path / "counting-c++"
    log.touch()
    command = " ".join(build.compiler() or ())
    each = f'for a in "$@"; do case "$a" in *.cpp) echo "${{a##*/}}" >> {log};; esac; done'
    script.write_text(f'#!/bin/sh\n{each}\nexec {command} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log


def run(path: Path, *args: int) -> int:
    return int(build.load(path).entry(*args))


# -- building and finding again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", [isa.name for isa in build.ISAS.values() if isa.needs <= build._features()])
def test_generated_code_calls_the_kernels(isa: str, kernels: Path, empty_cache: Path) -> None:
    path = build.shared_object(SOURCE, build.ISAS[isa], kernels)
    assert run(path, 20) == 41
    assert path.is_relative_to(empty_cache)
    assert path.with_suffix(".cpp").read_text() == SOURCE


def test_what_is_there_is_not_built_again(kernels: Path, compiled: Path, empty_cache: Path) -> None:
    isa = build.host_isa()
    first = build.shared_object(SOURCE, isa, kernels)
    assert len(compiled.read_text().splitlines()) == 2
    assert build.shared_object(SOURCE, isa, kernels) == first
    assert len(compiled.read_text().splitlines()) == 2
    build.shared_object(SOURCE.replace("+ 1", "+ 2"), isa, kernels)
    assert compiled.read_text().count("kernel.cpp") == 1


@pytest.mark.parametrize(("file", "text"), [("kernels.h", HEADER + "// more\n"), ("kernel.cpp", KERNEL + "// more\n")])
def test_another_kernel_or_header_is_another_build(file: str, text: str, kernels: Path, empty_cache: Path) -> None:
    first = build.shared_object(SOURCE, build.host_isa(), kernels)
    (kernels / file).write_text(text)
    assert build.shared_object(SOURCE, build.host_isa(), kernels) != first


@pytest.mark.slow
def test_processes_that_want_one_build_at_once_make_it_once(kernels: Path, compiled: Path, empty_cache: Path) -> None:
    program = textwrap.dedent(f"""
        from pathlib import Path
        from slim.codegen import build
        path = build.shared_object({SOURCE!r}, build.host_isa(), Path({str(kernels)!r}))
        print(build.load(path).entry(20))
    """)
    command = [sys.executable, "-c", program]
    # the order of a set differs from process to process: the name of a build must not
    environments = [{**os.environ, "PYTHONHASHSEED": str(seed)} for seed in range(4)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for env in environments]
    assert [process.communicate()[0] for process in running] == ["41\n"] * 4
    assert len(compiled.read_text().splitlines()) == 2


def test_a_build_that_died_half_way_leaves_nothing_that_is_loaded(kernels: Path, empty_cache: Path) -> None:
    path = build.shared_object(SOURCE, build.host_isa(), kernels)
    path.unlink()
    half = path.parent / ".making-dead"
    half.mkdir()
    (half / path.name).write_bytes(b"\x7fELF")
    assert run(build.shared_object(SOURCE, build.host_isa(), kernels), 1) == 3


def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIM_CACHE", str(tmp_path))
    assert build.cache_folder() == tmp_path
    monkeypatch.delenv("SLIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "slim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder() == Path.home() / ".cache" / "slim"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_threads_are_those_of_torchs_own_openmp(kernels: Path, empty_cache: Path) -> None:
    program = textwrap.dedent(f"""
        from pathlib import Path
        from slim.codegen import build
        def loaded():
            return {{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}}
        path = build.shared_object({THREADS!r}, build.host_isa(), Path({str(kernels)!r}))
        torchs = loaded()
        print(build.load(path).entry(), len(torchs), loaded() == torchs)
    """)
    if not build._openmp("clang" in build._Toolchain.found().version)[1][0].startswith("/"):
        pytest.skip("torch brings no OpenMP that this compiler can use")
    assert subprocess.check_output([sys.executable, "-c", program], text=True).split() == ["3", "1", "True"]


def test_another_openmp_than_torchs_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="slim"):
        flags = build._openmp.__wrapped__(clang=True)
    if sys.platform == "linux":
        assert flags == (("-fopenmp",), ("-fopenmp",))
        assert "the compiler's own OpenMP" in caplog.text


# -- what cannot be built ----------------------------------------------------------------------------------------------


def test_a_compile_error_says_what_how_and_where(kernels: Path, empty_cache: Path) -> None:
    with pytest.raises(errors.BuildFailed) as caught:
        build.shared_object("int entry() { return oops; }", build.host_isa(), kernels)
    error = caught.value
    assert "oops" in error.output
    assert Path(error.source).read_text() == "int entry() { return oops; }"
    assert str(error.source) in error.command
    assert list((empty_cache / "cpp").glob("*.so")) == []


def test_a_long_error_is_cut_and_says_so(kernels: Path, empty_cache: Path) -> None:
    source = "\n".join(f"int f{i}() {{ return oops{i}; }}" for i in range(50))
    with pytest.raises(errors.BuildFailed, match=r"\.\.\. \d+ more lines"):
        build.shared_object(source, build.host_isa(), kernels)


def test_a_kernel_that_is_not_there_is_said_when_building(kernels: Path, empty_cache: Path) -> None:
    source = f"int nowhere(int);\n{EXPORT} int entry() {{ return nowhere(1); }}"
    with pytest.raises(errors.BuildFailed, match=r"linking [^\n]*cpp failed(.|\n)*nowhere"):
        build.shared_object(source, build.host_isa(), kernels)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIM_CACHE", str(tmp_path / "file"))
    with pytest.raises(errors.SaveFailed, match="file"):
        build.shared_object(SOURCE, build.host_isa(), kernels)


def test_without_a_compiler_it_is_said_what_is_missing(
    kernels: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.missing() is None
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert build.compiler() is None
    assert "g++, clang++ or c++" in str(build.missing())
    with pytest.raises(errors.TargetUnavailable, match="no C\\+\\+ compiler"):
        build.shared_object(SOURCE, build.host_isa(), kernels)


def test_a_compiler_named_in_vain_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    assert build.compiler() is None
    assert "'no-such-compiler -v'" in str(build.missing())


def test_a_compiler_may_be_named_with_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "sh -c 'two words'")
    found = build.compiler()
    assert found is not None
    assert found[1:] == ("-c", "two words")


# -- instruction sets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ("sse2", "scalar"),
        ("sse2 avx2 fma f16c", "avx2"),
        ("avx2 fma", "scalar"),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", "avx512"),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni", "avx512_vnni"),
        ("fp asimd", "neon"),
        ("fp asimd asimdhp asimddp", "neon_dotprod"),
    ],
)
def test_the_best_that_the_processor_has(features: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIM_ISA", raising=False)
    monkeypatch.setattr(build, "_features", lambda: frozenset(features.split()))
    assert build.host_isa() is build.ISAS[name]


def test_an_instruction_set_may_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIM_ISA", "scalar")
    assert build.host_isa().name == "scalar"


@pytest.mark.parametrize(
    ("value", "reason"), [("avx3", "known: avx512_vnni, avx512, avx2"), ("neon", "this processor has no asimd")]
)
def test_a_forced_one_that_cannot_be_says_what_can(value: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIM_ISA", value)
    monkeypatch.setattr(build, "_features", lambda: frozenset({"avx2", "fma", "f16c"}))
    with pytest.raises(errors.BadEnvironment, match=f"SLIM_ISA={value} cannot be used: .*{reason}") as caught:
        build.host_isa()
    assert caught.value.accepted == ["avx2", "scalar"]
