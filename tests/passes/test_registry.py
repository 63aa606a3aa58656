"""Passes are found by lying in the folder, and their text and their objects say the same."""

import ast
import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import slim.passes
from slim import errors
from slim.compiler.passes_base import Pass, snake_case
from slim.compiler.pipeline_text import read_pipeline, write_pipeline
from slim.compiler.report import Report
from slim.passes import PASSES, FoldNorms, Quantize, as_passes, parse_pipeline


@dataclass(frozen=True)
class Everything(Pass):
    """A pass with an option of every type."""

    ratio: float
    kind: Literal["a", "b"] | None = None
    names: tuple[str, ...] = ()
    count: int = 3
    flag: bool = False
    text: str = ""
    either: int | Literal["auto"] = "auto"

    def run(self, program, context):
        return Report()


def test_type_checkers_are_told_of_every_pass():
    tree = ast.parse(Path(slim.passes.__file__).read_text())
    told = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = {(each.module, each.names[0].asname) for each in told.body if isinstance(each, ast.ImportFrom)}
    assert imported == {(kind.__module__, kind.__name__) for kind in PASSES.values()}


KNOWN = {"everything": Everything, **PASSES}

everything = st.builds(
    Everything,
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    kind=st.sampled_from(["a", "b", None]),
    names=st.lists(st.text(), max_size=3).map(tuple),
    count=st.integers(),
    flag=st.booleans(),
    text=st.text(),
    either=st.one_of(st.integers(), st.just("auto")),
)


@given(st.lists(everything, max_size=4))
def test_text_written_from_passes_reads_back_as_equal_passes(passes):
    assert read_pipeline(write_pipeline(passes), KNOWN) == tuple(passes)


@given(everything)
def test_the_repr_of_a_pass_is_its_text_and_equal_passes_hash_alike(made):
    (again,) = read_pipeline(repr(made), KNOWN)
    assert again == made
    assert hash(again) == hash(made)


@given(st.text())
def test_any_text_is_read_or_refused_with_an_error_of_the_catalogue(text):
    with contextlib.suppress(errors.SlimError):
        assert all(isinstance(one, Pass) for one in read_pipeline(text, KNOWN))


def test_every_pass_in_the_folder_is_found_and_exported():
    assert {"fold_norms": FoldNorms, "quantize": Quantize}.items() <= PASSES.items()
    assert set(slim.passes.__all__) >= {kind.__name__ for kind in PASSES.values()}


def test_every_pass_explains_itself():
    for kind in PASSES.values():
        assert len((kind.__doc__ or "").splitlines()) > 3
        assert re.search(r"Sources?: ", kind.__doc__ or "")


@pytest.mark.parametrize(
    ("name", "text"),
    [("FoldNorms", "fold_norms"), ("GQA", "gqa"), ("QuantizeKV", "quantize_kv"), ("LowRank", "low_rank")],
)
def test_names_in_text_are_snake_case(name, text):
    assert snake_case(name) == text


def test_a_repr_holds_the_first_option_and_those_not_at_their_default():
    assert repr(Quantize()) == 'quantize("int8")'
    assert repr(Quantize("int4", group_size=64)) == 'quantize("int4", group_size=64)'
    assert repr(Quantize(head=False, exclude=["a*"])) == 'quantize("int8", head=False, exclude=["a*"])'
    assert repr(FoldNorms()) == "fold_norms()"


def test_pipelines_are_written_in_many_ways():
    both = (FoldNorms(), Quantize())
    assert parse_pipeline('fold_norms, quantize("int8")') == both
    assert parse_pipeline('fold_norms(),\nquantize("int8"),  # the end\n') == both
    assert parse_pipeline('quantize("int4", group_size=64)') == (Quantize("int4", group_size=64),)
    assert as_passes(["fold_norms", Quantize()]) == both
    assert as_passes(Quantize()) == (Quantize(),)
    assert as_passes("") == as_passes(()) == ()


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("quantise", errors.UnknownPass, "Did you mean 'quantize'?"),
        ("Quantize()", errors.UnknownPass, "Did you mean 'quantize'?"),
        ('quantize("int9")', errors.BadPassOption, "Did you mean 'int8'?"),
        ('quantize("int8", symmetric=False)', errors.BadPassOption, "int8 has no zero point"),
        ("quantize(group_size=0)", errors.BadPassOption, "a group of 0 holds no number"),
        ('quantize("int4", group_size=2.5)', errors.BadPassOption, "group_size"),
        ('quantize(method="gtpq")', errors.BadPassOption, "Did you mean 'gptq'?"),
        ("quantize(haed=False)", errors.BadPassOption, "Did you mean 'head'?"),
        ("quantize(head=1)", errors.BadPassOption, "1 is not True or False"),
        ("quantize(head=True, head=False)", errors.ContradictoryOptions, "head=True and head=False"),
        ('quantize("int8", weights="int8")', errors.ContradictoryOptions, "given twice"),
        ("gqa(True)", errors.BadPassOption, 'True is not a finite number, a list of integers or "auto".'),
        ('gqa("foo")', errors.BadPassOption, '"foo" is not a finite number, a list of integers or "auto".'),
        ("fold_norms(1)", errors.BadPassOption, "it has 0 options"),
        ("everything()", errors.BadPassOption, "must be given"),
        ("everything(ratio=1e999)", errors.BadPassOption, "finite"),
        ("everything(0.5, names=[1])", errors.BadPassOption, "1 is not a string"),
        ("fold_norms quantize", errors.BadPipelineText, "at character"),
        ("quantize(", errors.BadPipelineText, "at character"),
        ("quantize), (quantize", errors.BadPipelineText, "at character"),
        ("quantize(*[1])", errors.BadPipelineText, "at character 9"),
        ("quantize(**{})", errors.BadPipelineText, "**"),
        ("x=quantize()", errors.BadPipelineText, "expected a pass"),
        ("3", errors.BadPipelineText, "expected a pass"),
        ("os.system()", errors.BadPipelineText, "expected a pass"),
        ('quantize(exclude=[open("x")])', errors.BadPipelineText, 'open("x")'),
    ],
)
def test_a_text_that_means_nothing_is_refused_with_the_reason(text, error, says):
    with pytest.raises(error) as raised:
        read_pipeline(text, KNOWN)
    assert says in str(raised.value)


def test_an_unreadable_text_is_pointed_at_in_its_own_line():
    with pytest.raises(errors.BadPipelineText) as raised:
        parse_pipeline("fold_norms,\n  quantize(weights=x)")
    shown = str(raised.value).splitlines()
    assert shown[1] == "      quantize(weights=x)"
    assert shown[2].index("^") == shown[1].index("x)")


def test_options_given_as_objects_are_checked_too():
    with pytest.raises(errors.BadPassOption, match="int9"):
        Quantize("int9")
    assert Quantize(exclude=["a"]).exclude == ("a",)
    assert Everything(1).ratio == 1.0


@pytest.mark.parametrize("wrong", [Quantize, 3, [3], None])
def test_what_is_no_pass_is_refused(wrong):
    with pytest.raises(errors.BadInput, match="passes"):
        as_passes(wrong)


def test_no_file_of_the_folder_evaluates_text():
    import pathlib

    files = [*pathlib.Path(slim.passes.__path__[0]).glob("*.py"), pathlib.Path(read_pipeline.__code__.co_filename)]
    for file in files:
        names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        assert not names & {"eval", "exec", "compile"}
