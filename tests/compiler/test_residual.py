"""The residual stream: found in the graph, written in another basis, and refused where its basis is not free."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from slim.compiler.passes_base import Context
from slim.compiler.probe import make_probe
from slim.compiler.program import Program
from slim.compiler.residual import NoStream, Stream, find_stream, turn, untie
from slim.compiler.verify import verify
from slim.passes import FoldNorms
from slim.passes.pruning.channels import by_chance, centre, delete, silence
from tests.programs import lifted, program

SIZES: dict[str, dict[str, Any]] = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}}
ARCHITECTURES = ("llama", "gpt2", "qwen2", "phi3", "gpt_neox", "opt", "mixtral", "gemma")


@functools.cache
def bared(name: str) -> tuple[Program, Program]:
    """A model, and the same with a head of its own and nothing in its norms. Neither is to be changed."""
    before = lifted(name, **SIZES.get(name, {}))
    after = before.copy()
    untie(after)
    FoldNorms().run(after, Context())
    after.clean()
    return before, after


def prepared(name: str) -> tuple[Program, Program, Stream, bool]:
    before, bare = bared(name)
    after = bare.copy()
    stream = find_stream(after)
    return before, after, stream, centre(after, stream)


def error(before: Program, after: Program) -> float:
    probe = make_probe(before)
    return probe.error(probe.run(before), probe.run(after))


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)).double()).Q


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_rotation_of_the_stream_changes_nothing(name: str) -> None:
    before, after, stream, _ = prepared(name)
    turned = rotation(stream.width)
    turn(after, stream, turned.T, turned)
    verify(after, "turned")
    assert error(before, after) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_deleting_channels_is_the_same_as_writing_zeros_to_them(name: str) -> None:
    _, after, stream, means = prepared(name)
    turned = rotation(stream.width)
    turn(after, stream, turned.T, turned)
    silence(after, stream, 24 - means)
    silent = after.copy()
    delete(after, stream, 24 - means, means)
    verify(after, "deleted")
    assert stream.width == 24
    assert all(after.weights.shape(name)[-1] == 24 for name in (*stream.columns, *stream.entries))
    assert error(silent, after) < 1e-5


def test_every_weight_of_a_llama_but_the_rotary_table_is_in_the_basis() -> None:
    _, after, stream, means = prepared("llama")
    assert not means
    assert set(stream.dims) == set(after.weights) - after.facts.constants
    assert len(stream.norms) == 5
    assert (len(stream.rows), len(stream.entries), len(stream.columns)) == (4, 1, 11)


def test_parallel_blocks_write_to_one_stream() -> None:
    _, _, stream, means = prepared("gpt_neox")
    assert means
    assert len(stream.norms) == 3
    assert len(stream.rows) == 2


def test_a_tied_head_gets_weights_of_its_own_and_the_configuration_says_so() -> None:
    made = lifted("gemma")
    before = made.parameters
    assert untie(made) == ["lm_head.weight"]
    assert made.parameters == before + 96 * 32
    assert made.facts.config is not None
    assert made.facts.config["tie_word_embeddings"] is False
    assert untie(made) == []


def test_norms_behind_linears_fix_the_basis_and_are_named() -> None:
    _, after = bared("gemma2")
    with pytest.raises(NoStream, match=r"post_feedforward_layernorm\.weight scales its channels one by one, in rms"):
        find_stream(after)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("y = aten.mul.Tensor(t, t)", "read one by one by aten.mul"),
        ("y = aten.tanh.default(t)", "read one by one by aten.tanh"),
        ("y = aten.add.Tensor(t, 1.0)", "read one by one by aten.add"),
        ("y = aten.slice.Tensor(t, 2, 0, 4)", "read one by one by aten.slice"),
        ("y = aten.view.default(t, [-1])", "read one by one by aten.view"),
        (
            "m = aten.linear.default(t, weights['m'])\ng = aten.silu.default(m)\n"
            "s = aten.add.Tensor(t, g)\ny = aten.linear.default(s, weights['m'])",
            "made by aten.silu",
        ),
        ("y = aten.clone.default(t)", "a result of the model"),
    ],
)
def test_what_works_on_channels_one_by_one_is_refused(lines: str, reason: str) -> None:
    body = f"t = aten.embedding.default(weights['table'], x)\n{lines}\nreturn (y,)"
    made = program(body, {"table": torch.randn(10, 8), "m": torch.randn(8, 8)}, inputs="x: i64[B, S]")
    with pytest.raises(NoStream, match=reason):
        find_stream(made)


def test_means_that_one_reader_takes_out_and_another_does_not_are_refused() -> None:
    body = """
        t = aten.embedding.default(weights['table'], x)
        n = slim.layer_norm.default(t, None, None, eps=1e-5)
        a = aten.linear.default(n, weights['w'])
        b = aten.linear.default(t, weights['m'])
        return (a, b)
    """
    weights = {"table": torch.randn(10, 8), "w": torch.randn(3, 8), "m": torch.randn(3, 8)}
    made = program(body, weights, inputs="x: i64[B, S]")
    with pytest.raises(NoStream, match="take the mean over its channels out"):
        centre(made, find_stream(made))


def test_a_model_without_tables_has_no_stream() -> None:
    made = program("y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": torch.randn(8, 8)})
    with pytest.raises(NoStream, match="no table of embeddings"):
        find_stream(made)


def test_chance_is_the_same_each_time() -> None:
    _, _, stream, _ = prepared("llama")
    assert torch.equal(by_chance(stream), by_chance(stream))
