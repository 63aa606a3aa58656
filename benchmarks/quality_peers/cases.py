"""The models, what they are calibrated on, and what they are scored on: token ids that all engines share."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slim.runtime.perplexity import Passage, pieces, windows

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
DEMO = ROOT / "examples" / "demo_model"
CALIBRATION = 128  # sequences
# Standard modules that the demo model's held-out text, which is of other ones, is like.
_MODULES = (
    "argparse", "ast", "configparser", "difflib", "doctest", "inspect", "optparse", "pathlib", "pickle", "smtplib",
    "statistics", "subprocess", "tarfile", "threading", "typing", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and its texts.

    Attributes:
        model: a transformers directory.
        odd: weights whose rows 32 does not divide, by pattern; in groups of 32 all engines leave them alone.
        calibration: token ids, one sequence each.
        passages: what is predicted, as ``slim.runtime.perplexity`` cut it.
    """

    name: str
    model: Path
    odd: tuple[str, ...]
    calibration: tuple[tuple[int, ...], ...]
    passages: tuple[Passage, ...]

    def tensors(self) -> list[torch.Tensor]:
        """The calibration as ``slim.compile`` takes it."""
        return [torch.tensor([ids]) for ids in self.calibration]

    def write(self, path: Path) -> None:
        """Leaves the tokens where workers read them."""
        passages = [[passage.tokens, passage.nbytes] for passage in self.passages]
        path.write_text(json.dumps({"calibration": self.calibration, "passages": passages}))


def read(path: Path) -> tuple[list[list[int]], list[Passage]]:
    """Calibration and passages that ``Case.write`` left."""
    told = json.loads(path.read_text())
    return told["calibration"], [Passage(tuple(tokens), nbytes) for tokens, nbytes in told["passages"]]


def demo(calibration: int = CALIBRATION) -> Case:
    """The demo model on its held-out text, calibrated on other modules of Python's library."""
    tokenizer = _tokenizer(DEMO)
    library = Path(sysconfig.get_path("stdlib"))
    text = "\n\n".join((library / f"{name}.py").read_text() for name in _MODULES)
    other = windows(text, tokenizer, 512, max_tokens=512 * calibration)
    held_out = windows((DEMO / "heldout.txt").read_text(), tokenizer, 512)
    return _case("demo", DEMO, (), other, held_out)


def shared(name: str, odd: tuple[str, ...] = (), calibration: int = CALIBRATION) -> Case:
    """A model of ../shared on 200 stories, calibrated on those after them."""
    model = SHARED / "models" / name
    tokenizer = _tokenizer(model)
    context = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    text = (SHARED / "text" / "tinystories_val.txt").read_text()
    found = pieces(text, tokenizer, context, "Once upon a time", 200 + calibration)
    return _case(name, model, odd, found[200:], found[:200])


CASES: dict[str, Callable[..., Case]] = {
    "demo": demo,
    "babyllama361": partial(shared, "babyllama361"),
    "stories260K": partial(shared, "stories260K", ("*.down_proj.weight",)),
}


def _case(name: str, model: Path, odd: tuple[str, ...], other: list[Passage], held_out: list[Passage]) -> Case:
    return Case(name, model, odd, tuple(passage.tokens for passage in other), tuple(held_out))


def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
