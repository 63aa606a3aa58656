"""Calibration data, as users give it, made into inputs for a Program."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slim import errors
from slim.compiler.inputs import POSITIONS, checked_mask, checked_tokens, position_limit, vocabulary
from slim.compiler.program import Program
from slim.compiler.tokenizer import load_tokenizer

LONGEST = 2048  # tokens of a window of text
MOST = 1 << 16  # tokens of text that are read: more costs memory and changes little
_AT_ONCE = 2048  # tokens of a batch


@dataclass(frozen=True, eq=False)
class Batch:
    """One run of a Program.

    Attributes:
        inputs: a tensor an input of the Program, in its order.
        real: bool [B, S], False at padding; None where every row of every value counts.
    """

    inputs: tuple[Tensor, ...]
    real: Tensor | None

    @property
    def tokens(self) -> int:
        """Tokens that count; rows of the first input where there are none."""
        return int(self.real.sum()) if self.real is not None else self.inputs[0].shape[0]


@dataclass(frozen=True)
class Calibration:
    """Batches, and what the user should know of them."""

    batches: Sequence[Batch]
    notes: Sequence[str] = ()

    @property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.batches)


def first_batches(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """As many as hold ``tokens``, where there are that many."""
    taken: list[Batch] = []
    for batch in batches:
        if sum(b.tokens for b in taken) >= tokens:
            break
        taken.append(batch)
    return taken


def sequences(batches: Iterable[Batch]) -> Iterator[Batch]:
    """One by one; whole batches where the model reads no tokens."""
    for batch in batches:
        size = 1 if batch.real is None else len(batch.real)
        for index in range(size):
            yield batch if size == 1 else _one(batch, index, size)


def _one(batch: Batch, index: int, size: int) -> Batch:
    assert batch.real is not None
    inputs = tuple(value[index : index + 1] if value.shape[:1] == (size,) else value for value in batch.inputs)
    return Batch(inputs, batch.real[index : index + 1])


def read_calibration(program: Program, given: Any, most: int = MOST) -> Calibration:
    """What the user gave as ``calibration``, as batches.

    Texts are joined, the tokenizer's BOS between them, and cut into windows that each begin with BOS, of the model's
    own context length (2048 tokens at most); of long ones the first 65,536 tokens are read. An encoder reads each
    text on its own. Tensors and dicts are taken as they are; masks and positions that they lack are filled in.

    Args:
        given: texts (list of str), token ids (tensors [S] or [B, S]), dicts or tuples of inputs, or any iterable of
            those, such as a DataLoader.
        most: tokens of text that are read.

    Raises:
        BadInput: where it is something else, or empty. NoTokenizer: texts for a model that has none.
        TokenOutOfRange, PromptTooLong: tokens that the model does not take.
    """
    items = _items(given)
    if all(isinstance(item, str) for item in items):
        return _from_texts(program, items, most)
    notes: list[str] = []
    batches = [_from_item(program, item, f"calibration[{i}]", notes) for i, item in enumerate(items)]
    return Calibration(batches, list(dict.fromkeys(notes)))


def _items(given: Any) -> list[Any]:
    if isinstance(given, (str, bytes)):
        raise _bad("one text stands alone: give a list of texts")
    if isinstance(given, (Tensor, Mapping)):
        return [given]
    if not isinstance(given, Iterable):
        raise _bad(f"{type(given).__name__} is no list of texts or tensors, and no DataLoader")
    items = list(given)
    if not items:
        raise _bad("it is empty")
    return items


def _bad(reason: str, argument: str = "calibration") -> errors.BadInput:
    return errors.BadInput(argument=argument, reason=reason)


# -- texts -------------------------------------------------------------------------------------------------------------


def _from_texts(program: Program, texts: Sequence[str], most: int) -> Calibration:
    names = {item.name for item in program.inputs}
    if "input_ids" not in names:
        raise _bad("texts are for models that read token ids: give tensors")
    tokenizer = load_tokenizer(program.facts.source)
    length = _context(program)
    if program.facts.kind == "causal_lm":
        rows, notes = _windows(texts, tokenizer, length, most)
    else:
        rows, notes = _one_by_one(texts, tokenizer, length, most)
    return Calibration([_batch_of_rows(program, group) for group in _grouped(rows)], notes)


def _context(program: Program) -> int:
    made_for = (program.facts.config or {}).get("max_position_embeddings")
    lengths = (made_for, position_limit(program), LONGEST)
    return min(length for length in lengths if isinstance(length, int) and length > 0)


def _windows(texts: Sequence[str], tokenizer: Any, length: int, most: int) -> tuple[list[list[int]], list[str]]:
    """All texts in a row, cut; the last window may be short."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    separate = begin or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    stream: list[int] = []
    for index, text in enumerate(texts):
        if len(stream) >= most:
            unread = f"of {len(texts)} calibration texts the first {index} were read: {most:,} tokens are enough"
            return _cut(stream[:most], begin, length), [unread]
        stream += [*(separate if stream else []), *_encoded(tokenizer, text)]
    notes = [] if len(stream) <= most else [f"of {len(stream):,} calibration tokens the first {most:,} were read"]
    rows = _cut(stream[:most], begin, length)
    if not rows:
        raise _bad("its texts hold no token")
    if len(rows) == 1 and len(rows[0]) < length:
        notes.append(f"calibration has {len(rows[0])} tokens, and a window of this model {length}: more text helps")
    return rows, notes


def _cut(stream: list[int], begin: list[int], length: int) -> list[list[int]]:
    step = length - len(begin)
    return [[*begin, *stream[start : start + step]] for start in range(0, len(stream), step)]


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _one_by_one(texts: Sequence[str], tokenizer: Any, length: int, most: int) -> tuple[list[list[int]], list[str]]:
    rows: list[list[int]] = []
    total = 0
    for index, text in enumerate(texts):
        if total >= most:
            return rows, [f"of {len(texts)} calibration texts the first {index} were read: {most:,} tokens are enough"]
        row = tokenizer(text, truncation=True, max_length=length, verbose=False)["input_ids"]
        rows.append(list(row))
        total += len(row)
    if not any(rows):
        raise _bad("its texts hold no token")
    return [row for row in rows if row], []


def _grouped(rows: list[list[int]]) -> Iterable[list[list[int]]]:
    """Rows that are read at once: neighbours in length, so that little is padding."""
    ordered = sorted(rows, key=len, reverse=True)
    while ordered:
        count = max(1, _AT_ONCE // len(ordered[0]))
        yield ordered[:count]
        ordered = ordered[count:]


def _batch_of_rows(program: Program, rows: list[list[int]]) -> Batch:
    """Padded on the right; nothing real looks there."""
    longest = max(map(len, rows))
    tokens, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), True
    return _completed(program, {"input_ids": tokens, "attention_mask": mask}, "calibration")


# -- tensors -----------------------------------------------------------------------------------------------------------


def _from_item(program: Program, item: Any, argument: str, notes: list[str]) -> Batch:
    names = [value.name for value in program.inputs]
    if isinstance(item, Mapping):
        unread = sorted(set(item) - set(names) - {"attention_mask"})
        if unread:
            notes.append(f"calibration holds {', '.join(map(str, unread))}, which the model does not read")
        return _completed(program, {key: value for key, value in item.items() if key not in unread}, argument)
    if isinstance(item, (list, tuple)) and all(isinstance(value, Tensor) for value in item):
        if len(item) > len(names):
            raise _bad(f"it has {len(item)} tensors, and the model {len(names)} inputs", argument)
        return _completed(program, dict(zip(names, item, strict=False)), argument)
    if isinstance(item, Tensor):
        return _completed(program, {names[0] if "input_ids" not in names else "input_ids": item}, argument)
    raise _bad(f"{type(item).__name__} is no tensor, dict or tuple of tensors (and texts stand among texts)", argument)


def _completed(program: Program, given: dict[str, Any], argument: str) -> Batch:
    """A Batch of what was given, with the masks and positions that follow from it."""
    if not all(isinstance(value, Tensor) for value in given.values()):
        raise _bad("its values must be tensors", argument)
    real = None
    if "input_ids" in given:
        tokens = given["input_ids"]
        if tokens.numel() == 0:
            raise _bad("it holds no token", argument)
        tokens = checked_tokens(tokens[None] if tokens.dim() == 1 else tokens, vocabulary(program), argument)
        limit = position_limit(program)
        if limit is not None and tokens.shape[1] > limit:
            raise errors.PromptTooLong(length=tokens.shape[1], capacity=limit, room=POSITIONS)
        given["input_ids"] = tokens
        mask = checked_mask(given.get("attention_mask", torch.ones_like(tokens)), tokens)
        given["attention_mask"], real = mask, mask.bool()
        given.setdefault("position_ids", (mask.cumsum(-1) - 1).clamp_min(0))
        given.setdefault("token_type_ids", torch.zeros_like(tokens))
    missing = [item.name for item in program.inputs if item.name not in given]
    if missing:
        raise _bad(f"the model also reads {', '.join(missing)}", argument)
    inputs = tuple(given[item.name].to(item.dtype) for item in program.inputs)
    for value, item in zip(inputs, program.inputs, strict=True):
        fixed = [(have, want) for have, want in itertools.zip_longest(value.shape, item.shape) if isinstance(want, int)]
        if value.dim() != len(item.shape) or any(have != want for have, want in fixed):
            raise _bad(f"{item.name} has shape {list(value.shape)}, and the model takes {list(item.shape)}", argument)
    return Batch(inputs, real)
