"""What pruning costs the demo model, beside the published criteria; nothing is trained."""

import functools
import sysconfig
from pathlib import Path

import torch

import slim
from slim.passes import Prune
from slim.runtime.perplexity import Passage, score, windows

MODEL = Path(__file__).resolve().parents[2] / "examples" / "demo_model"
MODULES = ("argparse", "inspect", "typing", "pathlib", "tarfile", "ast")  # none of heldout.txt


@functools.cache
def texts() -> tuple[tuple[torch.Tensor, ...], list[Passage]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    library = Path(sysconfig.get_path("stdlib"))
    text = "".join((library / f"{name}.py").read_text() for name in MODULES)
    found = windows(text, tokenizer, 511, 6_000)
    calibration = tuple(torch.tensor([passage.tokens]) for passage in found if len(passage.tokens) == 512)
    return calibration, windows((MODEL / "heldout.txt").read_text(), tokenizer, 512, 4_000)


@functools.cache
def loss(pass_: Prune | None) -> float:
    """Nats a token."""
    calibration, held_out = texts()
    passes = [] if pass_ is None else [pass_]
    found = score(slim.compile(MODEL, passes, calibration=list(calibration), target="eager", verify=False), held_out)
    return found.nats / found.tokens


def test_a_fifth_of_the_blocks_costs_less_than_half_of_what_published_criteria_lose() -> None:
    before = loss(None)
    obs, wanda, flap = (loss(Prune(0.2, name)) - before for name in ("obs", "wanda", "flap"))
    assert 0.0 < obs < 0.45 * min(wanda, flap)


def test_rotated_channels_cost_a_fraction_of_channels_as_they_are_and_the_fit_makes_up_for_more() -> None:
    before = loss(None)
    fitted, bare, magnitude = (
        loss(Prune(0.2, units="channels", **options)) - before  # type: ignore[arg-type]
        for options in ({}, {"refit": False}, {"criterion": "magnitude"})
    )
    assert 0.0 < fitted < 0.9 * bare
    assert bare < 0.3 * magnitude
