"""Orders of passes that cannot be right are refused before anything runs; those that can are let through."""

import pytest

from slim import errors
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import check_order, run_pipeline
from slim.compiler.program import Program
from slim.passes import PASSES, as_passes, parse_pipeline
from tests.compiled import lifted

WRONG = {
    'quantize("int8"), gqa(2)': "float weights",
    'quantize("int8"), prune(0.2)': "float weights",
    'quantize("int8"), low_rank(0.8)': "float weights",
    'quantize("int8"), smooth_quant(0.5)': "float weights",
    'quantize("int8"), fold_norms': "float weights",
    'quantize("int8"), quantize("int4")': "float weights",
    'smooth_quant(0.5), fold_norms': "no smoothing",
    'quantize_kv("int8"), gqa(2)': "keys and values in floating point",
    'quantize_kv("int8"), prune(0.2)': "keys and values in floating point",
    'sparse_attention("window", window=8), gqa(2)': "heads that no pattern tells apart",
    'sparse_attention("window", window=8), prune(0.2)': "heads that no pattern tells apart",
    "low_rank(0.8), gqa(2)": "linears that are in one piece",
}  # fmt: skip
RIGHT = (
    'fold_norms, prune(0.2), gqa(2), low_rank(0.8), smooth_quant(0.5), quantize("int8"), quantize_kv("int8"), heal(10)',
    'quantize_kv("int8"), smooth_quant(0.5), quantize("int8", activations="int8")',
    'gqa(2), low_rank(0.8), sparse_attention("auto"), smooth_quant(0.5), quantize("int4"), quantize_kv("int8")',
    'gqa(2), heal(10), prune(0.2), heal(10), quantize("int4"), heal(10)',
)


@pytest.fixture(scope="module")
def llama() -> Program:
    return lifted("llama")


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_order_is_refused_with_the_reason_before_calibration_is_missed(llama: Program, text: str) -> None:
    with pytest.raises(errors.PassOrder, match=WRONG[text]) as raised:
        run_pipeline(llama, parse_pipeline(text), Context())
    first, _, last = text.rpartition(", ")
    assert last in str(raised.value)
    assert first in str(raised.value)


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_order_is_refused_before_there_is_a_model(text: str) -> None:
    with pytest.raises(errors.PassOrder, match=WRONG[text]):
        as_passes(text)


@pytest.mark.parametrize("text", RIGHT)
def test_a_right_order_is_let_through(llama: Program, text: str) -> None:
    check_order(parse_pipeline(text), llama)


def test_every_pass_stands_in_some_order_of_this_file() -> None:
    named = {pass_.name for text in RIGHT for pass_ in parse_pipeline(text)}
    assert named >= PASSES.keys()
