"""On the demo model, whose held-out text shows what int8 costs with and without outliers in its activations."""

import functools
from pathlib import Path

import pytest

import slim
from benchmarks.outliers import PlantOutliers
from slim.passes import Quantize, SmoothQuant
from slim.runtime.perplexity import score, windows

MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
TOKENS = 6000
W8A8 = Quantize("int8", activations="int8", method="rtn")

pytestmark = pytest.mark.slow


@functools.cache
def nats(*passes) -> float:
    """Per token, on the first half of the held-out text; calibrated on the second."""
    from transformers import AutoTokenizer

    text = (MODEL / "heldout.txt").read_text()
    half = len(text) // 2
    calibration = [text[half + start : half + start + 1500] for start in range(0, 24 * 1500, 1500)]
    found = slim.compile(MODEL, passes=passes, calibration=calibration, target="eager")
    measured = score(found, windows(text[:half], AutoTokenizer.from_pretrained(MODEL), 256, max_tokens=TOKENS))
    return measured.nats / measured.tokens


@pytest.mark.parametrize(("factor", "least"), [(60.0, 0.05), (1000.0, 1.0)])
def test_naive_int8_loses_clearly_where_there_are_outliers_and_smoothing_brings_it_back(factor, least):
    exact, without = nats(), nats(W8A8)
    assert nats(PlantOutliers(factor)) == pytest.approx(exact, abs=1e-5)
    assert nats(PlantOutliers(factor), W8A8) > without + least
    for alpha in (0.5, "search"):
        assert nats(PlantOutliers(factor), SmoothQuant(alpha), W8A8) < without + 0.001


def test_smoothing_costs_nothing_where_there_are_no_outliers():
    assert nats(SmoothQuant(), W8A8) < nats(W8A8) + 0.001
