"""The README tells the truth: its Python example runs, and its commands are ones that slim has."""

import re
import shlex
from pathlib import Path

import click
import pytest

from slim.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    slim (.+)$", README, re.MULTILINE)


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
    assert {shlex.split(command)[0] for command in COMMANDS} == set(main.commands)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_has_these_options(command: str) -> None:
    name, *arguments = shlex.split(command)
    context = main.commands[name].make_context(name, arguments, parent=click.Context(main))
    for value in map(str, context.params.values()):
        assert not value.startswith("examples/") or (ROOT / value).exists()
