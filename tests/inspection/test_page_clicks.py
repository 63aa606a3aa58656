"""The report in HTML does what is clicked and pressed, and can be read on every screen."""

import dataclasses
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from slim.compiler.charts import Chart
from slim.compiler.report import PipelineReport
from slim.inspection.layers import calls
from slim.inspection.page import write_page
from slim.inspection.tell import compiled_story
from slim.inspection.times import predict_layers
from tests import browser, sight
from tests.stories import SPARSE

pytestmark = pytest.mark.skipif(browser.find() is None, reason="needs a Chromium: apt-get install chromium")
TABS = ("pipeline", "ir", "layers", "code", "roofline")
FOCUS = "(({tagName, id, innerText}) => [tagName, id, innerText])(document.activeElement)"


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    """Where screenshots are kept: the folder that SLIM_SCREENSHOTS names, as CI does."""
    folder = Path(os.environ.get("SLIM_SCREENSHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture
def chromium(window, page):
    """The page as it opens."""
    window.open(page)
    yield window
    assert window.faults == []


def top_of(selector):
    return f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().top"


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


def test_every_kernel_of_the_code_leads_to_the_nodes_that_it_computes(chromium, story):
    chromium.click("#tab-code")
    kernels = {kernel.name for region in story.compiled.stages["whole"] for kernel in region.kernels}
    assert chromium.count("#code .source [data-kernel]") == len(kernels)
    chromium.click("#code .source [data-kernel]")
    kernel = chromium.text("#details h2")
    its = [region for region in story.compiled.stages["whole"] if kernel in [one.name for one in region.kernels]]
    assert f"runs {len(its)} region" in chromium.text("#details dl")
    assert chromium.count("#details [data-node]") == sum(len(region.nodes) for region in its)


def test_the_panel_covers_nothing_and_escape_leads_back_to_the_line(chromium):
    chromium.click("#tab-ir")
    chromium.click('#stages [data-stage="2"]')
    line = "document.querySelector('#lines .row.changed .new')"
    top = chromium.run(f"({line}.scrollIntoView({{block: 'center'}}), {line}.getBoundingClientRect().top)")
    chromium.click("#lines .row.changed .new")
    beside = (
        "document.querySelector('main').getBoundingClientRect().right <= by('details').getBoundingClientRect().left"
    )
    assert chromium.run(beside)
    assert abs(chromium.run("document.querySelector('#lines .picked').getBoundingClientRect().top") - top) <= 1
    picked = chromium.text("#lines .picked")
    assert chromium.text("#details h2") == picked.partition(":")[0]
    chromium.press("Escape")
    assert chromium.count("#details") == 0
    assert chromium.run("document.activeElement.innerText") == picked


def test_a_node_is_found_by_the_keyboard_alone(chromium):
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


def test_a_search_without_hits_says_so(chromium):
    chromium.click("#tab-ir")
    chromium.type("#search", "nowhere")
    assert chromium.text("#found") == "0 found."
    assert 'has "nowhere" in it' in chromium.text("#lines")


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


def test_a_fold_opens_alone_and_what_is_above_it_stays_in_place(chromium):
    chromium.run("openStage(2)")
    folds, lines = chromium.count("#lines .fold"), chromium.count("#lines .row")
    hidden = int(chromium.text("#lines .row + .fold").split()[0])
    above = "#lines .row:has(+ .fold)"
    chromium.run(f"document.querySelector({json.dumps(above)}).id = 'above'")
    chromium.run("document.querySelector('#above + .fold').focus()")
    top = chromium.run(top_of("#above"))
    chromium.press("Enter")
    assert chromium.count("#lines .fold") == folds - 1
    assert chromium.count("#lines .row") == lines + hidden
    assert chromium.run(top_of("#above")) == top
    first = "document.querySelector('#above').nextElementSibling.contains(document.activeElement)"
    assert chromium.run(first)
    chromium.click('#stages [data-stage="1"]')
    chromium.click('#stages [data-stage="2"]')
    assert chromium.count("#lines .fold") == folds - 1  # it stays open


def test_a_line_in_a_fold_can_be_gone_to_from_the_code(chromium):
    chromium.run("openStage(2)")
    folded = chromium.run("lineOf(rows[by('lines').querySelector('.fold').dataset.from].right)")
    chromium.click("#tab-code")
    chromium.run(f"openNode(nameOf({json.dumps(folded)}))")
    chromium.click("#details [data-place]")
    assert chromium.run(FOCUS)[2] == folded


def test_each_tab_stays_where_it_was_left_and_the_browsers_back_leads_there(chromium):
    chromium.click("#tab-ir")
    chromium.click('#stages [data-stage="2"]')
    chromium.click("#lines .row:last-child [data-line]")
    chromium.press("ArrowUp")
    chromium.click("#details [data-kernel]")  # of the last linear
    place = f"[current, view.stage, Math.round({top_of('#lines .picked')}), by('details').innerText]"
    chromium.run("by('tab-ir').click()")
    left = chromium.run(place)
    assert left[0] == "ir"
    assert 0 < left[2] < 900
    chromium.run("by('tab-code').click()")
    code = chromium.run("[scrollY, location.hash]")
    assert code[1].startswith("#code/whole/program.cpp:k")
    chromium.run("new Promise(done => { addEventListener('popstate', done, {once: true}); history.back(); })")
    assert chromium.run(place) == left
    assert chromium.run("document.activeElement.matches('#lines .picked')")
    chromium.run("new Promise(done => { addEventListener('popstate', done, {once: true}); history.forward(); })")
    assert chromium.run("[scrollY, location.hash]") == code


def test_what_is_pressed_keeps_the_focus_and_links_hand_it_on(chromium):
    chromium.click("#tab-ir")
    chromium.run("by('stages').children[1].focus()")
    for key, stage in (("Enter", 1), ("ArrowRight", 2), ("Enter", 2), ("ArrowLeft", 1)):
        chromium.press(key)
        assert chromium.run("document.activeElement.dataset.stage") == str(stage)
        assert chromium.run("view.stage") == stage
    chromium.run("rove(document.querySelector('#lines .row:last-child [data-line]'))")
    chromium.press("ArrowUp")
    line = chromium.run(FOCUS)
    chromium.press("Enter")
    assert chromium.run(FOCUS)[1] == "details"  # whose links are next
    chromium.press("Escape")
    assert chromium.run(FOCUS) == line
    chromium.run('openNode("linear_1")')
    chromium.run("document.querySelector('#details [data-kernel]').focus()")
    chromium.press("Enter")
    assert chromium.run("document.activeElement.closest('#hit') != null")
    chromium.press("Enter")
    assert chromium.run(FOCUS)[1] == "details"
    chromium.press("Escape")
    assert chromium.run("document.activeElement.closest('#hit') != null")


def test_what_was_searched_is_marked_in_the_lines_and_in_their_origins(chromium):
    chromium.click("#tab-ir")
    chromium.type("#search", 'weights["')
    marks = "[...new Set([...document.querySelectorAll('#lines mark.found')].map(e => e.textContent))]"
    assert chromium.run(marks) == ['weights["']
    chromium.run("search('MLP.act_fn')")  # of lines that have it in their module alone
    assert chromium.run(marks) == ["mlp.act_fn"]
    assert chromium.count("#lines .dim mark") > 0
    chromium.run("search('[<b')")
    assert chromium.count("#lines mark.found") == 0


def test_edits_are_marked_word_by_word(chromium):
    texts = ["a: f32[4] = add(b, c)", "a: f16[4] = add(b, dd, c)"]
    told = f"(([a, b]) => edits(a, b).map((spans, side) => spans.map(one => [a, b][side].slice(...one))))({texts})"
    assert chromium.run(told) == [["f32"], ["f16", "dd, "]]


def test_hundreds_of_files_are_one_list_by_their_kinds(chromium, story, tmp_path):
    code = {"whole/program.py": "one"} | {f"whole/kernel_{i}.{end}": end for i in range(300) for end in ("ptx", "py")}
    made = SimpleNamespace(**vars(story.compiled) | {"code": code})
    chromium.open(write_page(dataclasses.replace(story, compiled=made), tmp_path / "files.html"))
    chromium.click("#tab-code")
    assert chromium.run(top_of("#code .source")) < 400
    groups = chromium.run("[...document.querySelectorAll('#file optgroup')].map(e => e.label)")
    assert groups == ["whole, .py (301)", "whole, .ptx (300)"]
    chromium.run("by('file').focus(), by('file').value = 'whole/kernel_7.ptx'")
    chromium.run("by('file').dispatchEvent(new Event('change', {bubbles: true}))")
    assert chromium.text("#code .source").strip() == "ptx"
    assert chromium.run("[document.activeElement.id, location.hash]") == ["file", "#code/whole/kernel_7.ptx"]


def test_numbers_of_pictures_can_be_read_without_a_pointer(chromium):
    chromium.click("#tab-layers")
    chromium.run("document.querySelector('#layers .numbers summary').focus()")
    chromium.press("Enter")
    chromium.run("new Promise(done => setTimeout(done, 50))")
    assert chromium.text("#layers .numbers th:last-child") == "now"
    assert chromium.count("#layers .numbers tbody tr") == 3  # two layers and the rest


def test_one_series_is_named_where_its_name_says_more_than_the_title(chromium, story, tmp_path):
    chromium.open(write_page(dataclasses.replace(story, seconds={}), tmp_path / "predicted.html"))
    chromium.click("#tab-layers")
    figures = chromium.run("[...document.querySelectorAll('#layers figure')].map(e => e.innerText)")
    seconds = [text for text in figures if text.lower().startswith("seconds")]
    assert len(seconds) == 2
    assert all("predicted, float32 roof" in text for text in seconds)
    assert all(re.search(r"predicted [\d.]+ µs in all", text) for text in seconds)


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
