"""Charts: data, text and pictures."""

import dataclasses
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slim import errors
from slim.compiler.charts import Chart

numbers = st.floats(min_value=0.0, max_value=1e6, allow_nan=False)

BARS = Chart("What is lost", "layer", "share", {"keys": [0.5, 0.25], "values": [0.0, 1.0]}, ["0", "1"], style=".0%")
LINES = Chart(
    "Spectra", "rank", "energy", {"layer 0": [9.0, 3.0, 1.0, 0.0]}, marks={"layer 0": 2}, kind="lines", log=True
)


def bars(text: str) -> list[int]:
    """How many whole blocks each row has."""
    return [row.count("█") for row in text.splitlines()[1:]]


def test_bars_are_as_long_as_their_numbers():
    assert bars(str(BARS)) == [20, 0, 10, 40]
    assert [row.split()[-1] for row in str(BARS).splitlines()[1:]] == ["50%", "0%", "25%", "100%"]


def test_a_chart_names_what_it_shows():
    head, *rows = str(BARS).splitlines()
    assert head == "What is lost (share by layer)"
    assert all(name in row for name, row in zip(["keys", "values"] * 2, rows, strict=True))


def test_a_line_falls_and_its_mark_stands_before_its_place():
    course = str(LINES).splitlines()[1].split("  ")[1]
    before, after = course.split("|")
    assert (len(before), len(after)) == (2, 2)
    assert sorted(before + after, reverse=True) == list(before + after)
    assert "9 to 0, rank 2 marked" in str(LINES)


@given(st.lists(numbers, min_size=1, max_size=300), st.booleans(), st.data())
def test_lines_of_any_length_fit_a_terminal(values, log, data):
    mark = data.draw(st.integers(0, len(values)))
    chart = Chart("t", "x", "y", {"one": values}, marks={"one": mark}, kind="lines", log=log)
    assert max(map(len, str(chart).splitlines())) < 120


@given(st.lists(numbers, min_size=1, max_size=20))
def test_bars_of_any_numbers_fit_a_terminal(values):
    chart = Chart("t", "x", "y", {"one": values, "two": values}, [str(i) for i in range(len(values))])
    assert max(map(len, str(chart).splitlines())) < 80


@pytest.mark.parametrize("chart", [BARS, LINES], ids=["bars", "lines"])
def test_a_chart_survives_json(chart):
    assert Chart(**json.loads(json.dumps(dataclasses.asdict(chart)))) == chart


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(series={"a": [1.0]}, ticks=["0", "1"]), "1 numbers for 2 ticks"),
        (dict(series={"a": [float("nan")]}, ticks=["0"]), "not finite"),
        (dict(series={}, kind="pie"), "none of bars, lines"),
        (dict(series={}, marks={"b": 1}), "b is no series"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong, said):
    with pytest.raises(errors.BadInput, match=said):
        Chart("t", "x", "y", **wrong)


@pytest.mark.parametrize("chart", [BARS, LINES], ids=["bars", "lines"])
def test_a_chart_is_drawn_into_a_file_of_the_kind_its_name_says(chart, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'charts'")
    chart.save(tmp_path / "chart.svg")
    chart.save(tmp_path / "chart.png")
    drawn = (tmp_path / "chart.svg").read_text()
    assert drawn.lstrip().startswith("<?xml")
    assert chart.title in drawn
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(errors.BadInput, match="ends in none of"):
        chart.save(tmp_path / "chart.doc")


def test_without_matplotlib_saving_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(errors.MissingPackage, match=r"pip install 'slim-compiler\[charts\]'"):
        BARS.save(tmp_path / "chart.svg")
