"""SparseAttention: what it writes into the graph, what that computes, and what it refuses."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import slim
from slim import errors
from slim.codegen import build
from slim.compiler.rules import argument
from slim.passes import SparseAttention
from slim.passes.sparse_attention import KINDS
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


def test_auto_gives_each_head_the_narrowest_window_that_keeps_enough() -> None:
    data = [torch.randint(3, 96, (4, 48), generator=torch.Generator().manual_seed(2))]
    options = dict(calibration=data, target="eager")
    few, all_ = (slim.compile(model("llama"), f'sparse_attention("auto", mass={m})', **options) for m in (0.3, 0.8))
    assert patterns(few) != patterns(all_)
    assert all(text and "columns(4)" in text for text in patterns(few))
    assert any("keep 30% of their attention" in note for note in few.report.passes[0].notes)
    with pytest.raises(errors.NeedsCalibration):
        slim.compile(model("llama"), 'sparse_attention("auto")', target="eager")
    with pytest.raises(errors.PassMatchedNothing, match="no window keeps"):
        slim.compile(model("llama"), 'sparse_attention("auto", mass=0.999999)', **options)


def test_a_pattern_that_names_other_heads_than_there_are_is_refused() -> None:
    with pytest.raises(errors.PassMatchedNothing, match="it has 4 heads, and the pattern names 2"):
        slim.compile(model("llama"), 'sparse_attention("0: dense; 1: window(5)")', target="eager")


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
