"""The loop of generate: a token a row, again and again."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from slim.codegen import Ends
from slim.runtime.cache import KVCache
from slim.runtime.paged import PagedKVCache
from slim.runtime.steps import Decoder

_BURST, _PATIENCE = 16, 0.1  # steps, and seconds, at most until Ctrl-C is heard and other threads get their turn


@dataclass
class Plan:
    """A call of generate, with every option settled.

    Attributes:
        tokens, mask, positions: the prompt, [B, S] each, rows repeated for num_return_sequences.
        config: transformers' options, completed.
        cache: the cache to go on with, if the caller gave one.
        use_cache: None where the caller did not say.
    """

    tokens: Tensor
    mask: Tensor
    positions: Tensor
    config: Any
    cache: KVCache | PagedKVCache | None
    use_cache: bool | None
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)

    @property
    def max_length(self) -> int:
        """Tokens a sequence may have in the end, prompt included."""
        return int(self.config.max_length)


class Loop:
    """Greedy decoding or sampling; the sequences are written into one tensor allocated ahead.

    Where nothing but the likeliest token is asked for, the decoder may do several steps at once.
    """

    def __init__(self, plan: Plan, decoder: Decoder, streamer: Any) -> None:
        self.plan = plan
        self.decoder = decoder
        self.streamer = streamer
        config = plan.config
        batch, self.length = plan.tokens.shape
        self.sequences = plan.tokens.new_empty(batch, plan.max_length)
        self.sequences[:, : self.length] = plan.tokens
        self.finished = torch.zeros(batch, dtype=torch.bool, device=plan.tokens.device)
        self.pad = config._pad_token_tensor
        self.eos = _eos_alone(plan.criteria)
        self.ends_early = any(hasattr(criterion, "eos_token_id") for criterion in plan.criteria)
        detailed = config.return_dict_in_generate
        self.scores: list[Tensor] | None = [] if detailed and config.output_scores else None
        self.logits: list[Tensor] | None = [] if detailed and config.output_logits else None
        self.ends = self._plain_ends()
        self.burst = 1

    @torch.no_grad()
    def run(self) -> Any:
        logits = self.decoder.prefill(self.plan.tokens, self.plan.mask, self.plan.positions)
        chosen = self._choose(logits)[None]
        while not self._append(chosen):
            chosen = self._go_on(chosen[-1])
        if self.streamer is not None:
            self.streamer.end()
        return self._result()

    def _go_on(self, tokens: Tensor) -> Tensor:
        """The tokens after ``tokens`` [B], as [steps, B]."""
        if self.ends is not None:
            chosen = self._several(tokens, self.ends)
            if chosen is not None:
                return chosen
            self.ends = None
        return self._choose(self.decoder.step(tokens))[None]

    def _several(self, tokens: Tensor, ends: Ends) -> Tensor | None:
        """As many steps at once as take no longer than is bearable."""
        begin = time.perf_counter()
        chosen = self.decoder.greedy(tokens, min(self.burst, self.plan.max_length - self.length), ends)
        if chosen is not None and self.streamer is None:
            a_step = (time.perf_counter() - begin) / len(chosen)
            self.burst = max(1, min(_BURST, int(_PATIENCE / a_step)))
        return chosen

    def _plain_ends(self) -> Ends | None:
        """How rows end, where nothing is asked for but the likeliest token."""
        plain = self.scores is None and self.logits is None and not self.plan.processors
        if self.eos is None or self.plan.config.do_sample or not plain:
            return None
        return Ends(self.eos, self.finished, 0 if self.pad is None else int(self.pad))

    def _choose(self, logits: Tensor) -> Tensor:
        kept = self.scores is not None or self.logits is not None
        raw = logits.to(dtype=torch.float32, copy=kept)
        processors: Any = self.plan.processors
        scores: Tensor = processors(self.sequences[:, : self.length], raw) if processors else raw
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(raw)
        if self.plan.config.do_sample:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = _largest(scores)
        if self.ends_early:
            tokens = torch.where(self.finished, self.pad, tokens)
        return tokens

    def _append(self, chosen: Tensor) -> bool:
        """Adds tokens [steps, B] to the rows; returns whether those were the last."""
        begin, self.length = self.length, self.length + len(chosen)
        self.sequences[:, begin : self.length] = chosen.T
        if self.eos is None:
            scores = None if self.scores is None else tuple(self.scores)
            self.finished |= self.plan.criteria(self.sequences[:, : self.length], scores)
        elif self.eos.numel():
            self.finished |= torch.isin(chosen, self.eos).any(dim=0)
        if self.streamer is not None:
            for tokens in chosen:
                self.streamer.put(tokens.cpu())
        return self.length >= self.plan.max_length or bool(self.finished.all())

    def _result(self) -> Any:
        sequences: Any = (
            self.sequences if self.length == self.plan.max_length else self.sequences[:, : self.length].clone()
        )
        if not self.plan.config.return_dict_in_generate:
            return sequences
        steps: dict[str, Any] = {"scores": self.scores, "logits": self.logits}
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            **{name: None if values is None else tuple(values) for name, values in steps.items()},
            past_key_values=self.decoder.cache,
        )


def _largest(scores: Tensor) -> Tensor:
    """argmax of each row; numpy's takes a tenth of the time of torch's, which is that of a small model's layer."""
    if scores.device.type != "cpu":
        return scores.argmax(dim=-1)
    return torch.from_numpy(scores.numpy().argmax(axis=-1))


def _eos_alone(criteria: StoppingCriteriaList) -> Tensor | None:
    """The end tokens, where nothing but they and the length stop generation: the loop then checks both by itself."""
    if any(type(criterion) not in (MaxLengthCriteria, EosTokenCriteria) for criterion in criteria):
        return None
    ends = [criterion.eos_token_id for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
    return torch.cat(ends).long() if ends else torch.empty(0, dtype=torch.long)
