"""What merging kv heads costs the demo model, beside the published recipes; nothing is trained."""

import functools
import sysconfig
from pathlib import Path

import torch

import slim
from slim.passes import GQA
from slim.runtime.perplexity import Passage, score, windows

MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
MODULES = ("argparse", "inspect", "typing", "pathlib", "tarfile", "ast", "dataclasses")  # none of heldout.txt


@functools.cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@functools.cache
def calibration() -> tuple[torch.Tensor, ...]:
    library = Path(sysconfig.get_path("stdlib"))
    text = "".join((library / f"{name}.py").read_text() for name in MODULES)
    found = windows(text, tokenizer(), 511, 16_500)
    return tuple(torch.tensor([passage.tokens]) for passage in found if len(passage.tokens) == 512)


@functools.cache
def held_out() -> list[Passage]:
    return windows((MODEL / "heldout.txt").read_text(), tokenizer(), 512, 4_000)


@functools.cache
def loss(pass_: GQA | None, sequences: int = 12) -> float:
    """Nats a token, of the model after ``pass_`` on so many sequences of calibration."""
    passes = [] if pass_ is None else [pass_]
    made = slim.compile(MODEL, passes=passes, calibration=list(calibration()[:sequences]), target="eager")
    found = score(made, held_out())
    return found.nats / found.tokens


def test_the_closed_forms_cost_a_fraction_of_the_published_recipes() -> None:
    before = loss(None)
    passes = (GQA(4, rounds=0), GQA(4, "procrustes"), GQA(4, "mean"))
    aligned, procrustes, mean = (loss(pass_) - before for pass_ in passes)
    assert 0.0 < aligned < 0.1 * mean
    assert aligned < procrustes / 2


def test_one_head_of_eight_costs_a_fifth_of_mean_pooling() -> None:
    before = loss(None)
    assert 0.0 < loss(GQA(1), sequences=24) - before < 0.2 * (loss(GQA(1, "mean")) - before)


def test_a_number_for_each_layer_costs_half_of_one_for_all() -> None:
    before = loss(None)
    assert loss(GQA("auto", kv_bytes=0.25, rounds=0)) - before < 0.6 * (loss(GQA(2, rounds=0)) - before)


def test_a_model_with_every_kv_head_twice_keeps_its_perplexity_to_the_third_decimal(shared: Path) -> None:
    from transformers import AutoTokenizer

    from slim.runtime.perplexity import pieces

    path, text = shared / "models" / "stories260K-mha", (shared / "text" / "tinystories_val.txt").read_text()
    compiled = slim.compile(path, passes=[GQA(4)], calibration=[text[-6_000:]], target="eager")
    passages = pieces(text, AutoTokenizer.from_pretrained(path), 512, "Once upon a time", 200)
    assert round(score(compiled, passages).perplexity, 3) == 3.559
