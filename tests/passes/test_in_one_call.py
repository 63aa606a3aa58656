"""Prune, GQA, SmoothQuant and int8 rows and weights in one call: it runs, is saved, loaded again and exported."""

from pathlib import Path

import pytest
import torch

import slim
from slim import errors
from slim.passes import GQA, Prune, Quantize, SmoothQuant
from tests.compiled import difference
from tests.programs import model

HEADS = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=4)


def tokens() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 96, (2, 24), generator=generator) for _ in range(4)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_four_passes_in_one_call_are_saved_and_exported(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    given = model(architecture, **{**HEADS, "num_hidden_layers": 1})
    passes = [Prune(0.2, units="neurons"), GQA(2), SmoothQuant(), Quantize("int8", activations="int8", static=True)]
    made = slim.compile(given, passes, calibration=tokens(), target="eager")
    assert [report.error is not None and report.error < 2.0 for report in made.report.passes] == [True] * 4
    config = made.program.facts.config
    assert config is not None
    assert config["intermediate_size"] <= 40
    assert config["num_key_value_heads"] == 2
    ids = tokens()[0]
    made.save(tmp_path / "saved")
    again = slim.load(tmp_path / "saved", target="eager")
    with torch.no_grad():
        expected = made(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, expected)
    assert torch.equal(again.generate(ids, max_new_tokens=3), made.generate(ids, max_new_tokens=3))
    with pytest.raises(errors.ExportUnsupported, match="plain transformers has no such format"):
        made.export(tmp_path / "plain")
    made.export(tmp_path / "out", format="compressed-tensors")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert difference(there(input_ids=ids).logits, expected) < 1e-5
