"""What runs one call of a language model: over a KV cache, or over everything from the start.

Generation sees ``Decoder`` alone, so that a generated target may bring a decoder of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from slim.codegen import Bound, Ends, Executable, Feedback, GreedySteps
from slim.compiler.program import Program
from slim.runtime.binding import KEY_MASK, cache_slots
from slim.runtime.cache import KVCache


class Step:
    """A Program bound to a cache, lowered.

    Attributes:
        slots: what its cache holds.
    """

    def __init__(self, bound: Program, executable: Executable) -> None:
        self.executable = executable
        self.slots = cache_slots(bound)
        self.names = tuple(value.name for value in bound.inputs)
        self.mask_index = self.names.index(KEY_MASK)
        positions = self.names.index("position_ids") if "position_ids" in self.names else None
        self.feedback = Feedback(
            logits=0, tokens=self.names.index("input_ids"), positions=positions, mask=self.mask_index
        )

    def arguments(self, cache: KVCache, key_mask: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
        """The inputs in their order: those of the new tokens, the mask of all keys, the cache's tensors."""
        return [*(inputs[name] for name in self.names[: self.mask_index]), key_mask, *cache.tensors]

    def __call__(self, cache: KVCache, mask: Tensor | None, inputs: dict[str, Tensor]) -> tuple[Any, ...]:
        """Runs the new tokens ``inputs`` [B, S] and adds them to the cache; ``mask`` [B, S] is False at padding."""
        parts, start = [], 0
        for count in cache.pieces(inputs["input_ids"].shape[1]):
            piece = slice(start, start + count)
            key_mask = cache.prepare(count, None if mask is None else mask[:, piece])
            own = {name: value[:, piece] for name, value in inputs.items()}
            parts.append(self.executable(*self.arguments(cache, key_mask, own)))
            cache.advance(count)
            start += count
        return joined(parts)


def joined(parts: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The outputs of tokens that were run one piece after another: of all, or of the last where the Program says so."""
    if len(parts) == 1 or parts[0][0].shape[1] == 1:  # of the last token alone
        return parts[-1]
    return tuple(torch.cat(values, 1) for values in zip(*parts, strict=True))


class Decoder(Protocol):
    """Runs a prompt, then one token a row at a time; both return the logits of the last token, [B, V].

    What raises half-way ends it: its positions may be ahead of its cache.

    Attributes:
        cache: what past tokens are kept in, if anything.
    """

    cache: Any

    def prefill(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor: ...
    def step(self, tokens: Tensor) -> Tensor: ...
    def greedy(self, tokens: Tensor, steps: int, ends: Ends) -> Tensor | None:
        """Up to ``steps`` likeliest tokens after ``tokens`` [B], as [steps, B]; None where only ``step`` is to be had.

        ``ends`` must be the same one from call to call. Fewer come where every row has ended or the cache must grow.
        """
        ...


class CachedDecoder:
    """Decodes over a KV cache: a step costs one token."""

    def __init__(self, step: Step, cache: KVCache, chunk: int | None = None) -> None:
        self._step = step
        self.cache = cache
        self._chunk = chunk

    def prefill(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Runs what of ``tokens`` [B, S] the cache does not hold yet, ``chunk`` tokens at a time."""
        first, stop = self.cache.get_seq_length(), tokens.shape[1]
        self.cache.remask(mask[:, :first].bool())
        logits = tokens
        for start in range(first, stop, self._chunk or stop):
            part = slice(start, min(stop, start + (self._chunk or stop)))
            inputs = {
                "input_ids": tokens[:, part], "attention_mask": mask[:, part], "position_ids": positions[:, part]
            }  # fmt: skip
            logits = self._step(self.cache, mask[:, part].bool(), inputs)[0]
        self._prepare_steps(positions)
        return logits[:, -1]

    def _prepare_steps(self, positions: Tensor) -> None:
        """Allocates what every step reuses."""
        self._token = positions.new_zeros(positions.shape[0], 1)
        self._position = positions[:, -1:].clone()
        self._inputs = {
            "input_ids": self._token, "position_ids": self._position, "attention_mask": torch.ones_like(self._token)
        }  # fmt: skip
        self._forget()

    def _forget(self) -> None:
        self._bound: Bound | None = None
        self._greedy: GreedySteps | None = None
        self._memory = self.cache.mask  # what both are bound to; a cache that has grown has another one

    def _arguments(self, tokens: int) -> list[Tensor]:
        """What a step takes that sees ``tokens`` in the cache."""
        return self._step.arguments(self.cache, self.cache.mask[:, :tokens], self._inputs)

    def _make_room(self) -> None:
        """For one more token."""
        self.cache.reserve(1)
        if self._memory is not self.cache.mask:
            self._forget()

    def step(self, tokens: Tensor) -> Tensor:
        """One token a row, [B]."""
        self._make_room()
        self._token[:, 0] = tokens
        self._position += 1
        cache, end = self.cache, self.cache.length + 1
        if self._bound is None:
            self._bound = self._step.executable.bind(*self._arguments(end))
        else:
            self._bound.set(self._step.mask_index, cache.mask[:, :end])
        logits: Tensor = self._bound()[0]
        cache.advance(1)
        return logits[:, -1]

    def greedy(self, tokens: Tensor, steps: int, ends: Ends) -> Tensor | None:
        self._make_room()
        cache = self.cache
        if self._greedy is None:
            bound = self._step.executable.bind(*self._arguments(cache.length))
            self._greedy = bound.greedy(self._step.feedback, cache.mask, ends)
            if self._greedy is None:
                return None
        self._token[:, 0] = tokens
        chosen = self._greedy(min(steps, cache.capacity - cache.length), cache.length)
        cache.advance(len(chosen))
        return chosen


class RecomputingDecoder:
    """Decodes without a cache: every step runs all tokens again."""

    def __init__(self, forward: Callable[[dict[str, Tensor]], tuple[Any, ...]], room: int) -> None:
        self.cache = None
        self._forward = forward
        self._room = room
        self._length = 0

    def prefill(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        self._length = tokens.shape[1]
        self._inputs = {
            "input_ids": _extended(tokens, self._room, 0),
            "attention_mask": _extended(mask, self._room, 1),
            "position_ids": _extended(positions, self._room, 0),
        }
        return self._run()

    def step(self, tokens: Tensor) -> Tensor:
        here = self._length
        self._inputs["input_ids"][:, here] = tokens
        self._inputs["position_ids"][:, here] = self._inputs["position_ids"][:, here - 1] + 1
        self._length += 1
        return self._run()

    def greedy(self, tokens: Tensor, steps: int, ends: Ends) -> None:
        return None

    def _run(self) -> Tensor:
        inputs = {name: value[:, : self._length] for name, value in self._inputs.items()}
        logits: Tensor = self._forward(inputs)[0]
        return logits[:, -1]


def _extended(values: Tensor, room: int, fill: int) -> Tensor:
    """``values`` [B, S] as the start of [B, room]."""
    wide = values.new_full((values.shape[0], room), fill)
    wide[:, : values.shape[1]] = values
    return wide
