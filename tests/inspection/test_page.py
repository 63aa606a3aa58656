"""The report in HTML holds what was compiled, and needs nothing from outside."""

import json
import re

import pytest
import torch
from click.testing import CliRunner

from slim import errors
from slim.cli import main
from slim.compiler.lift import lift
from slim.compiler.passes_base import Context
from slim.compiler.patterns.picture import share_kept
from slim.compiler.pipeline import run_pipeline
from slim.inspection.layers import layer_of, measure_layers, names_of
from slim.inspection.masks import CELLS
from slim.inspection.page import collect, render, write_page
from slim.inspection.page.collect import _short
from slim.inspection.tell import tell
from slim.inspection.times import predict_layers
from slim.passes import LowRank
from slim.runtime.compiled import CompiledModel
from tests.programs import lifted, model, program
from tests.stories import PASSES, PATTERN, SPARSE, with_code


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


def test_code_that_would_make_the_page_too_large_is_left_out_assembly_first():
    code = {"step/1.ptx": "p" * 900_000, "step/1.py": "x" * 900_000, "step/2.ptx": "q" * 900_000, "step/1.cubin": b"1"}
    found = _short(code)
    assert (found["step/1.py"], found["step/1.ptx"]) == (code["step/1.py"], code["step/1.ptx"])
    assert found["step/2.ptx"] == "900,000 characters: left out of this page. compiled.code has them.\n"
    assert list(found) == ["step/1.ptx", "step/1.py", "step/2.ptx"]


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
        flops = metrics[f"FLOPs to read {story.tokens} tokens, logits of the last"]
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


def test_the_rank_of_a_layer_is_that_of_its_products_and_not_of_a_narrow_linear():
    before = lifted("mixtral")
    after, report = run_pipeline(before, [LowRank(0.6, method="svd")], Context())
    ranks = [re.search(r"rank (\d+)", note) for note in report.passes[0].notes]
    told = measure_layers(after, ["0", "rest"], 16).metrics["rank of products, the lowest"]
    assert told == [min(int(found[1]) for found in ranks if found), None]
    assert "rank of products, the lowest" not in measure_layers(before, ["0", "rest"], 16).metrics


def test_layers_behind_a_block_that_is_gone_stay_where_they_were():
    story = tell(
        "short",
        lifted("llama", num_hidden_layers=4),
        'prune(depth=1, blocks="influence")',
        calibration=[torch.randint(3, 96, (4, 32))],
        target="eager",
    )
    story.sensitive = True
    data = collect(story)
    gone = int(re.search(r"layers\.(\d) is gone", " ".join(data["steps"][1]["notes"]))[1])
    series = {metric["title"]: metric["series"] for metric in data["layers"]["metrics"]}
    assert [value is None for value in series["weights, bytes"]["now"]] == [place == gone for place in range(5)]
    assert [layer for layer, _ in data["layers"]["masks"]] == [str(place) for place in range(4) if place != gone]
    moved = series["output moved where this layer alone is compressed"]["now"]
    assert [place for place, value in enumerate(moved) if value] == [gone]
    assert moved[gone] == pytest.approx(story.report.passes[0].error, rel=1e-4)


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
