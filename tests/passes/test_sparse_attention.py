"""SparseAttention: what it writes into the graph, what that computes, and what it refuses."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import slim
from slim import errors
from slim.codegen import build
from slim.compiler.patterns import read_pattern
from slim.compiler.rules import argument
from slim.compiler.statistics import read_calibration
from slim.compiler.statistics.attention import kept_attention
from slim.passes import SparseAttention
from slim.passes.sparsity.auto import SETTINGS, candidates
from slim.passes.sparsity.kinds import KINDS
from tests.compiled import difference, pair
from tests.programs import model

TOKENS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
TARGET = "eager" if build.missing() else "cpu"


def patterns(compiled: slim.CompiledModel) -> list[str | None]:
    return [argument(node, "pattern") for node in compiled.program.attention_nodes()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_published_pattern_is_text_that_is_read_back_and_a_picture(kind: str) -> None:
    sparse = SparseAttention(kind)
    assert SparseAttention(sparse.text()).text() == sparse.text()
    rows = sparse.picture(12).splitlines()[-12:]
    assert all(row[place] == "█" for place, row in enumerate(rows))  # a query sees itself


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(pattern="windw"), "none of dense"), (dict(pattern="window", stride=4), "no such option"),
        (dict(pattern="auto", window=4), "no such option"), (dict(pattern="auto", mass=1.0), "between 0 and 1"),
        (dict(skip=2.0), "between 0 and 1"), (dict(pattern="dense"), "changes nothing without skip"),
        (dict(pattern="columns(4)"), "would see no key"), (dict(window=0), "'window': it is a whole number"),
        (dict(pattern="window(8)", sinks=2), "no such option"), (dict(pattern="auto", sinks=-1), "'sinks'"),
        (dict(pattern="0-3: dense; 4: dense"), "changes nothing without skip"), (dict(layers=()), "names no layer"),
        (dict(pattern="block_topk", share=0), "'share'"), (dict(window=True), "'window'"),
        (dict(pattern="bigbird", random_blocks=2.5), "'random_blocks'"), (dict(window=1 << 40), "'window'"),
        (dict(pattern="fixed", block=8, summary=20), "more than the block's 8"),
        (dict(pattern="window(2**40)"), "written out"), (dict(pattern="window(1, 2)"), "number of values"),
    ],
)  # fmt: skip
def test_options_without_sense_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(errors.BadPassOption, match=match):
        SparseAttention(**options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_as_long_as_it_takes_to_see_what_is_left_out(kind: str) -> None:
    title, *rows = SparseAttention(kind).picture().splitlines()
    assert "keys a character" in title
    assert len(rows) == 32
    below = "".join(row[:place] for place, row in enumerate(rows))
    assert below.count("·") + below.count("▒") > 0.2 * len(below)
    assert SparseAttention(kind, skip=0.1).picture() == SparseAttention(kind).picture()


def test_a_picture_of_what_is_not_there_is_refused() -> None:
    by_head = SparseAttention("0: dense; 1: window(4)")
    assert by_head.picture(8, head=1) == SparseAttention(window=4, sinks=0).picture(8)
    for tokens, head, match in ((-1, 0, "no number of tokens"), (8, 2, "no head of 2"), (8, -1, "no head")):
        with pytest.raises(errors.BadInput, match=match):
            by_head.picture(tokens, head)
    with pytest.raises(errors.BadPassOption, match="chooses on calibration data"):
        SparseAttention("auto").picture()


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(errors.BadPassOption, match="no attention of layer 7"):
        slim.compile(model("llama"), [SparseAttention(layers=(0, 7))], target="eager")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "gpt_neox", "qwen3", "mixtral"])
def test_a_pattern_is_what_the_program_computes_on_any_model(architecture: str) -> None:
    made = pair(architecture)[0] if architecture in ("gpt_neox", "qwen3") else model(architecture)
    compiled = slim.compile(made, "sparse_attention(window=6, sinks=2)", target=TARGET)
    assert set(patterns(compiled)) == {"window(6) | columns(2)"}
    eager = slim.CompiledModel(compiled.program.copy(), "eager")
    assert difference(compiled(TOKENS).logits, eager(TOKENS).logits) < 1e-4
    first = compiled(TOKENS[:, :20], use_cache=True)
    rest = compiled(TOKENS[:, 20:], past_key_values=first.past_key_values).logits
    assert difference(torch.cat([first.logits, rest], 1), eager(TOKENS).logits) < 1e-4
    dense = slim.compile(made, target="eager", verify=False)
    assert difference(dense(TOKENS[:, :6]).logits, compiled(TOKENS[:, :6]).logits) < 1e-4  # all in the window
    assert difference(dense(TOKENS).logits, compiled(TOKENS).logits) > 1e-4


@pytest.mark.parametrize("pattern", ["window=6, sinks=2", '"block_topk", block=5, share=2'])
def test_mpt_counts_tokens_from_the_first_real_one(pattern: str) -> None:
    """It casts its additive mask to what is hidden, which is slim's causality and padding all the same."""
    compiled = slim.compile(pair("mpt")[0], f"sparse_attention({pattern})", target="eager")
    assert all(argument(n, "causal") and argument(n, "key_mask") for n in compiled.program.attention_nodes())
    mask = torch.ones_like(TOKENS)
    mask[0, :17] = 0
    padded = compiled(TOKENS, attention_mask=mask).logits[0, 17:]
    assert difference(padded, compiled(TOKENS[:1, 17:]).logits[0]) < 1e-5


def test_an_encoder_sees_a_window_in_both_directions() -> None:
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=96)
    encoder = BertModel(BertConfig(**sizes)).eval()
    compiled = slim.compile(encoder, 'sparse_attention("longformer", window=4, global_tokens=1)', target=TARGET)
    assert set(patterns(compiled)) == {"window(4) | columns(1) | rows(1)"}
    found = compiled(input_ids=TOKENS).last_hidden_state
    eager = slim.CompiledModel(compiled.program.copy(), "eager")
    assert difference(found, eager(input_ids=TOKENS).last_hidden_state) < 1e-4
    with pytest.raises(errors.PassMatchedNothing, match="looks at later tokens"):
        slim.compile(encoder, 'sparse_attention("block_topk")', target="eager")


@pytest.mark.parametrize(
    "target",
    ["eager", pytest.param("cpu", marks=pytest.mark.skipif(build.missing() is not None, reason="no C++ here"))],
)
@pytest.mark.parametrize("tokens", [12, 70])
def test_a_row_of_few_tokens_votes_beside_a_long_one_as_it_does_alone(target: str, tokens: int) -> None:
    compiled = slim.compile(
        model("llama", max_position_embeddings=256),
        'sparse_attention("vertical_slash", columns=3, slashes=2)',
        target=target,
    )
    rows = torch.randint(3, 96, (2, 90), generator=torch.Generator().manual_seed(3))
    mask, positions = torch.ones_like(rows), torch.arange(90).repeat(2, 1)
    mask[0, : 90 - tokens], positions[0] = 0, (torch.arange(90) - 90 + tokens).clamp_min(0)
    with torch.no_grad():
        beside = compiled(rows, attention_mask=mask, position_ids=positions).logits[0, -tokens:]
        assert difference(beside, compiled(rows[:1, -tokens:]).logits[0]) < 1e-5


DATA = [torch.randint(3, 96, (4, 48), generator=torch.Generator().manual_seed(2))]


def auto(options: str, of: torch.nn.Module | None = None) -> slim.CompiledModel:
    return slim.compile(of or model("llama"), f'sparse_attention("auto", {options})', calibration=DATA, target="eager")


def test_auto_gives_each_head_a_wider_window_the_more_it_must_keep() -> None:
    few, much = (auto(f'mass={mass}, among=("window",)') for mass in (0.3, 0.7))
    assert patterns(few) != patterns(much)
    assert all(text and "columns(4)" in text for text in patterns(few))
    first, *layers = few.report.passes[0].notes
    assert "each head keeps 30% of its attention" in first
    assert layers[:2] == [f"attention of layer {i}, heads {text}" for i, text in enumerate(patterns(few))]
    with pytest.raises(errors.NeedsCalibration):
        slim.compile(model("llama"), 'sparse_attention("auto")', target="eager")
    with pytest.raises(errors.PassMatchedNothing, match="nothing that reads fewer keys keeps"):
        auto("mass=0.999999")


@pytest.mark.parametrize("mass", [0.3, 0.5])
def test_auto_gives_each_head_what_reads_fewest_keys_of_all_that_keep_enough(mass: float) -> None:
    compiled = auto(f"mass={mass}")
    dense = slim.compile(model("llama"), target="eager").program
    batches = read_calibration(dense, DATA).batches
    for node, text in zip(dense.attention_nodes(), patterns(compiled), strict=True):
        tried = candidates(True, None, 48, tuple(SETTINGS), sinks=4)
        kept = kept_attention(dense, [node], batches, [each.text for each in tried])[node]
        for head, shares in enumerate(kept.tolist()):
            terms = read_pattern(text or "dense").of(head)
            chosen = next(each for each in tried if each.terms == terms)
            enough = [each for each, share in zip(tried, shares, strict=True) if share >= mass - 1e-6]
            assert chosen in enough
            assert chosen.reads == min(each.reads for each in enough if each.top in (None, chosen.top))


class Alike(torch.nn.Module):
    """One head looks at tokens like its own, wherever they are; the other at near ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        place = torch.arange(tokens, dtype=x.dtype).expand(batch, tokens)[..., None] / 4
        near = torch.cat([place, torch.ones_like(place), x[..., 2:] * 0], -1)
        query = torch.cat([torch.ones_like(place), place * 0, x[..., 2:] * 0], -1)
        q, k = torch.stack([x, query], 1), torch.stack([x, near], 1)
        found = torch.nn.functional.scaled_dot_product_attention(
            q, k, torch.stack([x, x], 1), is_causal=True, scale=1.0
        )
        return found.transpose(1, 2).reshape(batch, tokens, 2 * width)


def test_auto_gives_a_head_that_looks_far_blocks_and_one_that_looks_near_a_window() -> None:
    kinds = torch.eye(16)[torch.randint(16, (1, 32), generator=torch.Generator().manual_seed(3))]
    x = 3.0 * kinds.repeat_interleave(16, 1)
    compiled = slim.compile(Alike(), 'sparse_attention("auto")', example_inputs=(x,), calibration=[(x,)], target=TARGET)
    assert patterns(compiled) == ["0: top(16, 16) | columns(4); 1: window(16) | columns(4)"]
    assert difference(compiled(x), Alike()(x)) < 0.1
    with pytest.raises(errors.BadPassOption, match="among"):
        SparseAttention("auto", among=("vertical_slash",)).check()


def test_a_pattern_that_names_other_heads_than_there_are_is_refused() -> None:
    with pytest.raises(errors.PassMatchedNothing, match="it has 4 heads, and the pattern names 2"):
        slim.compile(model("llama"), 'sparse_attention("0: dense; 1: window(5)")', target="eager")


@pytest.mark.parametrize("window", [4, 30, 100])
def test_the_report_says_how_far_a_window_moves_the_output_that_is_wider_than_a_short_prompt(window: int) -> None:
    looks = model("llama", max_position_embeddings=256)
    compiled = slim.compile(looks, f'sparse_attention("window({window})")', target="eager")
    assert compiled.report.passes[0].error > 1e-3


def test_a_pattern_that_no_probe_shows_says_so() -> None:
    compiled = slim.compile(model("llama"), 'sparse_attention("window(100)")', target="eager")
    assert compiled.report.passes[0].error == 0.0
    assert any("did not move on the probe, of 64 tokens" in note for note in compiled.report.passes[0].notes)


def test_it_is_done_once() -> None:
    with pytest.raises(errors.PassMatchedNothing, match=r"keeps window\(5\) already"):
        slim.compile(model("llama"), 'sparse_attention("window(5)"), sparse_attention(window=9)', target="eager")


def test_an_artifact_remembers_and_an_export_refuses(tmp_path: Path) -> None:
    passes = (
        'sparse_attention("0: dense; 1-3: window(5) | columns(1)", skip=0.001), quantize("int8"), quantize_kv("int8")'
    )
    compiled = slim.compile(model("llama"), passes, target=TARGET, kv_cache=slim.KVCacheConfig(layout="paged"))
    compiled.save(tmp_path / "saved")
    loaded = slim.load(tmp_path / "saved", target=TARGET)
    assert loaded.paged
    assert patterns(loaded) == patterns(compiled)
    assert torch.equal(loaded(TOKENS).logits, compiled(TOKENS).logits)
    with pytest.raises(errors.ExportUnsupported, match=r"layers 0, 1 keeps 0: dense; 1-3: window\(5\)"):
        compiled.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_cost_of_attention_is_that_of_what_is_kept() -> None:
    dense, sparse = (
        slim.compile(model("llama"), passes, target="eager", verify=False).cost()
        for passes in ("", "sparse_attention(window=16, sinks=4)")
    )
    bound = [cost.bind(B=1, S=1, T=4096) for cost in (dense, sparse)]
    assert bound[1].bytes_moved < bound[0].bytes_moved
    kept = bound[0].bytes_moved - bound[1].bytes_moved
    assert kept == pytest.approx(dense.kv_bytes_per_token * (4096 - 20), rel=0.01)
