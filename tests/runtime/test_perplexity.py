"""Perplexity: every token predicted once, batches that change nothing, and the published numbers."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slim import errors
from slim.compiler.tokenizer import load_tokenizer
from slim.runtime import perplexity
from slim.runtime.perplexity import Passage, Score, pieces, reading_length, score, windows


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def story(shared: Path) -> str:
    return (shared / "text" / "tinystories_val.txt").read_text()


class Without:
    """A tokenizer that has no BOS, or that does not say where its tokens lie."""

    def __init__(self, tokenizer, **attributes) -> None:
        self.tokenizer = tokenizer
        self.is_fast = True
        self.bos_token_id = tokenizer.bos_token_id
        vars(self).update(attributes)

    def __call__(self, *args, **kwargs):
        return self.tokenizer(*args, **kwargs)


def test_windows_predict_every_token_once(tokenizer, story: str) -> None:
    text = story[:3000] + " naïve café ☕"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for cut in (windows(text, tokenizer, 64), windows(text, Without(tokenizer, is_fast=False), 64)):
        assert all(passage.tokens[0] == tokenizer.bos_token_id for passage in cut)
        assert [token for passage in cut for token in passage.tokens[1:]] == ids
        assert max(len(passage.tokens) - 1 for passage in cut) == 64  # read at once: BOS and 63 more
        assert sum(passage.nbytes for passage in cut) == len(text.encode())


def test_windows_without_bos_predict_all_but_the_first(tokenizer, story: str) -> None:
    text = story[:1000]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    cut = windows(text, Without(tokenizer, bos_token_id=None), 32)
    assert [token for passage in cut for token in passage.tokens[1:]] == ids[1:]
    assert cut[0].tokens[0] == ids[0]
    assert cut[1].tokens[0] == cut[0].tokens[-1]


def test_windows_stop_at_max_tokens(tokenizer, story: str) -> None:
    for bos in (1, None):
        cut = windows(story, Without(tokenizer, bos_token_id=bos), 64, max_tokens=100)
        assert [len(passage.tokens) - 1 for passage in cut] == [64, 36]
        assert sum(passage.nbytes for passage in cut) < 400


def test_pieces_begin_at_the_marker_and_are_cut(tokenizer) -> None:
    text = "before\nOnce upon a time A. He said Once upon a time.\n\nOnce upon a time B\n\n"
    cut = pieces(text, tokenizer, context=512, marker="Once upon a time")
    shown = [tokenizer.decode(passage.tokens, skip_special_tokens=True).strip() for passage in cut]
    assert shown == ["Once upon a time A. He said Once upon a time.", "Once upon a time B"]
    assert [passage.nbytes for passage in cut] == [len(piece) for piece in shown]
    assert all(len(p.tokens) == 6 for p in pieces(text, tokenizer, context=6, marker="Once upon a time"))
    assert len(pieces(text, tokenizer, 512, "Once upon a time", limit=1)) == 1


def test_nothing_to_predict_is_an_error(tokenizer) -> None:
    for cut in (lambda: windows("", tokenizer, 8), lambda: pieces("a\nb", tokenizer, 8, "c")):
        with pytest.raises(errors.BadInput, match="bad text"):
            cut()


def test_batches_change_nothing(tokenizer, model, story: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = windows(story[:6000], tokenizer, 128) + pieces(story, tokenizer, 128, "Once upon a time", limit=4)
    rows = []
    together = score(Watched(model, rows), passages)
    monkeypatch.setattr(perplexity, "_TOKENS_AT_ONCE", 1)
    alone = score(Watched(model, rows_alone := []), passages)
    assert max(rows) > 1
    assert set(rows_alone) == {1}
    assert (together.tokens, together.nbytes) == (alone.tokens, alone.nbytes)
    assert together.nats == pytest.approx(alone.nats, rel=1e-6)


class Watched:
    """A model that notes how many rows it was given."""

    def __init__(self, model, rows: list[int]) -> None:
        self.model, self.rows = model, rows
        self.config, self.device = model.config, model.device

    def __call__(self, **inputs):
        self.rows.append(inputs["input_ids"].shape[0])
        return self.model(**inputs)


def test_score_is_the_likelihood_of_every_token(model) -> None:
    tokens = torch.tensor([[1, 403, 407, 261, 378]])
    logits = model(tokens).logits[0, :-1].detach()
    expected = -sum(logits.log_softmax(-1)[i, token].item() for i, token in enumerate(tokens[0, 1:].tolist()))
    found = score(model, [Passage(tuple(tokens[0].tolist()), 16)])
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.tokens == 4
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / 16, rel=1e-5)


def test_progress_reaches_the_end(model, tokenizer, story: str) -> None:
    told: list[tuple[str, int, int]] = []
    score(model, windows(story[:500], tokenizer, 64), lambda *step: told.append(step))
    assert told[0][1] == 0
    assert told[-1][1] == told[-1][2]


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    assert Score(nats=1e6, tokens=10, nbytes=10).perplexity == math.inf


def test_the_reading_length_is_the_models_own(model) -> None:
    assert reading_length(model) == 512
    assert reading_length(model, 100) == 100
    model_of_3 = type("Limited", (), {"position_limit": 3})()
    assert reading_length(model_of_3) == 3
    with pytest.raises(errors.PromptTooLong):
        reading_length(model_of_3, 4)
    assert reading_length(object()) == 2048


def test_a_directory_without_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(errors.NoTokenizer):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(errors.NoTokenizer):
        load_tokenizer(tmp_path)
    with pytest.raises(errors.NoTokenizer):
        load_tokenizer(None)
