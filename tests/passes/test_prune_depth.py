"""Prune(depth=): which blocks go, what follows, and what is refused."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import slim
from slim import errors
from slim.compiler.passes_base import Context
from slim.compiler.program import Program
from slim.compiler.stack import find_blocks
from slim.passes import Prune
from tests.lifting import lift_once
from tests.programs import TINY, randomised


def tokens() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 96, (2, 12), generator=generator) for _ in range(2)]


def tiny(architecture: str, layers: int = 3, **options: Any) -> Any:
    """A random model of a few layers."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {**TINY, "num_hidden_layers": layers, **options}
    if architecture == "gpt2":
        sizes = dict(n_embd=32, n_layer=layers, n_head=4, n_positions=64, vocab_size=96)
    kind = AutoModel if architecture == "bert" else AutoModelForCausalLM
    return randomised(kind.from_config(AutoConfig.for_model(architecture, **sizes)))


def without(model: Any, gone: tuple[int, ...]) -> Any:
    """The model without those layers, as one would do it by hand."""
    from torch import nn

    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    kept = [layer for index, layer in enumerate(stack) if index not in gone]
    del stack[:]
    stack.extend(kept)
    for layer in stack.modules():
        if hasattr(layer, "layer_idx"):
            layer.layer_idx = None
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "bert"])
def test_blocks_go_and_what_is_left_reloads_in_transformers(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    model = tiny(architecture)
    made = slim.compile(model, [Prune(depth=1)], calibration=tokens(), target="eager", verify=False)
    gone = tuple(int(name.rpartition(".")[2]) for name in made.report.passes[0].matched)
    assert len(gone) == 1
    assert len(find_blocks(made.program)) == 2
    assert sorted(int(node.kwargs["layer"]) for node in made.program.attention_nodes()) == [0, 1]
    made.export(tmp_path / "out")
    made.save(tmp_path / "saved")
    kind = AutoModel if architecture == "bert" else AutoModelForCausalLM
    there = kind.from_pretrained(tmp_path / "out").eval()
    ids = tokens()[0]
    with torch.no_grad():
        expected = there(input_ids=ids)[0]
        assert torch.allclose(without(model, gone)(input_ids=ids, use_cache=False)[0], expected, atol=1e-5)
        assert torch.allclose(made(input_ids=ids)[0], expected, atol=1e-5)
        assert torch.equal(slim.load(tmp_path / "saved", target="eager")(input_ids=ids)[0], made(input_ids=ids)[0])
        if architecture == "llama":
            assert torch.equal(slim.compile(there, target="eager")(input_ids=ids)[0], made(input_ids=ids)[0])
    if architecture == "gpt2":
        again = there.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(made.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), again)


# -- which -------------------------------------------------------------------------------------------------------------


@functools.cache
def idle(index: int) -> Program:
    """A Llama one of whose layers adds nothing; not to be changed."""
    model = tiny("llama", 4)
    with torch.no_grad():
        for linear in (model.model.layers[index].self_attn.o_proj, model.model.layers[index].mlp.down_proj):
            linear.weight.zero_()
    return lift_once(model)


@pytest.mark.parametrize("blocks", ["loss", "influence"])
def test_a_block_that_does_nothing_goes_first_and_nothing_is_lost(blocks: str) -> None:
    from slim.compiler.probe import make_probe

    before = idle(2)
    after = before.copy()
    report = Prune(depth=1, blocks=blocks).run(after, Context(calibration=tokens()))  # type: ignore[arg-type]
    assert report.matched == ["model.layers.2"]
    probe = make_probe(before)
    assert probe.error(probe.run(before), probe.run(after)) < 1e-6
    assert "model.layers.3.mlp.up_proj.weight" not in after.weights
    assert after.facts.config is not None
    assert after.facts.config["num_hidden_layers"] == 3


def test_protected_blocks_stay_and_shares_count_all() -> None:

    after = idle(2).copy()
    report = Prune(depth=0.5, protect=("model.layers.2.*", "model.layers.0.*")).run(
        after, Context(calibration=tokens())
    )
    assert len(report.matched) == 2
    assert not {"model.layers.0", "model.layers.2"} & set(report.matched)
    assert ("model.layers.2", "'model.layers.2.*' protects it") in report.skipped


def test_layers_that_differ_in_windows_keep_their_own() -> None:
    """Gemma 2 sees a window in every other layer, and its configuration has a list of which."""
    made = slim.compile(
        tiny("gemma2", sliding_window=4), [Prune(depth=1)], calibration=tokens(), target="eager", verify=False
    )
    kinds = made.program.facts.config["layer_types"]  # type: ignore[index]
    windows = [node.kwargs.get("window") is not None for node in made.program.attention_nodes()]
    assert [kind == "sliding_attention" for kind in kinds] == windows


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "must be said"),
        ({"ratio": 0.2, "depth": 1}, "two passes, one after the other"),
        ({"depth": 0}, "one block at least"),
        ({"depth": 1.5}, "share of them between 0 and 1"),
        ({"depth": 1, "criterion": "wanda"}, "takes whole blocks"),
        ({"depth": 1, "reload": False}, "takes whole blocks"),
        ({"ratio": 0.2, "blocks": "influence"}, "without depth="),
    ],
)
def test_options_that_make_no_sense_together_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(errors.SlimError, match=reason):
        Prune(**options)


def test_one_block_is_left_at_least() -> None:
    with pytest.raises(errors.BadPassOption, match="4 cannot go: of the model's 4 blocks one at least is left"):
        Prune(depth=4).run(idle(2).copy(), Context(calibration=tokens()))


def test_protected_blocks_are_counted_where_too_many_are_to_go() -> None:
    with pytest.raises(errors.BadPassOption, match="1 cannot go: of the model's 4 blocks 4 are protected"):
        Prune(depth=1, protect=("model.layers.*",)).run(idle(2).copy(), Context(calibration=tokens()))


def test_a_model_that_repeats_nothing_has_no_blocks() -> None:
    from torch import nn

    plain = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    with pytest.raises(errors.PassMatchedNothing, match="repeats no block"):
        slim.compile(
            plain, [Prune(depth=1)], calibration=[(torch.randn(4, 8),)], example_inputs=(torch.randn(2, 8),),
            target="eager",
        )  # fmt: skip


def test_its_text_is_read_back() -> None:
    from slim.passes import parse_pipeline

    assert repr(Prune(depth=2)) == "prune(depth=2)"
    assert parse_pipeline("prune(depth=2), prune(0.1)") == (Prune(depth=2), Prune(0.1))
