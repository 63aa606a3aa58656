"""LowRank of tables of embeddings, and of heads tied to them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slim
from slim import errors
from slim.compiler.lift import lift
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.program import Program
from slim.compiler.report import Report
from slim.passes import LowRank, Quantize
from tests import compiled, programs

TOKENS = [torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(i)) for i in range(3)]
TABLES = LowRank(0.7, embeddings=True, head=True, multiple=4, exclude=("*layers*",))


def factored(program: Program, pass_: LowRank, calibration: Any = TOKENS) -> tuple[Program, Report]:
    after, report = run_pipeline(program, [pass_], Context(calibration=calibration))
    return after, report.passes[0]


class Looks(nn.Module):
    """A table of a low rank, and a linear."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.last = nn.Embedding(80, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(80, rank) @ torch.randn(rank, 32))

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.tanh(self.table(ids)))


IDS = [torch.randint(0, 80, (4, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_a_table_of_a_low_rank_loses_nothing() -> None:
    pass_ = LowRank(0.5, embeddings=True, exclude=("last.weight",), multiple=8)
    after, report = factored(lift(Looks(8), IDS[0]), pass_, IDS)
    assert report.matched == ["table.weight"]
    assert report.error is not None
    assert report.error < 1e-4
    assert {name: tuple(after.weights[name].shape) for name in after.weights if "table" in name} == {
        "table.weight_rows": (80, 8),
        "table.weight_widen": (32, 8),
    }


def test_rows_count_as_often_as_they_are_looked_up() -> None:
    """Half of a table lies where the other half does not: the one that calibration shows is kept."""
    model = Looks(32)
    with torch.no_grad():
        model.table.weight[:40, 16:] = 0.0
        model.table.weight[40:, :16] = 0.0
    halves = [[ids % 40 + start for ids in IDS] for start in (0, 40)]
    pass_ = LowRank(0.75, embeddings=True, exclude=("last.weight",), multiple=16)

    def loss(shown: list[Tensor], asked: list[Tensor]) -> float:
        after, _ = factored(lift(model, shown[0]), pass_, shown)
        return float((after.run(asked[0])[0] - model(asked[0]).detach()).square().sum())

    for this, other in (halves, halves[::-1]):
        assert loss(this, this) < 0.1 * loss(other, this)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("llama", "*layers*"), ("gpt2", "*.h.*"), ("gemma", "*layers*"), ("opt", "*layers*"), ("bert", "*layer.*")],
)
def test_tables_hold_the_share_they_are_given(name: str, layers: str) -> None:
    """Untied; tied, and positions; scaled by its width; positions with an offset; three in a sum."""
    program = programs.lifted(name) if name in ("llama", "gpt2", "gemma") else compiled.lifted(name)
    head = name in ("gpt2", "gemma", "opt")
    after, report = factored(program, LowRank(0.7, embeddings=True, head=head, multiple=4, exclude=(layers,)))
    assert [key for key in after.weights if key.endswith("_rows")]
    assert report.error is not None
    assert report.error > 0.0
    kept = [site for site, reason in report.skipped if "worth more" in reason]
    whole = sum(program.weights.nbytes(key) for key in (*report.matched, *kept))
    biases = sum(after.weights.nbytes(key) for key in after.weights if key.endswith("_bias"))
    assert whole - (program.nbytes - after.nbytes) <= 0.7 * whole + biases


def test_a_tied_head_reads_the_rows_that_are_looked_up(tmp_path: Path) -> None:
    model = programs.model("llama", num_hidden_layers=1, tie_word_embeddings=True)
    done = slim.compile(model, [TABLES, Quantize("int8", embeddings=True)], calibration=TOKENS, target="eager")
    table = "model.embed_tokens.weight"
    assert {name for name in done.program.weights if table in name and not name.endswith("_scale")} == {
        f"{table}_rows", f"{table}_widen", f"{table}_narrow"
    }  # fmt: skip
    assert any("embedding and head at once" in note for note in done.report.passes[0].notes)
    prompt = torch.randint(3, 90, (1, 7))
    expected = done.generate(prompt, max_new_tokens=4, do_sample=False)
    done.save(tmp_path / "out")
    again = slim.load(tmp_path / "out", target="eager")
    assert torch.equal(again.generate(prompt, max_new_tokens=4, do_sample=False), expected)


def test_gradients_are_what_weighs_tables() -> None:
    with pytest.raises(errors.ContradictoryOptions, match='method="svd"'):
        LowRank(0.7, "svd", embeddings=True)
    with pytest.raises(errors.ContradictoryOptions, match='importance="none"'):
        LowRank(0.7, importance="none", embeddings=True)
    tied = programs.lifted("llama", num_hidden_layers=1, tie_word_embeddings=True)
    with pytest.raises(errors.ContradictoryOptions, match=r"it is the table model\.embed_tokens\.weight too"):
        factored(tied, LowRank(0.7, importance="none", head=True))
    with pytest.raises(errors.ContradictoryOptions, match="embedding and head at once"):
        factored(tied, LowRank(0.7, embeddings=True))
