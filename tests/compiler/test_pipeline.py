"""The pipeline holds every pass to its word, and a pass that fails leaves nothing behind but a reproducer."""

import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from slim import errors
from slim.compiler.charts import Chart
from slim.compiler.passes_base import FLOAT_WEIGHTS, Context, Pass
from slim.compiler.pipeline import check_order, run_pipeline
from slim.compiler.program import Program
from slim.compiler.report import PipelineReport, Report, Size, Skip
from slim.compiler.rules import Count
from slim.compiler.text import parse
from tests.programs import Counted, program


@dataclass(frozen=True)
class Planted(Pass):
    """Does to a program what a test tells it to."""

    what: str = "nothing"
    deed: ClassVar = staticmethod(lambda program, ctx: None)

    def run(self, program: Program, ctx: Context) -> Report:
        return type(self).deed(program, ctx) or Report(matched=["w"])


def planted(deed=lambda program, ctx: None, **facts):
    """A pass of that name and behaviour; ``facts`` are its class attributes."""
    return type("Planted", (Planted,), {"deed": staticmethod(deed), **facts})()


def scale(factor):
    def deed(program, ctx):
        program.weights["w"] = program.weights["w"] * factor

    return deed


def fail(program, ctx):
    program.weights["w"] = program.weights["w"] * 0
    next(program.nodes()).args = ()
    raise RuntimeError("planted\nfault")


def misuse(program, ctx):
    linear = next(program.nodes(torch.ops.aten.linear.default))
    linear.meta["val"] = linear.meta["val"].double()


@pytest.fixture
def start():
    return program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": torch.randn(6, 8)})


def snapshot(of):
    return str(of), {name: of.weights[name].clone() for name in of.weights}, repr(of.facts)


def same(a, b):
    return (
        a[0] == b[0]
        and a[2] == b[2]
        and a[1].keys() == b[1].keys()
        and all(torch.equal(a[1][k], b[1][k]) for k in a[1])
    )


def test_without_passes_the_program_comes_back_as_it_is(start):
    after, report = run_pipeline(start, [], Context())
    assert after is start
    assert str(report) == "no passes"


def test_a_pass_works_on_a_copy_and_its_work_is_measured(start):
    before = snapshot(start)
    after, report = run_pipeline(start, [planted(scale(1.5)), planted(scale(2.0))], Context())
    assert same(before, snapshot(start))
    first, second = report.passes
    assert first.error == pytest.approx(0.5)
    assert second.error == pytest.approx(1.0)  # against the program before it
    assert second.drift == pytest.approx(2.0)  # against the lifted one
    assert torch.equal(after.weights["w"], start.weights["w"] * 1.5 * 2.0)
    assert first.seconds.keys() == {"run", "verify", "probe"}
    assert report.seconds.keys() == {"probe"}


@pytest.mark.parametrize("deed", [fail, misuse], ids=["raises", "breaks the IR"])
def test_a_pass_that_fails_is_rolled_back_and_leaves_a_reproducer(start, deed, empty_cache):
    before = snapshot(start)
    with pytest.raises(errors.PassFailed) as raised:
        run_pipeline(start, [planted(scale(2.0)), planted(deed)], Context())
    assert same(before, snapshot(start))
    assert raised.value.__cause__ is not None
    (file,) = (empty_cache / "reproducers").iterdir()
    assert str(file) in str(raised.value)
    text = file.read_text()
    assert 'planted("nothing"), planted("nothing")' in text
    assert "pass 2 of 2" in text
    assert str(raised.value.__cause__).splitlines()[0] in text
    names = runpy.run_path(str(file))
    parse(names["PROGRAM"], start.weights)


def test_a_reproducer_goes_where_dumps_go(start, tmp_path):
    with pytest.raises(errors.PassFailed):
        run_pipeline(start, [planted(fail)], Context(dump=tmp_path))
    assert len(list((tmp_path / "reproducers").iterdir())) == 1


def test_a_failure_is_told_even_where_no_reproducer_can_be_written(start, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIM_CACHE", str(tmp_path / "file"))
    with pytest.raises(errors.PassFailed, match=r"planted(.|\n)*\(none: "):
        run_pipeline(start, [planted(fail)], Context())


@pytest.mark.parametrize(("factor", "says"), [(1e38, "no longer finite"), (1e39, "it left weight 'w' with")])
def test_weights_and_outputs_that_are_no_longer_finite_are_the_fault_of_the_pass(start, empty_cache, factor, says):
    start.weights["w"] = start.weights["w"].sign() * 3
    with pytest.raises(errors.PassFailed, match=says):
        run_pipeline(start, [planted(scale(factor))], Context())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lossless_pass_that_changes_the_function_is_refused(dtype, empty_cache):
    short = "f32" if dtype == torch.float32 else "bf16"
    lines = "y = aten.linear.default(x, weights['w'])\nreturn (y,)"
    start = program(lines, {"w": torch.randn(6, 8).to(dtype)}, f"x: {short}[B, S, 8]")
    with pytest.raises(errors.NotLossless) as raised:
        run_pipeline(start, [planted(scale(1.2), lossless=True)], Context())
    assert raised.value.error == pytest.approx(0.2, rel=0.05)
    assert Path(raised.value.reproducer).is_file()
    assert str(raised.value.reproducer) in str(raised.value)


def test_a_lossless_pass_may_round(start):
    _, report = run_pipeline(start, [planted(scale(1 + 2e-6), lossless=True)], Context())
    assert 0 < report.passes[0].error < 1e-5


def test_what_rounding_alone_does_to_a_model_is_allowed_and_said():
    lines = """
        big = aten.linear.default(x, weights["a"])
        left = aten.linear.default(big, weights["b"])
        right = aten.linear.default(big, weights["w"])
        y = aten.sub.Tensor(left, right)
        return (y,)
    """
    weight = torch.randn(6, 8)
    start = program(lines, {"a": torch.randn(8, 8) * 100, "b": weight, "w": weight + 1e-4 * torch.randn(6, 8)})

    def reverse(program, ctx):  # rounds in another order: float32 noise, which the difference blows up
        program.weights["w"] = ((program.weights["w"] * 3).double() / 3).float()

    _, report = run_pipeline(start, [planted(reverse, lossless=True)], Context())
    assert report.passes[0].error > 1e-5
    assert any("rounding alone" in note for note in report.passes[0].notes)


def test_unverified_passes_are_neither_probed_nor_refused(start):
    _, report = run_pipeline(start, [planted(scale(2.0), lossless=True)], Context(verify=False))
    assert report.passes[0].error is None
    assert report.passes[0].seconds.keys() == {"run"}


def test_a_pass_that_matches_nothing_is_an_error_when_strict(start):
    def none(program, ctx):
        return Report(skipped=[Skip("a", "too wide")])

    with pytest.raises(errors.PassMatchedNothing, match=r"1 places(.|\n)*a: too wide"):
        run_pipeline(start, [planted(none)], Context())
    _, report = run_pipeline(start, [planted(none)], Context(strict=False))
    assert any("matched nothing" in note for note in report.passes[0].notes)


def test_an_error_of_the_users_making_comes_out_as_it_is(start, empty_cache):
    def refuse(program, ctx):
        raise errors.BadPassOption(pass_name="planted", option="what", reason="no")

    with pytest.raises(errors.BadPassOption):
        run_pipeline(start, [planted(refuse)], Context())
    assert not (empty_cache / "reproducers").exists()


def test_an_interrupt_goes_through_and_leaves_nothing(start, empty_cache):
    def interrupt(program, ctx):
        program.weights["w"] = program.weights["w"] * 2
        raise KeyboardInterrupt

    before = snapshot(start)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(start, [planted(interrupt)], Context())
    assert same(before, snapshot(start))
    assert not empty_cache.exists()


def test_an_order_that_cannot_be_right_is_refused_before_anything_runs(start):
    rounds = planted(fail, invalidates=frozenset({FLOAT_WEIGHTS}))
    needs = planted(requires=frozenset({FLOAT_WEIGHTS}))
    with pytest.raises(errors.PassOrder, match=r"it needs float weights, and planted.*takes them away"):
        run_pipeline(start, [rounds, needs], Context())
    check_order([needs, rounds], start)


INT8 = "w = slim.dequantize.default(weights['q'], weights['s'], axis=0)"
INT4 = "q = slim.unpack_int4.default(weights['q'])\nw = slim.dequantize.default(q, weights['s'], axis=0)"


@pytest.mark.parametrize(("restored", "q"), [(INT8, torch.int8), (INT4, torch.uint8)])
def test_a_quantised_model_refuses_passes_that_need_float_weights(restored, q):
    lines = f"{restored}\ny = aten.linear.default(x, w)\nreturn (y,)"
    numbers = torch.ones(6, 8 if q == torch.int8 else 4, dtype=q)
    start = program(lines, {"q": numbers, "s": torch.ones(6)})
    with pytest.raises(errors.PassOrder, match="quantised already"):
        run_pipeline(start, [planted(requires=frozenset({FLOAT_WEIGHTS}))], Context())


def test_what_was_collected_outlives_only_passes_that_preserve_it(start):
    ctx = Context(collected={"statistics": 1, "other": 2})
    run_pipeline(start, [planted(preserves=frozenset({"statistics"}))], ctx)
    assert ctx.collected == {"statistics": 1}


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_dumps_hold_every_stage_as_text_that_reads_back(start, tmp_path, monkeypatch, given):
    if given == "environment":
        monkeypatch.setenv("SLIM_DUMP", str(tmp_path))
    ctx = Context(dump=tmp_path if given == "argument" else None)
    after, report = run_pipeline(start, [planted(scale(2.0))], ctx)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00_lift.py", "01_planted.py", "report.json"]
    assert (tmp_path / "01_planted.py").read_text() == str(after)
    assert PipelineReport.from_json((tmp_path / "report.json").read_text()) == report


def test_a_dump_that_cannot_be_written_says_where(start, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(errors.SaveFailed, match="file"):
        run_pipeline(start, [planted()], Context(dump=tmp_path / "file"))


def test_progress_is_told_of_passes_and_of_their_sites(start):
    told = []
    ctx = Context(progress=lambda *step: told.append(step))

    def track(program, ctx):
        list(ctx.track("sites", ["a", "b"]))

    run_pipeline(start, [planted(track)], ctx)
    assert told == [("passes", 0, 1), ("sites", 0, 2), ("sites", 1, 2), ("sites", 2, 2), ("passes", 1, 1)]


def test_weights_on_disk_are_read_once_for_each_probe():
    weight = Counted(torch.randn(6, 8))
    start = program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": weight})
    weight.reads = 0
    run_pipeline(start, [planted(), planted()], Context())
    assert weight.reads == 3


def test_a_report_is_json_and_a_table(start):
    def some(program, ctx):
        scale(2.0)(program, ctx)
        return Report(
            matched=["w"], skipped=[Skip("v", "too wide")], rules={"a = b": Count(2, 1, ["no"])}, notes=["look"],
            charts=[Chart("losses", "layer", "share", {"keys": [0.5]}, ["0"])],
        )  # fmt: skip

    _, report = run_pipeline(start, [planted(some)], Context())
    assert PipelineReport.from_json(report.to_json()) == report
    shown = str(report)
    for part in ('planted("nothing")', "192 B", "1.0e+00", "look", "left v: too wide"):
        assert part in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_a_report_has_sites_rules_nodes_and_milliseconds_of_each_pass(start):
    def some(program, ctx):
        scale(2.0)(program, ctx)
        return Report(matched=["w"], skipped=[Skip("v", "too wide")], rules={"a = b": Count(1200, 3), "b = c": Count()})

    _, report = run_pipeline(start, [planted(some)], Context())
    report.seconds["lift"], report.passes[0].seconds = 1.5, {"run": 0.25, "verify": 0.004}
    report.rules = {"x + 0 = x": Count(40, 2)}
    lifted, row = (line.split("  ") for line in str(report).splitlines()[3:5])
    lifted, row = ([cell.strip() for cell in line if cell.strip()] for line in (lifted, row))
    nodes = str(len(start.graph.nodes))
    assert lifted == ["(as lifted)", "2 of 40", nodes, "48", "192 B", "1,500"]
    assert row[:6] == ['planted("nothing")', "1 of 2", "3 of 1,200", nodes, "48", "192 B"]
    assert row[-1] == "254"


def test_notes_that_differ_in_names_and_numbers_are_printed_once():
    lines = [f"model.layers.{n}.o_proj.weight: rank {8 * n} of 64" for n in range(9)]
    item = Report(text="low_rank(0.5)", notes=["512 tokens", *lines, "12 numbers of 30"])
    said = str(PipelineReport(passes=[item])).splitlines()
    assert said[-4:] == [
        "low_rank(0.5): 512 tokens",
        f"low_rank(0.5): {lines[0]}",
        "low_rank(0.5): and 8 more such lines in report.passes[0].notes",
        "low_rank(0.5): 12 numbers of 30",
    ]
    item.notes = lines[:3]
    assert str(PipelineReport(passes=[item])).count("of 64") == 3


def test_the_table_breaks_passes_between_options_alone():
    size = Size(1_000, 10**9, 10**9)
    text = 'sparse_attention_of_some_kind("longformer", window=64, global_tokens=16)'
    item = Report(["w"] * 10, text=text, before=size, after=size, error=0.1, drift=0.1, seconds={"run": 1234.5})
    rows = [line for line in str(PipelineReport(passes=[item])).splitlines() if line.startswith(("sparse", "window"))]
    assert rows[0].startswith('sparse_attention_of_some_kind("longformer", ')
    assert rows[0].endswith(" 1.0e-01  1.0e-01  1,234,500")
    assert all(word in " ".join(rows) for word in text.split())


def test_the_rules_of_a_report_are_listed_by_stage(start):
    _, report = run_pipeline(start, [planted(scale(2.0))], Context())
    report.rules = {"x + 0 = x": Count(40, 2), "x * 1 = x": Count(7, 5), "x / 1 = x": Count()}
    report.passes[0].rules = {"a = b": Count(1200, 3)}
    assert report.rules_table().splitlines() == [
        "matched   tried  rules of the lift",
        "      5       7  x * 1 = x",
        "      2      40  x + 0 = x",
        'matched   tried  rules of planted("nothing")',
        "      3   1,200  a = b",
    ]


def test_a_report_from_before_there_were_charts_is_read(start):
    _, report = run_pipeline(start, [planted(scale(2.0))], Context())
    data = json.loads(report.to_json())
    for item in data["passes"]:
        del item["charts"]
    assert PipelineReport.from_json(json.dumps(data)) == report


def test_a_report_of_another_version_is_refused():
    with pytest.raises(errors.ArtifactVersion):
        PipelineReport.from_json(json.dumps({"version": 99, "passes": []}))
