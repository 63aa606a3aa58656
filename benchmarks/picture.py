"""Draws docs/slim.png, the picture of the first page: the demo model from source to kernels, and what that gains.

    python -m benchmarks.picture        # about a minute; needs a Chromium

Every line and number in it is what slim gives and what was measured in this run: perplexity on the first 8,192 tokens
of held-out text, decoding of 64 tokens after 128, best of five rounds by turns, one thread.
"""

from __future__ import annotations

import html
import re
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import slim
from examples.demo import CONTEXT, MODEL, PASSES, PREDICTED, READ, ROUNDS, WRITTEN, generated
from slim.runtime.perplexity import score, windows
from slim.runtime.speed import measure
from tests.browser import Browser

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "slim.png"
WIDTH, HEIGHT = 1200, 500
STYLE = """
* { box-sizing: border-box; margin: 0 }
body {
    width: 1200px; height: 500px; background: #fff; color: #1b1f24;
    font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; padding: 20px 24px;
}
.steps { display: grid; grid-template-columns: 1fr 1fr 1fr 1fr; gap: 30px }
.steps > div {
    position: relative; border: 1px solid #dfe3e8; border-radius: 10px; padding: 12px 14px; height: 350px;
    overflow: hidden; background: #fbfcfd;
}
.steps > div + div::before {
    content: "→"; position: fixed; margin-left: -37px; margin-top: 140px; font-size: 20px; color: #98a2ad;
}
h2 { font-size: 15px }
h2 small { color: #626b76; font-weight: 400; display: block; font-size: 12.5px; margin-bottom: 8px }
pre { font: 10.6px/1.5 "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere }
pre { -webkit-mask-image: linear-gradient(#000 255px, transparent 290px); height: 290px; overflow: hidden }
pre i { color: #626b76; font-style: normal }
pre b { color: #0b62c4; font-weight: 600 }
mark { background: #ffe9a8; color: inherit; border-radius: 2px }
.bars { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 30px; margin-top: 18px }
.bars h3 { font-size: 13.5px; margin-bottom: 6px }
.bar { display: grid; grid-template-columns: 96px 1fr; font-size: 12.5px; align-items: center; margin: 3px 0 }
.bar i {
    display: inline-block; height: 17px; border-radius: 3px; background: #b4bcc6; vertical-align: middle;
    margin-right: 7px;
}
.bar.ours i { background: #2b7de0 }
"""


def main() -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    original = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    lifted, small = slim.compile(MODEL), slim.compile(MODEL, PASSES)
    steps = [
        ("A PyTorch model", "left as it is", source(lifted)),
        ("its graph", "typed, each line with its source", ir(lifted)),
        ("passes", ", ".join(map(repr, PASSES)), ir(small)),
        ("kernels", "C++ here, Triton on a GPU", code(small)),
    ]
    boxes = "".join(
        f"<div><h2>{name}<small>{html.escape(what)}</small></h2><pre>{body}</pre></div>" for name, what, body in steps
    )
    page = (
        f'<style>{STYLE}</style><div class="steps">{boxes}</div><div class="bars">{bars(original, lifted, small)}</div>'
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(f'<!doctype html><meta charset="utf-8">{page}', encoding="utf-8")
        with Browser(Path(folder) / "profile", WIDTH, HEIGHT) as browser:
            size = dict(width=WIDTH, height=HEIGHT, deviceScaleFactor=2, mobile=False)
            browser.send("Emulation.setDeviceMetricsOverride", **size)
            browser.open(file)
            browser.screenshot(PICTURE)


CALL = """\
model = AutoModelForCausalLM
    .from_pretrained(...)

compiled = slim.compile(model,
    passes=[FoldNorms(),
            Quantize("int8")])

compiled.generate(tokens)
"""


def source(compiled: slim.CompiledModel) -> str:
    """How it is called, and the line of the model's source that the first layer's MLP came from."""
    origin = str(compiled.explain("model.layers.0.mlp.down_proj.weight").origins[0])
    place, _, line = origin.partition(" in ")
    file = place.rsplit("/", 1)[-1]
    return f"{html.escape(CALL)}\n\n<i>{file}</i>\n{html.escape(line.partition(': ')[2])}"


def ir(compiled: slim.CompiledModel) -> str:
    """The IR of the first layer's MLP, its norm included; what a pass wrote marked."""
    found = []
    for line in str(compiled.program).splitlines():
        body, _, origin = line.strip().partition("  # ")
        if re.match(r"model\.layers\.0\.(mlp|post_attention_layernorm)", origin):
            found.append(re.sub(r"model\.layers\.0\.(mlp\.)?", "", body))
    text = re.sub(r"^(\w+):", r"<b>\1</b>:", html.escape("\n".join(found), quote=False), flags=re.MULTILINE)
    return re.sub(r"(slim\.dequantize\.default|\bNone\b)", r"<mark>\1</mark>", text)


def code(compiled: slim.CompiledModel) -> str:
    """Where the results of gate and up leave their matrix product."""
    stages = next(iter(compiled.stages.values()))
    region = next(stage for stage in stages if "silu" in stage.text)
    weights = re.sub(r"model\.layers\.0\.mlp\.", "", region.text)
    head, _, body = generated(compiled).partition("\n")
    loop = body[body.index("    for ") :]  # without the lines that name its arguments
    return html.escape(f"// {weights}\n\n{head}\n    ...\n{loop}").replace("silu_f", "<mark>silu_f</mark>")


def bars(original: torch.nn.Module, lifted: slim.CompiledModel, small: slim.CompiledModel) -> str:
    models = {"transformers": original, "slim, float32": lifted, "slim, int8": small}
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    passages = windows((MODEL / "heldout.txt").read_text(encoding="utf-8"), tokenizer, CONTEXT, PREDICTED)
    prompt = torch.tensor([passages[0].tokens[:READ]])
    speeds = measure(models, prompt, WRITTEN, ROUNDS)
    sizes = [lifted.program.nbytes, lifted.program.nbytes, small.program.nbytes]
    shown = {
        "weights, MB": [size / 1e6 for size in sizes],
        "perplexity on held-out code": [score(model, passages).perplexity for model in models.values()],
        "decoding, tokens a second, one thread": [speed.decode.best for speed in speeds.values()],
    }
    for title, values in shown.items():
        print(title, dict(zip(models, values, strict=True)))
    return "".join(_bars(title, dict(zip(models, values, strict=True))) for title, values in shown.items())


def _bars(title: str, values: dict[str, float]) -> str:
    most = max(values.values())
    rows = "".join(
        f'<div class="bar{" ours" * name.startswith("slim")}"><span>{name}</span><span>'
        f'<i style="width:{round(180 * value / most)}px"></i>{value:,.{0 if value >= 100 else 2}f}</span></div>'
        for name, value in values.items()
    )
    return f"<div><h3>{title}</h3>{rows}</div>"


if __name__ == "__main__":
    main()
