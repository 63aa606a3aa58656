"""Perplexity of a language model: how a text is cut into passages, and how well each token is predicted.

>>> score(compiled, windows(text, tokenizer, context=512)).perplexity
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slim import errors
from slim.compiler.inputs import POSITIONS

_LONGEST = 2048  # tokens read at once where the caller does not say: what published perplexities use
_LOGITS_AT_ONCE = 1 << 25  # 128 MiB in float32
_TOKENS_AT_ONCE = 4096

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Passage:
    """Tokens read together: the first is given, each later one is predicted from all before it.

    Attributes:
        tokens: their ids.
        nbytes: bytes of UTF-8 that the predicted tokens stand for.
    """

    tokens: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Score:
    """How well a model predicted some passages.

    Attributes:
        nats: negative log likelihood, summed over the predicted tokens.
        tokens, nbytes: how many tokens were predicted, and the bytes they stand for.
    """

    nats: float
    tokens: int
    nbytes: int

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); it depends on the tokenizer, which bits per byte do not."""
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.nbytes


# -- cutting a text ----------------------------------------------------------------------------------------------------


def windows(text: str, tokenizer: Any, context: int, max_tokens: int | None = None) -> list[Passage]:
    """The whole text in windows that do not overlap: the model reads ``context`` tokens at a time at most.

    Each window begins with the tokenizer's BOS, and every token is predicted once. A tokenizer without one begins a
    window with the last token of the window before, so that only the first token of all is not predicted.

    Args:
        max_tokens: predict no more than this many tokens, from the start of the text.

    Raises:
        BadInput: where there is nothing to predict.
    """
    ids, sizes = _encode(text, tokenizer)
    given = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    first = 1 - len(given)  # the first token that is predicted
    stop = len(ids) if max_tokens is None else min(len(ids), first + max_tokens)
    passages = []
    for start in range(first, stop, context):
        end = min(stop, start + context)
        passages.append(Passage((*(given or ids[start - 1 : start]), *ids[start:end]), sum(sizes[start:end])))
    return _some(passages, "it is too short: no token of it can be predicted")


def pieces(text: str, tokenizer: Any, context: int, marker: str, limit: int | None = None) -> list[Passage]:
    """The pieces that begin where a paragraph begins with ``marker``, each on its own and cut to ``context`` tokens.

    What stands before the first marker is left out; a piece is stripped of white space, and begins with BOS.

    Args:
        limit: no more pieces than this.

    Raises:
        BadInput: where no paragraph begins with ``marker``.
    """
    parts = re.split(rf"^(?={re.escape(marker)})", text, flags=re.MULTILINE)[1:]
    given = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    passages = []
    for part in parts[:limit]:
        ids, sizes = _encode(part.strip(), tokenizer)
        ids = [*given, *ids][:context]
        sizes = [*(0 for _ in given), *sizes][1 : len(ids)]
        passages.append(Passage(tuple(ids), sum(sizes)))
    return _some(passages, f"no paragraph of it begins with {marker!r}")


def reading_length(model: Any, tokens: int | None = None) -> int:
    """How many tokens ``model`` should read at once: ``tokens``, else what it was made for, 2048 at most.

    Raises:
        PromptTooLong: for more than it has positions.
    """
    made_for = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    limit = getattr(model, "position_limit", None)
    if tokens is not None and limit is not None and tokens > limit:
        raise errors.PromptTooLong(length=tokens, capacity=limit, room=POSITIONS)
    return tokens or min(length for length in (made_for, limit, _LONGEST) if length)


def _some(passages: list[Passage], otherwise: str) -> list[Passage]:
    found = [passage for passage in passages if len(passage.tokens) > 1]
    if not found:
        raise errors.BadInput(argument="text", reason=otherwise)
    return found


def _encode(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids without special ones, and the bytes of UTF-8 each stands for."""
    if not tokenizer.is_fast:  # it does not say where its tokens lie: all of one size is right in sum
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ends = [len(text) * (index + 1) // len(ids) for index in range(len(ids))]
    else:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    bytes_before = [0, *itertools.accumulate(len(character.encode()) for character in text)]
    reached = [0, *itertools.accumulate((bytes_before[end] for end in ends), max)]
    return ids, [after - before for before, after in itertools.pairwise(reached)]


# -- scoring -----------------------------------------------------------------------------------------------------------


def score(model: Any, passages: Sequence[Passage], progress: Progress | None = None) -> Score:
    """How well ``model``, compiled or transformers' own, predicts ``passages``; each is read on its own.

    Passages of one length are read as a batch. They do not see each other, so the result is that of one at a time,
    up to the rounding of the machine's kernels.

    Raises:
        TokenOutOfRange: where the tokenizer is not the model's.
    """
    nats = [0.0] * len(passages)
    done = 0
    for batch in _batches(passages, _vocabulary(model)):
        if progress is not None:
            progress("predicting", done, len(passages))
        tokens = torch.tensor([passages[index].tokens for index in batch], device=model.device)
        for index, value in zip(batch, _nats(model, tokens).tolist(), strict=True):
            nats[index] = value
        done += len(batch)
    if progress is not None:
        progress("predicting", done, len(passages))
    predicted = sum(len(passage.tokens) - 1 for passage in passages)
    return Score(math.fsum(nats), predicted, sum(passage.nbytes for passage in passages))


def _batches(passages: Sequence[Passage], vocabulary: int) -> Iterator[list[int]]:
    """Indices of passages of one length, as many as a moderate memory holds the logits of."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, passage in enumerate(passages):
        by_length[len(passage.tokens)].append(index)
    for length, found in by_length.items():
        rows = max(1, min(_LOGITS_AT_ONCE // (length * vocabulary), _TOKENS_AT_ONCE // length))
        yield from (found[start : start + rows] for start in range(0, len(found), rows))


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


@torch.no_grad()
def _nats(model: Any, tokens: Tensor) -> Tensor:
    """Negative log likelihood of each row of ``tokens`` [B, S] after its first, float64 [B]."""
    given, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(input_ids=given, use_cache=False).logits.float()
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return each.double().view(targets.shape).sum(1)
