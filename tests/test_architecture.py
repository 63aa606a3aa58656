"""The house rules of the design: imports run downhill, and a file holds one subject."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "slim").rglob("*.py"))

# What each room stands on directly; what those stand on is allowed too.
BELOW = {
    "__main__": {"cli"},
    "cli": {"inspection", "api", "backend"},
    "inspection": {"api", "backend"},
    "api": {"runtime", "passes"},
    "backend": {"runtime", "passes"},
    "runtime": {"codegen"},
    "codegen": {"compiler"},
    "passes": {"compiler"},
    "compiler": set(),
    "errors": set(),
}
ROOMS = set(BELOW)


def reachable(room: str) -> set[str]:
    """Every room that `room` may import: itself, all rooms downhill, and the errors."""
    return {room, "errors"}.union(*(reachable(below) for below in BELOW[room]))


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also those inside functions. `package` resolves the relative ones."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*parents, node.module]))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def uphill(source: str, file: str) -> list[str]:
    """Each import in the text of `file` (a path such as slim/passes/gqa.py) that breaks the rule."""
    parts = Path(file).with_suffix("").parts
    room = parts[1]
    if room == "__init__":  # the face hands on names of every room
        return []
    if room not in ROOMS:
        return [f"{file}: '{room}' is no room of the design"]
    found = []
    for line, module in imported(source, ".".join(parts[:-1])):
        top, target = [*module.split("."), ""][:2]
        if top == "slim" and target not in reachable(room):
            found.append(f"{file}:{line}: {room} imports {module}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downhill(file: Path) -> None:
    assert uphill(file.read_text(), str(file.relative_to(ROOT))) == []


def test_the_rooms_of_passes_do_not_know_each_other() -> None:
    found = []
    for file in FILES:
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[:2] == ("slim", "passes") and len(parts) > 3:
            for line, module in imported(file.read_text(), ".".join(parts[:-1])):
                if module.startswith("slim.passes.") and module.split(".")[2] != parts[2]:
                    found.append(f"{file}:{line}: {module}")
    assert found == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_holds_one_subject(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 450, "split it: one subject a file"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("slim/compiler/lift.py", "from slim.passes import GQA"),
        ("slim/compiler/lift.py", "def f():\n    import slim.runtime.cache"),  # lazy imports count
        ("slim/compiler/rules/norms.py", "from ...codegen import build"),
        ("slim/passes/gqa.py", "from ..codegen import regions"),
        ("slim/passes/gqa.py", "from slim import codegen"),
        ("slim/codegen/build.py", "from slim.passes.base import Pass"),
        ("slim/runtime/model.py", "from slim.api import compile"),
        ("slim/api.py", "from . import cli"),
        ("slim/api.py", "from slim.inspection import report"),
        ("slim/runtime/model.py", "import slim"),  # the face stands above every room
        ("slim/errors.py", "from slim.compiler import program"),
        ("slim/utils/misc.py", "import os"),  # a room that the design does not know
    ],
)
def test_an_uphill_import_is_found(file: str, source: str) -> None:
    assert len(uphill(source, file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("slim/__init__.py", "from slim.api import compile\nfrom slim import passes"),
        ("slim/cli.py", "from slim.inspection import html\nfrom slim.passes import GQA\nimport torch"),
        ("slim/api.py", "from .compiler import lift\nfrom .errors import BadInput"),
        ("slim/passes/gqa.py", "from ..compiler.program import Program\nfrom . import base"),
        ("slim/passes/__init__.py", "from .gqa import GQA"),
        ("slim/runtime/model.py", "from slim import codegen, errors\nimport slimmer"),
    ],
)
def test_a_downhill_import_is_allowed(file: str, source: str) -> None:
    assert uphill(source, file) == []
