"""What runs one call of a language model over pages: rows of their own lengths, and no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slim.codegen import Bound, Ends, Executable, Feedback, GreedySteps
from slim.compiler.program import Program
from slim.runtime.binding import LENGTHS, TABLE, cache_slots
from slim.runtime.paged import PagedKVCache
from slim.runtime.steps import joined


class PagedStep:
    """A Program bound to pages, lowered.

    Attributes:
        slots: what its cache holds.
    """

    def __init__(self, bound: Program, executable: Executable) -> None:
        self.executable = executable
        self.slots = cache_slots(bound)
        self.names = tuple(value.name for value in bound.inputs)
        self.own = self.names[: self.names.index(TABLE)]
        outputs: Any = bound.graph.output_node().args[0]
        self._last_only = [value.meta["val"].shape[1] == 1 for value in outputs]  # the others: of all tokens
        self.feedback = Feedback(
            logits=0,
            tokens=self.names.index("input_ids"),
            positions=self.names.index("position_ids") if "position_ids" in self.names else None,
            lengths=self.names.index(LENGTHS),
        )

    def arguments(
        self, inputs: dict[str, Tensor], table: Tensor, lengths: Tensor, tensors: Sequence[Tensor]
    ) -> list[Tensor]:
        """The inputs in their order."""
        return [*(inputs[name] for name in self.own), table, lengths, *tensors]

    def __call__(self, cache: PagedKVCache, mask: Tensor | None, inputs: dict[str, Tensor]) -> tuple[Any, ...]:
        """Runs the new tokens ``inputs`` [B, S] and adds them to the cache; ``mask`` [B, S] is False at padding.

        Rows with padding run one by one on their tokens alone; their outputs are zeros at padding.
        """
        columns = inputs["input_ids"].shape[1]
        whole = mask is None or bool(mask.all())
        counts = [columns] * cache.batch if mask is None else mask.sum(1).tolist()
        cache.reserve(counts)
        if whole:
            outputs = self._run(cache, slice(None), inputs)
        else:
            assert mask is not None
            outputs = self._row_by_row(cache, mask, inputs)
        cache.note(counts, columns, mask)
        return outputs

    def _run(self, cache: PagedKVCache, rows: slice, inputs: dict[str, Tensor]) -> tuple[Any, ...]:
        """In pieces that a ring can take; outputs are those of all tokens, or of the last, as the Program has it."""
        columns = inputs["input_ids"].shape[1]
        most = columns if cache.ring is None else cache.ring.chunk
        lengths, parts = cache.lengths[rows].clone(), []
        for start in range(0, columns, most):
            piece = {name: value[:, start : start + most] for name, value in inputs.items()}
            parts.append(self.executable(*self.arguments(piece, cache.table[rows], lengths, cache.tensors)))
            lengths += piece["input_ids"].shape[1]
        return joined(parts)

    def _row_by_row(self, cache: PagedKVCache, mask: Tensor, inputs: dict[str, Tensor]) -> tuple[Any, ...]:
        outputs: list[Tensor] = []
        for row in range(cache.batch):
            real = mask[row].nonzero()[:, 0]
            own = {name: value[row : row + 1, real] for name, value in inputs.items()}
            if not len(real):
                continue
            for index, value in enumerate(self._run(cache, slice(row, row + 1), own)):
                last_only = self._last_only[index]
                if index == len(outputs):
                    shape = (cache.batch, 1 if last_only else mask.shape[1], *value.shape[2:])
                    outputs.append(value.new_zeros(shape))
                outputs[index][row, slice(None) if last_only else real] = value[0]
        return tuple(outputs)


class PagedDecoder:
    """Decodes over pages: a step costs each row its own tokens."""

    def __init__(self, step: PagedStep, cache: PagedKVCache, chunk: int | None = None) -> None:
        self._step, self._chunk = step, chunk
        self.cache = cache

    def prefill(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Runs what of ``tokens`` [B, S] the cache does not hold yet, ``chunk`` tokens at a time."""
        first, stop = self.cache.length, tokens.shape[1]
        logits = tokens
        for start in range(first, stop, self._chunk or stop):
            part = slice(start, min(stop, start + (self._chunk or stop)))
            inputs = {
                "input_ids": tokens[:, part], "attention_mask": mask[:, part], "position_ids": positions[:, part]
            }  # fmt: skip
            logits = self._step(self.cache, mask[:, part].bool(), inputs)[0]
        self._token = positions.new_zeros(positions.shape[0], 1)
        self._position = positions[:, -1:].clone()
        self._inputs = {
            "input_ids": self._token, "position_ids": self._position, "attention_mask": torch.ones_like(self._token)
        }  # fmt: skip
        self._forget()
        return logits[:, -1]

    def _forget(self) -> None:
        self._bound: Bound | None = None
        self._greedy: GreedySteps | None = None
        self._layout = self.cache.layout

    def _make_room(self, tokens: int) -> None:
        self.cache.reserve(tokens)
        if self._layout != self.cache.layout:
            self._forget()

    def _bind(self) -> Bound:
        if self._bound is None:
            cache = self.cache
            arguments = self._step.arguments(self._inputs, cache.table, cache.lengths, cache.tensors)
            self._bound = self._step.executable.bind(*arguments)
        return self._bound

    def step(self, tokens: Tensor) -> Tensor:
        """One token a row, [B]."""
        self._make_room(1)
        self._token[:, 0] = tokens
        self._position += 1
        logits: Tensor = self._bind()()[0]
        self.cache.note([1] * self.cache.batch, 1, None)
        return logits[:, -1]

    def greedy(self, tokens: Tensor, steps: int, ends: Ends) -> Tensor | None:
        """See ``Decoder``. Rows that have ended go on being written, as the others do."""
        steps = self._room(steps)
        self._make_room(steps)
        if self._greedy is None:
            self._greedy = self._bind().greedy(self._step.feedback, None, ends)
            if self._greedy is None:
                return None
        self._token[:, 0] = tokens
        chosen = self._greedy(steps, 0)
        self.cache.note([len(chosen)] * self.cache.batch, len(chosen), None)
        return chosen

    def _room(self, steps: int) -> int:
        """How many of ``steps`` the cache may take; one too many is refused where it is taken."""
        limit = self.cache.max_tokens
        longest = max(row.length for row in self.cache.rows)
        return steps if limit is None else max(1, min(steps, limit - longest))
