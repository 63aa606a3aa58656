"""CTranslate2; its ``int8`` quantises activations too, token by token."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import ctranslate2
from protocol import Clock, Setup, require_one


def convert(setup: Setup) -> None:
    """Writes CTranslate2's own directory."""
    converter = ctranslate2.converters.TransformersConverter(str(setup.model), low_cpu_mem_usage=True)
    converter.convert(str(setup.converted), quantization=setup.precision, force=True)


class Engine:
    """A CTranslate2 generator."""

    def __init__(self, setup: Setup) -> None:
        self.versions = {"ctranslate2": version("ctranslate2")}
        self.nbytes = _matrix_bytes(json.loads((setup.model / "config.json").read_text()))
        self._words = json.loads((setup.converted / "vocabulary.json").read_text())
        self._generator = ctranslate2.Generator(
            str(setup.converted), device="cpu", compute_type=setup.precision, intra_threads=setup.threads,
            inter_threads=1,
        )  # fmt: skip

    def run(self, prompt: list[int], new: int, batch: int) -> Clock:
        require_one(batch)
        clock = Clock()

        def note(step: Any) -> bool:
            clock.token(step.token_id)
            return False  # go on

        words = [self._words[token] for token in prompt]
        clock.begin()
        self._generator.generate_batch(
            [words], max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False, callback=note
        )
        return clock


def _matrix_bytes(config: dict[str, Any]) -> int:
    """One byte a weight and a float32 scale a row; the file says no more."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width, shared = heads * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    layer = [(width, hidden), (shared, hidden), (shared, hidden), (hidden, width)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    matrices = [*layer * config["num_hidden_layers"], (config["vocab_size"], hidden)]
    return sum(rows * columns + 4 * rows for rows, columns in matrices)
