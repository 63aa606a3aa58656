"""The README and docs/ tell the truth: Python that can run runs, commands are ones that slim has, passes read."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import click
import pytest

import slim
from slim.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^    (?:[A-Z_]+=\S+ )*slim ((?:[^#\n\\]|\\\n)+)", re.MULTILINE)
COMMANDS = {page.name: COMMAND.findall(page.read_text(encoding="utf-8")) for page in PAGES}
ALL = [command for commands in COMMANDS.values() for command in commands]


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert 'quantize("int8")' in shown
    assert "def main():" in shown
    assert names["again"].num_parameters() == names["compiled"].num_parameters()


def test_there_are_commands() -> None:
    assert {shlex.split(command)[0] for command in COMMANDS["README.md"]} == set(main.commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("command", ALL)
def test_a_command_has_these_options(command: str) -> None:
    name, *arguments = shlex.split(command)
    context = main.commands[name].make_context(name, arguments, parent=click.Context(main))
    for value in map(str, context.params.values()):
        assert not value.startswith("examples/") or (ROOT / value).exists()


def calls(page: Path) -> list[ast.Call]:
    """The calls of slim.compile and slim.KVCacheConfig in a page's lines of Python."""
    lines = re.findall(
        r"^(?:    |>>> )?((?:\w+ = )?slim\.compile\(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    nodes = [node for line in lines for node in ast.walk(ast.parse(line))]
    return [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("slim.")]


CALLS = [pytest.param(call, id=ast.unparse(call)) for page in PAGES for call in calls(page)]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_in_the_documentation_has_arguments_and_passes_that_there_are(call: ast.Call) -> None:
    function = getattr(slim, ast.unparse(call.func).removeprefix("slim."))
    values = {word.arg: ast.unparse(word.value) for word in call.keywords}
    inspect.signature(function).bind(*call.args, **values)
    for node in ast.walk(call):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and hasattr(slim.passes, node.func.id):
            assert eval(ast.unparse(node), vars(slim.passes))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "(" in node.value:
            assert slim.passes.parse_pipeline(node.value)
