"""Text in pieces: together they are the whole, and none ends within a character."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from slim.runtime.detokenize import Pieces

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"bytes": ROOT / "examples" / "demo_model", "sentencepiece": ROOT.parent / "shared/models/stories260K"}


@cache
def tokenizer(kind: str) -> Any:
    if not FOLDERS[kind].exists():
        pytest.skip(f"{FOLDERS[kind]} is not here")
    return AutoTokenizer.from_pretrained(FOLDERS[kind])


def written(kind: str, before: list[int], tokens: list[int], rng: random.Random) -> list[str]:
    pieces, found, start = Pieces(tokenizer(kind), before), [], 0
    while start < len(tokens):
        stop = min(len(tokens), start + rng.randint(1, 5))
        found.append(pieces.add(tokens[start:stop]))
        start = stop
    return [*found, pieces.add([], last=True)]


@pytest.mark.parametrize("kind", FOLDERS)
@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=12), text=st.text(max_size=80), seed=st.integers(0, 99))
def test_pieces_of_any_text_are_the_text_and_cut_no_character(kind: str, prompt: str, text: str, seed: int) -> None:
    made = tokenizer(kind)
    before = made(prompt, add_special_tokens=False).input_ids
    tokens = made(text, add_special_tokens=False).input_ids
    found = written(kind, before, tokens, random.Random(seed))
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole, given = made.decode([*before, *tokens], **options), made.decode(before, **options)
    assert given.rstrip("\ufffd") + "".join(found) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in found)


def test_a_character_waits_for_its_last_byte() -> None:
    made = tokenizer("bytes")
    tokens = made("x\U0001f600y", add_special_tokens=False).input_ids
    pieces = Pieces(made)
    found = [pieces.add([token]) for token in tokens]
    assert len(tokens) > 3
    assert [piece for piece in found if piece] in (["x", "\U0001f600", "y"], ["x", "\U0001f600y"])


def test_bytes_that_never_become_a_character_are_given_at_the_end() -> None:
    made = tokenizer("bytes")
    tokens = made("\U0001f600", add_special_tokens=False).input_ids[:-1]
    pieces = Pieces(made)
    assert pieces.add(tokens) == ""
    assert set(pieces.add([], last=True)) == {"\ufffd"}
