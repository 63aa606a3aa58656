"""The catalogue keeps its promise: each error says what, where, and what to do about it."""

import ast
import dataclasses
import pickle
import pydoc
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from slim import errors
from slim.errors import SlimError

CATALOGUE = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, SlimError) and cls is not SlimError
]

# A telling value for each type a field may have. Any other field is shown as text, and gets its own name.
SAMPLES = {int: 12345, float: 0.125, Collection[str]: ["one", "two"]}


def facts(cls: type[SlimError]) -> dict[str, Any]:
    """A value for every field of the error but the one all have."""
    return {
        field.name: SAMPLES.get(field.type, f"the {field.name}")
        for field in dataclasses.fields(cls)
        if field.name != "where"
    }


@pytest.fixture(params=CATALOGUE, ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> type[SlimError]:
    return request.param


def test_it_has_a_docstring_of_its_own(cls):
    assert "__doc__" in vars(cls)
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "the signature that dataclass writes is no docstring"


def test_its_text_shows_every_fact_it_was_given(cls):
    given = facts(cls)
    text = str(cls(**given))
    for value in given.values():
        assert all(str(part) in text for part in (value if isinstance(value, list) else [value]))
    assert "{" not in text


def test_it_ends_with_a_hint_and_shows_no_place_unless_given(cls):
    lines = str(cls(**facts(cls))).splitlines()
    assert lines[-1].startswith("  hint: ")
    assert len(lines[-1]) > len("  hint: ") + 10
    assert not any(line.startswith("  at: ") for line in lines)


def test_it_says_where_before_the_hint(cls):
    lines = str(cls(**facts(cls), where="node mul_3 (modeling_llama.py:120)")).splitlines()
    assert lines[-2] == "  at: node mul_3 (modeling_llama.py:120)"


def test_an_unknown_fact_is_refused(cls):
    with pytest.raises(TypeError, match="colour"):
        cls(**facts(cls), colour="red")


def test_a_missing_fact_is_refused(cls):
    given = facts(cls)
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    for name in required:
        with pytest.raises(TypeError, match=name):
            cls(**{key: value for key, value in given.items() if key != name})


def test_it_survives_pickling_with_facts_and_notes(cls):
    error = cls(**facts(cls), where="node mul_3")
    error.add_note("seen twice")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error)
    assert vars(again) == vars(error)


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.ModelNotFound, FileNotFoundError),
        (errors.SaveFailed, OSError),
        (errors.BadInput, ValueError),
        (errors.UnknownPass, ValueError),
        (errors.PromptTooLong, ValueError),
        (errors.TokenOutOfRange, IndexError),
        (errors.TargetUnavailable, RuntimeError),
        (errors.NotGenerative, TypeError),
    ],
)
def test_a_user_may_catch_the_builtin_they_expect(cls, builtin):
    with pytest.raises(builtin):
        raise cls(**facts(cls))


def test_a_misspelt_pass_gets_the_nearest_name_whatever_its_case():
    error = errors.UnknownPass(name="quantise", known=["Prune", "GQA", "Quantize"])
    assert "Did you mean 'Quantize'?" in str(error)
    assert "Prune, GQA, Quantize" in str(error)


def test_a_name_like_no_other_gets_no_guess():
    assert "Did you mean" not in str(errors.UnknownTarget(target="toaster", known=["cpu", "cuda"]))


def test_a_bad_option_names_what_would_have_been_accepted():
    error = errors.BadPassOption(pass_name="quantize", option="int9", reason="no such format", known=["int8", "int4"])
    assert "Did you mean 'int8'?" in str(error)
    assert "Accepted here: int8, int4." in str(error)


def test_a_pipeline_error_points_at_the_character_in_its_own_line():
    text = "prune(0.2),\ngqa(kv_heads=)"
    error = errors.BadPipelineText(text=text, position=text.index(")", 15), reason="a value is missing")
    shown = str(error).splitlines()
    assert shown[1] == "    gqa(kv_heads=)"
    assert shown[2] == "    " + " " * 13 + "^"


def test_braces_in_a_fact_are_shown_as_they_are():
    assert "{oops}" in str(errors.BadInput(argument="model", reason="{oops}"))


def test_a_bad_input_names_the_help_of_what_was_called_or_of_nothing_in_particular():
    known = errors.BadInput(argument="x", reason="it is bad", of="slim.Sampling")
    assert str(known).endswith("hint: help(slim.Sampling) says what it takes.")
    assert "hint: help() of what was called, or --help of the command, says" in str(
        errors.BadInput(argument="x", reason="it is bad")
    )


def test_what_a_bad_input_names_can_be_asked_for_help():
    calls = {
        word.value.value
        for file in Path(errors.__file__).parents[1].rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "errors.BadInput"
        for word in node.keywords
        if word.arg == "of"
    }
    assert {"slim.CompiledModel.generate", "slim.backend.Options"} <= calls
    assert [name for name in calls if not pydoc.getdoc(pydoc.locate(name))] == []


def test_each_near_miss_has_a_line_of_its_own():
    error = errors.PassMatchedNothing(pass_name="gqa", tried=2, reasons=["already shared", "one head"])
    assert str(error).splitlines()[1:3] == ["    - already shared", "    - one head"]
