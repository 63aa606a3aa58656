"""The tokenizer that lies beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slim import errors

# What a tokenizer's vocabulary may be kept in; without one of these, transformers may make up an empty tokenizer.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(directory: str | Path | None) -> Any:
    """The transformers tokenizer in ``directory``.

    Raises:
        NoTokenizer: where there is none, or none that this transformers can read.
    """
    if directory is None or not any(any(Path(directory).glob(pattern)) for pattern in _VOCABULARIES):
        raise errors.NoTokenizer(path=directory)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # each tokenizer class has its own way to say that its files are not right
        raise errors.NoTokenizer(path=directory) from error
