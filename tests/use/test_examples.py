"""The pass that the documentation teaches runs, and is the one that it shows."""

import re
from pathlib import Path

import pytest
import torch

from examples.write_a_pass import Sparsify
from slim import errors
from slim.compiler.lift import lift
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.passes import Quantize
from tests.programs import model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = (ROOT / "examples" / "write_a_pass.py").read_text(encoding="utf-8")


def test_the_page_shows_the_example_word_for_word():
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "write_a_pass.md").read_text(), re.DOTALL)
    assert shown in EXAMPLE
    assert len(EXAMPLE.splitlines()) <= 45


def test_the_example_zeroes_its_share_of_every_linear_and_composes():
    after, report = run_pipeline(lift(model("llama")), [Sparsify(0.25), Quantize("int8")], Context())
    first, second = report.passes
    assert repr(Sparsify(0.25)) == "sparsify(0.25)"
    assert len(first.matched) == 15
    assert 0 < first.error < 1
    zeros = [(after.weights[name] == 0).float().mean() for name in first.matched]
    assert all(share >= 0.25 for share in zeros)
    assert set(first.matched) <= set(second.matched)
    assert torch.isfinite(torch.tensor(first.drift))


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5])
def test_the_example_refuses_a_share_that_is_none(share):
    with pytest.raises(errors.BadPassOption, match="between 0 and 1"):
        Sparsify(share)
