"""The report in HTML holds what was compiled, needs nothing from outside, and does what is clicked."""

import dataclasses
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from slim import errors
from slim.cli import main
from slim.codegen.cpp.emit import WANTS, emit
from slim.codegen.regions.lower import lower
from slim.codegen.regions.provenance import Kernel, stages
from slim.compiler.charts import Chart
from slim.compiler.lift import lift
from slim.compiler.machine import Machine
from slim.compiler.patterns.picture import share_kept
from slim.compiler.report import PipelineReport
from slim.inspection.layers import calls, layer_of, measure_layers, names_of
from slim.inspection.masks import CELLS
from slim.inspection.page import collect, render, write_page
from slim.inspection.tell import compiled_story, tell
from slim.inspection.times import predict_layers
from slim.runtime.compiled import CompiledModel
from slim.runtime.speed import Speed
from tests import browser, sight
from tests.programs import model, program

HEADS = "0-1: dense; 2-3: window(4) | columns(1)"
PASSES = 'fold_norms, quantize("int8")'
SPARSE = f'sparse_attention("{HEADS}", layers=[0])'
PATTERN = f"causal, {HEADS}"
NEEDS_BROWSER = pytest.mark.skipif(browser.find() is None, reason="needs a Chromium: apt-get install chromium")


def with_code(story):
    """The same story with the code of the whole Program, as the CPU target writes it, without building it."""
    schedule = lower(story.programs[-1], WANTS)
    unit = emit(schedule)
    names = iter(unit.names)
    made = stages(schedule, lambda *_: [Kernel(next(names), "program.cpp")])
    story.compiled = SimpleNamespace(
        target=SimpleNamespace(name="cpu"), code={"whole/program.cpp": unit.source}, stages={"whole": made}
    )
    return story


@pytest.fixture(scope="module")
def story():
    made = with_code(tell("tiny", model("llama"), f"{PASSES}, {SPARSE}", target="eager"))
    made.machine, made.speed = Machine(2e10, 5e10, 1), Speed([1000.0], [100.0])
    made.seconds = {call: {"0": 1e-4, "1": 2e-4} for call in calls(made.programs[-1], made.tokens)}
    made.sensitive = True
    return made


@pytest.fixture(scope="module")
def page(story, tmp_path_factory):
    return write_page(story, tmp_path_factory.mktemp("page") / "report.html")


def embedded(file):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL)
    return json.loads(text)


# -- what it holds -----------------------------------------------------------------------------------------------------


def test_every_stage_reads_as_its_program_does(story, page):
    data = embedded(page)
    assert [ir["name"] for ir in data["irs"]] == ["lift", "fold_norms()", 'quantize("int8")', SPARSE]
    for ir, made in zip(data["irs"], story.programs, strict=True):
        texts = [data["lines"][number][0] for number in ir["lines"]]
        body = str(made)
        assert len(texts) == len(list(made.nodes())) + 1
        assert all(text in body for text in texts[:-1])


def test_a_line_that_a_pass_left_alone_is_held_once(page):
    data = embedded(page)
    assert len({tuple(line) for line in data["lines"]}) == len(data["lines"])
    before, after = (set(ir["lines"]) for ir in data["irs"][:2])
    assert len(before & after) > len(before) / 2


def test_lines_know_the_model_s_source(page):
    data = embedded(page)
    assert any("self.down_proj(" in text for _, _, text in data["origins"])


def test_nothing_in_it_comes_from_elsewhere(page):
    text = page.read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", text)
    assert "default-src 'none'" in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_text_of_a_model_cannot_end_the_script_it_stands_in(tmp_path):
    name = "</script><script>alert(1)</script>"
    start = program(f"y = aten.add.Tensor(x, weights[{name!r}])\nreturn (y,)", {name: torch.ones(8)})
    story = tell("<b>x</b>", start, target="eager")
    text = render(collect(story))
    assert text.count("</script>") == 2
    assert "<title>&lt;b>x" in text
    assert name in embedded(write_page(story, tmp_path / "x.html"))["weights"]


def test_a_file_that_cannot_be_written_is_said(story, tmp_path):
    with pytest.raises(errors.SaveFailed):
        write_page(story, tmp_path / "missing" / "report.html")


@pytest.mark.parametrize(("path", "said"), [("missing/report.html", "there is no directory"), (".", "a directory of")])
def test_a_path_that_cannot_be_written_is_refused_before_any_work(tmp_path, path, said):
    run = CliRunner().invoke(main, ["inspect", str(tmp_path / "no model"), "--html", str(tmp_path / path)])
    assert run.exit_code == 2
    assert said in run.output


LAYER = """
    n{i} = slim.rms_norm.default({x}, weights["model.layers.{i}.input_layernorm.weight"], eps=1e-06)
    q{i} = aten.linear.default(n{i}, weights["model.layers.{i}.self_attn.q_proj.weight"])
    k{i} = aten.linear.default(n{i}, weights["model.layers.{i}.self_attn.k_proj.weight"])
    v{i} = aten.linear.default(n{i}, weights["model.layers.{i}.self_attn.v_proj.weight"])
    m{i} = aten.mul.Tensor(q{i}, k{i})
    a{i} = aten.mul.Tensor(m{i}, v{i})
    o{i} = aten.linear.default(a{i}, weights["model.layers.{i}.self_attn.o_proj.weight"])
    r{i} = aten.add.Tensor({x}, o{i})
    p{i} = slim.rms_norm.default(r{i}, weights["model.layers.{i}.post_attention_layernorm.weight"], eps=1e-06)
    g{i} = aten.linear.default(p{i}, weights["model.layers.{i}.mlp.gate_proj.weight"])
    s{i} = aten.silu.default(g{i})
    u{i} = aten.linear.default(p{i}, weights["model.layers.{i}.mlp.up_proj.weight"])
    h{i} = aten.mul.Tensor(s{i}, u{i})
    d{i} = aten.linear.default(h{i}, weights["model.layers.{i}.mlp.down_proj.weight"])
    y{i} = aten.add.Tensor(r{i}, d{i})
"""


def test_thirty_layers_stay_below_five_megabytes(tmp_path):
    layers = (LAYER.format(i=i, x="x" if i == 0 else f"y{i - 1}") for i in range(30))
    lines = "".join(layers) + "return (y29,)"
    names = set(re.findall(r'weights\["(.*?)"\]', lines))
    weights = {name: torch.randn(8) if "norm" in name else torch.randn(8, 8) / 3 for name in sorted(names)}
    story = with_code(tell("thirty", program(lines, weights), PASSES, target="eager"))
    file = write_page(story, tmp_path / "report.html")
    assert len(embedded(file)["layers"]["names"]) == 31
    assert file.stat().st_size < 5e6 / 4  # lines of the largest models are four times as many


# -- numbers by layer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "layer"),
    [("model.layers.12.mlp.down_proj.weight", "12"), ("transformer.h.0.attn", "0"), ("lm_head.weight", "rest"),
     ("0.weight", "0"), ("model.layers.3", "3"), ("", "rest"), ("blocks.1.experts.7.w", "1")],
)  # fmt: skip
def test_the_layer_is_the_first_number_of_a_path(path, layer):
    assert layer_of(path) == layer


def test_layers_add_up_to_the_program(story):
    for made in story.programs:
        layers = measure_layers(made, names_of([made]), 16)
        found = made.nbytes, sum(layers.metrics["weights, bytes"])
        assert found[0] == found[1]


def test_layers_add_up_to_the_points_of_the_roofline(story):
    data = collect(story)
    metrics = {metric["title"]: metric["series"] for metric in data["layers"]["metrics"]}
    points = {name: (flops, moved, measured) for name, flops, moved, measured in data["roofline"]["points"]}
    for version, series in (("as lifted", "as lifted"), ("compiled", "now")):
        flops = metrics[f"FLOPs to read {story.tokens} tokens"]
        assert sum(flops.get(series, flops["now"])) == points[f"prefill, {version}"][0]
        assert sum(metrics["bytes moved to write one"][series]) == points[f"decode, {version}"][1]
    assert points["decode, compiled"][2] == story.speed.decode.best * points["decode, compiled"][0]


def test_layers_know_bits_heads_and_masks(story):
    metrics = {metric["title"]: metric["series"] for metric in embedded_layers(story)["metrics"]}
    assert metrics["bits a number"]["as lifted"][:2] == [32.0, 32.0]
    assert all(8 < bits < 10 for bits in metrics["bits a number"]["now"][:2])
    assert metrics["key and value heads"] == {"now": [2, 2, None]}  # no pass changed them: one series
    assert all(moved > 0 for moved in metrics["output moved where this layer alone is compressed"]["now"][:2])
    assert [(layer, mask["text"]) for layer, mask in embedded_layers(story)["masks"]] == [
        ("0", PATTERN),
        ("1", "causal"),
    ]


def test_time_by_layer_is_predicted_from_the_machine_and_drawn_beside_what_was_measured(story):
    metrics = {metric["title"]: metric["series"] for metric in embedded_layers(story)["metrics"]}
    roof = predict_layers(story.programs[-1], story.machine, story.tokens)
    for call, seconds in roof.items():
        assert metrics[f"seconds {call}"]["predicted, float32 roof"] == [seconds[name] for name in ("0", "1", "rest")]
        assert metrics[f"seconds {call}"]["measured"] == [1e-4, 2e-4, None]
    heavy, light = (sum(seconds.values()) for seconds in roof.values())
    assert heavy > light


def test_a_mask_s_picture_holds_what_each_head_keeps(story):
    (_, mask), _ = embedded_layers(story)["masks"]
    assert [(heads["first"], heads["last"]) for heads in mask["heads"]] == [(0, 1), (2, 3)]
    dense, window = (embedded_layers(story)["pictures"][heads["picture"]] for heads in mask["heads"])
    cell = mask["tokens"] // CELLS
    assert dense[-CELLS:] == "9" * (CELLS - 1) + str(-(-9 * (cell + 1) // (2 * cell)))  # the last row: half of its last
    assert window[-CELLS:].count("0") == CELLS - 3  # of the first cell the sink, of the last two the window
    assert mask["heads"][0]["share"] == 1.0
    assert mask["heads"][1]["share"] == share_kept("window(4) | columns(1)", mask["tokens"])


def embedded_layers(story):
    return collect(story)["layers"]


# -- the commands that write it ----------------------------------------------------------------------------------------


def test_the_command_writes_a_file_of_a_model_and_of_what_was_compiled(tmp_path):
    model("llama").save_pretrained(tmp_path / "model")
    file = tmp_path / "report.html"
    run = CliRunner().invoke(
        main, ["inspect", str(tmp_path / "model"), "-p", PASSES, "--html", str(file), "--target", "eager"]
    )
    assert run.exit_code == 0, run.output
    assert run.stdout.startswith(f"wrote {file}")
    assert [step["name"] for step in embedded(file)["steps"]] == ["lift", "fold_norms()", 'quantize("int8")']
    CompiledModel(lift(model("llama")), "eager").save(tmp_path / "small")
    run = CliRunner().invoke(
        main, ["inspect", str(tmp_path / "small"), "-p", "fold_norms", "--html", str(file), "--target", "eager"]
    )
    assert run.exit_code == 0, run.output
    assert [ir["name"] for ir in embedded(file)["irs"]] == ["as saved", "fold_norms()"]


def test_options_of_the_report_are_refused_without_it(tmp_path):
    run = CliRunner().invoke(main, ["inspect", str(tmp_path), "--measure"])
    assert run.exit_code == 2
    assert "--measure is for the report that --html writes" in run.output


# -- in a browser ------------------------------------------------------------------------------------------------------

TABS = ("pipeline", "ir", "layers", "code", "roofline")


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    """Where screenshots are kept: the folder that SLIM_SCREENSHOTS names, as CI does."""
    folder = Path(os.environ.get("SLIM_SCREENSHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def chromium(page, tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("profile")) as one:
        one.open(page)
        yield one
        assert one.faults == []


@NEEDS_BROWSER
def test_search_and_stages_and_kernels_can_be_clicked_through(chromium, shots):
    assert chromium.text("h1") == "tiny"
    chromium.click('#pipeline table [data-step="2"]')  # from the pipeline to what that pass did
    assert chromium.count("#ir .row.made") > 0
    assert "Before and after quantize" in chromium.text("#said")
    chromium.click('#stages [data-stage="1"]')
    assert "Before and after fold_norms()" in chromium.text("#said")
    assert chromium.count("#ir .row.changed mark") > 0
    chromium.type("#search", "layers.1.mlp.down_proj")
    found = int(chromium.text("#found").split()[0])
    assert 0 < found == chromium.count("#ir .row:not(.heads)")
    chromium.click('#stages [data-stage="2"]')
    name = "model.layers.1.mlp.down_proj.weight"
    chromium.run(f"showWeight({json.dumps(name)})")
    assert 'quantize("int8") changed it' in chromium.text("#details")
    chromium.click("#details [data-kernel]")  # and on to the kernel that reads it
    assert chromium.text("#hit").startswith("static void k")
    assert chromium.count("#code .hit") > 2  # to its end
    assert chromium.text("#details h2") in chromium.text("#hit")
    assert name in chromium.text("#details dl")
    chromium.screenshot(shots / "kernel.png")
    assert (shots / "kernel.png").read_bytes().startswith(b"\x89PNG")
    chromium.click("#details [data-node]")  # and back to a node
    assert "lift made it" in chromium.text("#details")


@NEEDS_BROWSER
def test_every_kernel_of_the_code_leads_to_the_nodes_that_it_computes(chromium, story):
    chromium.click("#tab-code")
    kernels = {kernel.name for region in story.compiled.stages["whole"] for kernel in region.kernels}
    assert chromium.count("#code .source [data-kernel]") == len(kernels)
    chromium.click("#code .source [data-kernel]")
    kernel = chromium.text("#details h2")
    its = [region for region in story.compiled.stages["whole"] if kernel in [one.name for one in region.kernels]]
    assert f"runs {len(its)} region" in chromium.text("#details dl")
    assert chromium.count("#details [data-node]") == sum(len(region.nodes) for region in its)


@NEEDS_BROWSER
def test_the_panel_covers_nothing_and_escape_leads_back_to_the_line(chromium):
    chromium.click("#tab-ir")
    chromium.run('view.query = ""; view.stage = 2; drawIR()')
    chromium.click("#lines .row.changed .new")
    beside = (
        "document.querySelector('main').getBoundingClientRect().right <= by('details').getBoundingClientRect().left"
    )
    assert chromium.run(beside)
    picked = chromium.text("#lines .picked")
    assert chromium.text("#details h2") == picked.partition(":")[0]
    chromium.press("Escape")
    assert chromium.count("#details") == 0
    assert chromium.run("document.activeElement.innerText") == picked


@NEEDS_BROWSER
def test_a_node_is_found_by_the_keyboard_alone(chromium):
    chromium.run("document.activeElement.blur()")
    chromium.press("/")
    chromium.send("Input.insertText", text="rms_norm")
    chromium.press("Enter")
    assert chromium.text("#details h2").startswith("rms_norm")
    first = chromium.text("#details h2")
    chromium.press("ArrowDown")  # the panel goes along
    assert chromium.text("#details h2") != first
    chromium.press("ArrowUp")
    assert chromium.text("#details h2") == first
    chromium.press("Escape")
    assert chromium.count("#details") == 0
    chromium.run("by('tab-ir').focus()")
    for key, tab in (("ArrowRight", "layers"), ("End", "roofline"), ("ArrowRight", "pipeline"), ("ArrowRight", "ir")):
        chromium.press(key)
        assert chromium.run("document.activeElement.id") == f"tab-{tab}"
        assert chromium.count(f"#{tab}") == 1


@NEEDS_BROWSER
def test_a_search_without_hits_says_so(chromium):
    chromium.click("#tab-ir")
    chromium.run('view.query = ""; drawIR()')
    chromium.type("#search", "nowhere")
    assert chromium.text("#found") == "0 found."
    assert 'has "nowhere" in it' in chromium.text("#lines")


@NEEDS_BROWSER
def test_layers_and_the_roofline_are_drawn(chromium, shots):
    chromium.click("#tab-layers")
    assert chromium.count("#layers figure svg rect") > 20
    assert chromium.count("#layers .masks canvas") == 3
    ink = "Math.max(...document.querySelector('canvas').getContext('2d').getImageData(0, 31, 1, 1).data)"
    assert chromium.run(ink) == 255  # the last query of the first heads sees the first key
    chromium.screenshot(shots / "layers.png")
    chromium.click("#tab-roofline")
    assert chromium.count("#roofline .measured") == 2
    assert "%" in chromium.text("#roofline table")


@NEEDS_BROWSER
def test_a_bar_is_as_high_as_its_number_and_says_it_when_touched(chromium, story):
    chromium.click("#tab-layers")
    heights = chromium.run("""[...[...document.querySelectorAll("#layers figure")]
        .find(e => /^seconds to write/i.test(e.innerText))
        .querySelectorAll("rect:not(.touch)")].map(e => e.height.baseVal.value)""")
    call = list(calls(story.programs[-1], story.tokens))[1]
    roof = predict_layers(story.programs[-1], story.machine, story.tokens)[call]
    seconds = [*(roof[name] for name in ("0", "1", "rest")), 1e-4, 2e-4]
    assert heights == pytest.approx([heights[-1] * each / 2e-4 for each in seconds], abs=0.02)
    chromium.click("#layers figure .touch")
    assert chromium.text("#layers .read.now").startswith("layer 0: as lifted ")


@NEEDS_BROWSER
@pytest.mark.parametrize(("width", "height", "dark"), [(390, 844, True), (1440, 900, False)])
def test_every_view_fits_and_can_be_read(page, tmp_path, shots, width, height, dark):
    with browser.Browser(tmp_path / "profile", width=width, height=height, dark=dark) as one:
        one.open(page)
        for tab in TABS:
            one.click(f"#tab-{tab}")
            assert one.run(sight.SIDEWAYS) == [], tab
            assert one.run(sight.FAINT) == [], tab
            assert one.run(sight.CROWDED) == [], tab
            one.screenshot(shots / f"{width}-{tab}.png")
        one.click("#tab-ir")
        one.click("#lines [data-line]")
        one.run("scrollTo(0, document.body.scrollHeight)")  # what the panel lies over can be scrolled clear of it
        clear = "document.querySelector('#lines').getBoundingClientRect()"
        panel = "by('details').getBoundingClientRect()"
        assert one.run(f"{clear}.bottom <= {panel}.top || {clear}.right <= {panel}.left")
        assert one.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)"
        )
        assert one.faults == []


@NEEDS_BROWSER
def test_passes_of_a_compiled_directory_are_told_without_their_irs(chromium, story, tmp_path):
    kept = compiled_story(
        "small", SimpleNamespace(**vars(story.compiled), program=story.programs[-1], report=story.report)
    )
    chromium.open(write_page(kept, tmp_path / "kept.html"))
    assert chromium.count("#pipeline [data-step]") == 0  # nothing to click that leads nowhere
    assert "fold_norms()" in chromium.text("#pipeline table")
    assert f"slim inspect MODEL -p 'fold_norms(), quantize(\"int8\"), {SPARSE}'" in chromium.text("#not-kept")
    chromium.click("#tab-ir")
    assert "lines after all passes" in chromium.text("#said")
    chromium.run('openNode("linear_1")')
    assert chromium.text("#details dl").count('quantize("int8") changed it') == 1
    assert "as it is" not in chromium.text("#details")


@NEEDS_BROWSER
def test_charts_of_passes_are_drawn_and_their_curves_can_be_read(chromium, story, tmp_path):
    sites = [f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in range(4) for name in ("gate", "up", "down")]
    curves = {site: [1.0, 0.5 / (1 + row), 0.01] for row, site in enumerate(sites)}
    marks = dict.fromkeys(sites, 1)
    report = dataclasses.replace(story.report.passes[0], charts=[
        Chart("What is lost", "matrix", "share", {"told": [0.1] * 12, "measured": [0.2] * 12}, sites, style=".1%"),
        Chart("What a rank loses", "rank", "share", curves, marks=marks, kind="lines", log=True, style=".1%"),
    ])  # fmt: skip
    saved = SimpleNamespace(
        **vars(story.compiled), program=story.programs[-1], report=PipelineReport([report], target="cpu")
    )
    chromium.open(write_page(compiled_story("charts", saved), tmp_path / "charts.html"))
    labels = "[...document.querySelectorAll('#pipeline figure:nth-child(%d) text')].map(e => e.textContent)"
    assert chromium.run(labels % 1) == ["0%", "10%", "20%", "0", "1", "2", "3"]  # long names give their layers
    assert chromium.run(labels % 2) == ["1%", "10%", "100%", "0", "2"]
    assert chromium.count("#pipeline .curve") == 12
    assert chromium.run("document.querySelector('#pipeline g').dataset.read") == f"{sites[0]}: 50.0% at 1"
    assert chromium.run(sight.CROWDED) == []
