"""Tokens into text as they come, in a thread beside the work: while generated code runs, Python is free."""

from __future__ import annotations

import copy
import queue
import threading
import weakref
from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"  # what decoders put for bytes that are no character yet
_CONTEXT = 8  # tokens before a text that its first piece is decoded with: a space may hang on them


class Pieces:
    """The text of tokens that come a few at a time, in pieces that never end within a character.

    All pieces together are what the tokenizer makes of all tokens, less what it makes of those before them.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(before[-8 * _CONTEXT :])  # what is decoded, of which so many characters are given
        self._given = len(self._decode(self._window).rstrip(_HALF))
        self._shorten()

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """What can be said of the text once ``tokens`` have come; with ``last``, all of it."""
        self._window += tokens
        text = self._decode(self._window)
        whole = text if last else text.rstrip(_HALF)
        piece = whole[self._given :]
        self._given = max(self._given, len(whole))
        if len(self._window) > 4 * _CONTEXT and self._given == len(text):
            self._shorten()
        return piece

    def _shorten(self) -> None:
        """Lets go of tokens that what follows does not hang on; a window that begins within a character is no use."""
        text = self._decode(self._window[-_CONTEXT:])
        if len(self._window) > _CONTEXT and text and _HALF not in text:
            self._window, self._given = self._window[-_CONTEXT:], len(text)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Text:
    """The text of one request, which a thread writes and others read."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.complete = False
        self.error: Exception | None = None
        self._changed = threading.Condition()

    def write(self, piece: str, complete: bool, error: Exception | None = None) -> None:
        """Adds a piece, the last one where it is ``complete``."""
        with self._changed:
            if piece:
                self.pieces.append(piece)
            self.complete, self.error = self.complete or complete, self.error or error
            self._changed.notify_all()

    def wait(self, given: int) -> None:
        """Until there are more than ``given`` pieces, or all of them."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.pieces) > given or self.complete)
            if self.error is not None and len(self.pieces) == given:
                raise self.error


_Work = tuple[Text, Any, list[int], bool]


class Detokenizer:
    """A thread that turns tokens into text.

    Args:
        tokenizer: of transformers; a copy is used, since the caller's may be at work in another thread.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        threading.Thread(target=_write, args=(self._work,), name="slim detokenizer", daemon=True).start()
        weakref.finalize(self, self._work.put, None)  # the thread ends with what it works for

    def begin(self, before: Sequence[int]) -> tuple[Text, Pieces]:
        """A text that follows the tokens ``before``."""
        return Text(), Pieces(self._tokenizer, before)

    def add(self, writing: tuple[Text, Pieces], tokens: list[int], last: bool) -> None:
        """Hands tokens of a text on, and returns at once."""
        self._work.put((*writing, tokens, last))


def _write(work: queue.SimpleQueue[_Work | None]) -> None:
    while (item := work.get()) is not None:
        text, pieces, tokens, last = item
        if text.complete:  # it failed before
            continue
        try:
            text.write(pieces.add(tokens, last), last)
        except Exception as error:  # the reader is told, and the others go on
            text.write("", True, error)
