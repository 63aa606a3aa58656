"""How large the HTML report of a 30-layer model is, and how long a browser takes to open it.

    PYTHONPATH=. python benchmarks/report_page.py

A random Llama of SmolLM-135M's shape, fold_norms and quantize("int8"), generated code included. Needs a Chromium.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from slim.inspection.page import write_page
from slim.inspection.tell import tell
from tests.browser import Browser

CONFIG = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip
LOADED = "performance.timing.loadEventEnd - performance.timing.navigationStart"
DRAW = """(() => {
    const start = performance.now();
    open("%s");
    document.body.offsetHeight;
    return performance.now() - start;
})()"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        story = tell("135M", LlamaForCausalLM(CONFIG).eval(), 'fold_norms, quantize("int8")')
        compiled = time.perf_counter()
        file = write_page(story, Path(folder) / "report.html")
        print(f"compiled in {compiled - start:.1f} s, written in {time.perf_counter() - compiled:.1f} s")
        nodes = sum(len(program.graph.nodes) for program in story.programs)
        print(f"{file.stat().st_size:,} bytes, {nodes:,} nodes in three stages")
        with Browser(Path(folder) / "profile") as browser:
            browser.open(file)
            print(f"opened in {browser.run(LOADED)} ms")
            for tab in ("ir", "layers", "code", "roofline"):
                print(f"{tab}: {browser.run(DRAW.replace('%s', tab)):.0f} ms")


if __name__ == "__main__":
    main()
