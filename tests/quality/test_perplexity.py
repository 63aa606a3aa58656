"""Real models on real text: the protocol of ../shared/README.md, 200 pieces of TinyStories' validation split."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slim
from slim.runtime.perplexity import pieces, score

PUBLISHED = {"stories260K": 3.559, "babyllama361": 1.638}
IN_A_FRESH_PROCESS = """
import json, sys, slim, torch
from transformers import AutoTokenizer
from slim.runtime.perplexity import pieces, score
torch.set_num_threads(1)
text, found = open(sys.argv[1]).read(), []
for artifact in sys.argv[2:]:
    model = slim.load(artifact)
    context = model.config.max_position_embeddings
    passages = pieces(text, AutoTokenizer.from_pretrained(artifact), context, "Once upon a time", 200)
    found.append(score(model, passages).perplexity)
print(json.dumps(found))
"""


def perplexity(model: slim.CompiledModel, text: Path, count: int = 200, source: Path | None = None) -> float:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source or model.name_or_path)
    context = model.config.max_position_embeddings
    return score(model, pieces(text.read_text(), tokenizer, context, "Once upon a time", count)).perplexity


def test_lift_fold_save_and_load_keep_the_perplexity_to_the_third_decimal(shared: Path, tmp_path: Path) -> None:
    text = shared / "text" / "tinystories_val.txt"
    saved = []
    for name, published in PUBLISHED.items():
        model = shared / "models" / name
        folded = slim.compile(model, passes="fold_norms")
        folded.save(tmp_path / name)
        saved.append(perplexity(folded, text))
        assert round(perplexity(slim.compile(model), text), 3) == published, name
        assert round(saved[-1], 3) == published, name
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, text, *(tmp_path / name for name in PUBLISHED)]
    loaded = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert loaded == saved


def test_int8_weights_cost_less_than_half_a_percent_of_perplexity_and_more_than_nothing(shared: Path) -> None:
    model, text = shared / "models" / "stories260K", shared / "text" / "tinystories_val.txt"
    quantised = perplexity(slim.compile(model, passes='quantize("int8")'), text)
    assert PUBLISHED["stories260K"] < quantised < PUBLISHED["stories260K"] * 1.005


def naive_int4(model: torch.nn.Module, names: list[str]) -> None:
    """Rounds weights in place: four bits, one scale a row, max|w| / 7."""
    for name in names:
        weight = model.get_parameter(name).data
        scale = weight.abs().amax(-1, keepdim=True) / 7
        weight.copy_((weight / scale).round() * scale)


def test_int4_in_groups_costs_some_percent_of_perplexity_and_less_than_one_scale_a_row(shared: Path) -> None:
    from transformers import AutoModelForCausalLM

    path, text = shared / "models" / "babyllama361", shared / "text" / "tinystories_val.txt"
    original = perplexity(slim.compile(path, target="eager"), text, 40)
    grouped = slim.compile(path, passes='quantize("int4", group_size=32)', target="eager")
    in_groups = perplexity(grouped, text, 40)
    assert grouped.report.passes[0].skipped == []
    model = AutoModelForCausalLM.from_pretrained(path)
    naive_int4(model, grouped.report.passes[0].matched)
    by_row = perplexity(slim.compile(model, target="eager"), text, 40, path)
    assert original < in_groups < original * 1.06
    assert in_groups < by_row


@pytest.mark.parametrize(
    ("name", "dtype", "most"),
    [
        ("stories260K", "int8", 1.001),
        ("stories260K", "int4", 1.01),
        ("babyllama361", "int8", 1.001),
        ("babyllama361", "int4", 1.01),
    ],
)
def test_a_quantised_cache_costs_a_thousandth_of_perplexity_in_int8_and_a_hundredth_in_int4(
    name: str, dtype: str, most: float, shared: Path
) -> None:
    model, text = shared / "models" / name, shared / "text" / "tinystories_val.txt"
    other = text.read_text().split("Once upon a time")[301:401]  # none of the 200 that are measured
    quantised = slim.compile(model, passes=f'quantize_kv("{dtype}")', calibration=other)
    assert perplexity(quantised, text) < PUBLISHED[name] * most


def test_the_demo_model_keeps_keys_of_two_layers_in_int4_and_loses_less_than_a_hundredth() -> None:
    import argparse
    import inspect

    from transformers import AutoTokenizer

    from slim.runtime.perplexity import windows

    model = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
    passages = windows((model / "heldout.txt").read_text(), AutoTokenizer.from_pretrained(model), 512, 8000)
    code = [inspect.getsource(module) for module in (argparse, inspect)]
    quantised = slim.compile(model, passes='quantize_kv("int4")', calibration=code)
    assert [slot.key_bits for slot in quantised.slots] == [4, 4, 8, 8]
    assert [slot.value_bits for slot in quantised.slots] == [4] * 4
    plain = score(slim.compile(model), passages).perplexity
    assert plain < score(quantised, passages).perplexity < plain * 1.01
