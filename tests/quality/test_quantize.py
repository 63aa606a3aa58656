"""What quantisation costs on real models: each number format and method against rounding to nearest."""

import functools
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import slim
from slim.passes import Quantize
from slim.runtime.perplexity import pieces, score

MARKER, SCORED, CALIBRATED = "Once upon a time", 40, 100

pytestmark = pytest.mark.slow


@functools.cache
def nats(path: Path, text: Path, *passes) -> float:
    """Per token, on the first pieces of the text; calibrated on pieces behind all that the protocol scores."""
    stories = text.read_text().split(f"\n{MARKER}")[1:]
    calibration = [MARKER + story for story in stories[300 : 300 + CALIBRATED]]
    compiled = slim.compile(path, passes=passes, calibration=calibration if passes else None, target="eager")
    length = compiled.config.max_position_embeddings
    found = score(compiled, pieces(text.read_text(), AutoTokenizer.from_pretrained(path), length, MARKER, SCORED))
    return found.nats / found.tokens


@pytest.mark.parametrize(("name", "weights"), [("babyllama361", "int4"), ("stories260K", "int3")])
def test_the_default_loses_less_than_half_of_what_rounding_to_nearest_does(shared: Path, name: str, weights) -> None:
    model, text = shared / "models" / name, shared / "text" / "tinystories_val.txt"
    exact = nats(model, text)
    nearest, best = (nats(model, text, Quantize(weights, method=method)) - exact for method in ("rtn", None))
    assert best < 0.5 * nearest


def test_int8_weights_and_rows_cost_less_than_a_fifth_of_a_percent(shared: Path) -> None:
    model, text = shared / "models" / "babyllama361", shared / "text" / "tinystories_val.txt"
    assert nats(model, text, Quantize("int8", activations="int8")) < nats(model, text) + 0.002
