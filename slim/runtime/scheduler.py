"""Many requests at once over one pool of pages: continuous batching.

Prompts are run a piece at a time between bursts of decoding, so that those who wait for their next token do not wait
for another's prompt. Who came first is served first; when pages run out, the youngest gives its own back and is
computed again later.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slim import errors
from slim.codegen import Ends, GreedySteps
from slim.compiler.inputs import POSITIONS
from slim.compiler.patterns import read_pattern
from slim.compiler.rules import argument
from slim.runtime.detokenize import Detokenizer
from slim.runtime.paged_steps import PagedStep
from slim.runtime.pages import PAGE, PagePool, Row, Stats, stats
from slim.runtime.prefixes import Prefixes
from slim.runtime.request import Request, end_tokens, prompt_tokens
from slim.runtime.sampling import Sampling, drawn

if TYPE_CHECKING:
    from slim.runtime.compiled import CompiledModel

_BURST = 16  # steps of decoding between two looks at who waits


@dataclass
class _Batch:
    """The rows that decode together, bound to their pages; made anew when others join or leave."""

    requests: list[Request]
    tokens: Tensor
    positions: Tensor
    table: Tensor
    lengths: Tensor
    ends: Ends
    greedy: GreedySteps | None
    bound: Any
    layout: tuple[int, list[int]]


class Scheduler:
    """Serves requests over one pool of pages.

    Args:
        model: compiled with ``KVCacheConfig(layout="paged")``.
        max_tokens: that all requests together may hold, rounded up to whole pages; the pool's size.
        max_batch: requests that decode at the same time.
        chunk: tokens of prompts that are run between two bursts of decoding.
        share_prefixes: whether prompts that begin alike share pages.
        eos_token_id: what ends a request; None takes the model's own, an empty list none.
        tokenizer: of transformers; with one, ``request.stream()`` gives text, which a thread makes beside the work.

    Raises:
        CacheUnsupported: where the model's cache is not in pages, or keeps a window alone; where what a token sees
            hangs on how its prompt is cut.

    Example:
        >>> scheduler = Scheduler(compiled, max_tokens=8192)
        >>> requests = [scheduler.submit(prompt, max_new_tokens=64) for prompt in prompts]
        >>> scheduler.run()
        >>> [request.tokens for request in requests]
    """

    def __init__(
        self,
        model: CompiledModel,
        *,
        max_tokens: int = 65536,
        max_batch: int = 32,
        chunk: int = 256,
        share_prefixes: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        tokenizer: Any = None,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("max_batch", max_batch), ("chunk", chunk)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise errors.BadInput(argument=name, reason=f"{value!r} is no number above 0", of="slim.Scheduler")
        if not isinstance(share_prefixes, bool):
            reason = f"it is True or False, not {share_prefixes!r:.40}"
            raise errors.BadInput(argument="share_prefixes", reason=reason, of="slim.Scheduler")
        if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
            reason = f"it is what decodes tokens, not {tokenizer!r:.40}"
            raise errors.BadInput(argument="tokenizer", reason=reason, of="slim.Scheduler")
        if not model.paged or model.kv_cache.window is not None:
            wanted = 'compile with kv_cache=KVCacheConfig(layout="paged")'
            raise errors.CacheUnsupported(reason=f"a scheduler shares pages that keep all tokens: {wanted}")
        patterns = (argument(node, "pattern") for node in model.program.attention_nodes())
        if any(text is not None and read_pattern(text).vote for text in patterns):
            reason = "vertical_slash keeps what the last tokens of a prompt look at, and a scheduler runs it in pieces"
            raise errors.CacheUnsupported(reason=reason)
        self.model, self.max_batch, self.chunk = model, max_batch, chunk
        step = model.step(last_only=True)
        assert isinstance(step, PagedStep)
        self._step = step
        limit = -(-max_tokens // PAGE)
        self.pool = PagePool(model.slots, min(limit, 4 * max_batch), limit, model.device)
        self.prefixes = Prefixes(self.pool) if share_prefixes else None
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        ends = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        self._ends = end_tokens(ends, model.vocabulary).to(model.device)
        self._last = frozenset(self._ends.tolist())
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # in the order they came
        self._batch: _Batch | None = None
        self._numbers = itertools.count()
        self._lock = threading.RLock()

    # -- what users do -----------------------------------------------------------------------------------------------

    def submit(
        self, input_ids: Tensor | Sequence[int], max_new_tokens: int, sampling: Sampling | None = None
    ) -> Request:
        """Adds a request, from any thread; it starts when its turn comes and there is room.

        Args:
            input_ids: of one prompt, [S] or [1, S].
            sampling: how its tokens are drawn; None takes the likeliest.

        Raises:
            EmptyPrompt, TokenOutOfRange, BadInput. PromptTooLong: where it could never fit.
        """
        prompt = prompt_tokens(input_ids, self.model.vocabulary)
        if sampling is not None and not isinstance(sampling, Sampling):
            raise errors.BadInput(
                argument="sampling",
                reason=f"it must be a slim.Sampling, not {sampling!r:.40}",
                of="slim.Scheduler.submit",
            )
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise errors.BadInput(
                argument="max_new_tokens",
                reason=f"{max_new_tokens!r} is no number of tokens",
                of="slim.Scheduler.submit",
            )
        total = len(prompt) + max_new_tokens - 1  # the last token is returned, and never run
        assert self.pool.limit is not None
        limits = (
            ("a scheduler's max_tokens of", self.pool.limit * PAGE),
            (POSITIONS, self.model.position_limit),
            ("a cache of", self.model.kv_cache.max_tokens),
        )
        for room, limit in limits:
            if limit is not None and total > limit:
                raise errors.PromptTooLong(length=total, capacity=limit, room=room)
        with self._lock:
            request = Request(self, next(self._numbers), prompt, max_new_tokens, sampling)
            self._begin_text(request)
            self._waiting.append(request)
        return request

    def fork(self, request: Request, sampling: Sampling | None = None) -> Request:
        """Another request that goes on from where one is, over the same pages.

        Args:
            sampling: how its tokens are drawn; None takes the likeliest, however those so far were drawn.

        Raises:
            BadInput: for one that is done, or that another scheduler has.
        """
        self._check_own(request)
        if sampling is not None and not isinstance(sampling, Sampling):
            raise errors.BadInput(argument="sampling", reason=f"{sampling!r:.40} is none", of="slim.Scheduler.fork")
        with self._lock:
            if request.done:
                raise errors.BadInput(argument="request", reason=f"{request} does not go on", of="slim.Scheduler.fork")
            twin = Request(self, next(self._numbers), list(request.prompt), request.limit, sampling)
            twin.tokens = list(request.tokens)
            self._begin_text(twin)
            self._write(twin, twin.tokens)
            if request.row is not None and request in self._running and len(self._running) < self.max_batch:
                twin.row, twin.state = request.row.fork(), "running"
                self._running.append(twin)
                self._batch = None
            else:
                self._waiting.append(twin)
            return twin

    def cancel(self, request: Request) -> None:
        """See ``Request.cancel``; one that is done stays as it is. Raises BadInput for another scheduler's."""
        self._check_own(request)
        with self._lock:
            if request.done:
                return
            if request in self._waiting:
                self._waiting.remove(request)
            self._leave(request, "cancelled")

    def _check_own(self, request: Request) -> None:
        if not isinstance(request, Request) or request.scheduler is not self:
            reason = f"{request!r:.60} is no request of this scheduler"
            raise errors.BadInput(argument="request", reason=reason, of="slim.Scheduler")

    def advance(self) -> bool:
        """A piece of a prompt, then a burst of decoding; False where there is nothing to do."""
        with self._lock:
            self._admit()
            worked = self._prefill()
            return self._decode() or worked

    def run(self) -> None:
        """Works until every request is done."""
        while self.advance():
            pass

    def stats(self) -> Stats:
        """Of the pool; pages that only shared prompts name count as taken."""
        with self._lock:
            return stats(self.pool, [request.row for request in self._running if request.row is not None])

    # -- who runs ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Lets in who waits, first come first served, while there are pages for their prompts."""
        while self._waiting and len(self._running) < self.max_batch:
            request = self._waiting[0]
            known = request.known
            shared = self.prefixes.known(known) if self.prefixes else 0
            growing = len(self._running)  # each of them may soon want a page more
            if not self._have(-(-len(known) // PAGE) - shared + 1 + growing) and self._running:
                return
            self._waiting.popleft()
            request.row = self.prefixes.begin(known) if self.prefixes else Row(self.pool)
            request.state = "running"
            self._running.append(request)
            self._running.sort(key=lambda other: other.number)
            self._batch = None

    def _have(self, pages: int) -> bool:
        """Whether so many pages can be taken, those of forgotten prompts among them."""
        assert self.pool.available is not None
        short = pages - self.pool.available
        return short <= 0 or (self.prefixes is not None and self.prefixes.evict(short) >= short)

    def _reserve(self, request: Request, tokens: int) -> bool:
        """Makes room for tokens of a request; the youngest others give theirs, then the request its own."""
        row = request.row
        assert row is not None
        while not self._have(row.missing(tokens)):
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        row.reserve(tokens)
        return True

    def _preempt(self, request: Request) -> None:
        request.preempted += 1
        self._leave(request, "waiting")
        self._waiting.appendleft(request)

    def _leave(self, request: Request, state: str) -> None:
        request.state = state
        if request.done:
            self._write(request, [])
        if request.row is not None:
            request.row.free()
            request.row = None
        if request in self._running:
            self._running.remove(request)
            self._batch = None

    # -- running prompts ---------------------------------------------------------------------------------------------

    def _prefill(self) -> bool:
        """Up to ``chunk`` tokens of prompts, the oldest first."""
        left, worked = self.chunk, False
        for request in list(self._running):
            if left <= 0:
                break
            if request.state == "running" and self._behind(request) > 0:
                left -= self._run_prompt(request, left)
                worked = True
        return worked

    @staticmethod
    def _behind(request: Request) -> int:
        """Tokens that are still to be run before the next can be chosen by decoding; all but the newest."""
        assert request.row is not None
        missing = len(request.known) - request.row.length
        return missing if not request.tokens or missing > 1 else 0

    def _run_prompt(self, request: Request, most: int) -> int:
        known, row = request.known, request.row
        assert row is not None
        count = min(self._behind(request), most)
        if not self._reserve(request, count):
            return count
        start = row.length
        logits = self._call([row], torch.tensor([known[start : start + count]]), torch.tensor([[start]]))
        row.length += count
        if row.length == len(known):
            if self.prefixes is not None:
                self.prefixes.learn(known, row)
            self._take(request, _next([request], logits).tolist())
        return count

    def _call(self, rows: list[Row], tokens: Tensor, first: Tensor) -> Tensor:
        """The logits of the last token of each row, [B, V]."""
        table, lengths = _places(rows)
        inputs = {
            "input_ids": tokens, "attention_mask": torch.ones_like(tokens),
            "position_ids": first + torch.arange(tokens.shape[1]),
        }  # fmt: skip
        device = self.model.device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        arguments = self._step.arguments(inputs, table.to(device), lengths.to(device), self.pool.tensors)
        logits: Tensor = self._step.executable(*arguments)[0]
        return logits[:, -1]

    # -- decoding ----------------------------------------------------------------------------------------------------

    def _decode(self) -> bool:
        """A burst for all whose prompts are done."""
        ready = [request for request in self._running if self._behind(request) == 0]
        steps = min([_BURST, *(request.limit - len(request.tokens) for request in ready)])
        for request in ready:
            if request.state == "running":  # one before it may have taken its pages
                self._reserve(request, steps)
        ready = [request for request in ready if request.state == "running"]
        if not ready:
            return False
        batch = self._bound(ready)
        for index, request in enumerate(ready):
            batch.tokens[index, 0] = request.tokens[-1]
            assert request.row is not None
            batch.lengths[index] = request.row.length
            batch.positions[index, 0] = request.row.length - (batch.greedy is not None)
        batch.ends.finished.zero_()
        chosen = self._chosen(batch, steps)
        for index, request in enumerate(ready):
            assert request.row is not None
            request.row.length += len(chosen)
            self._take(request, chosen[:, index].tolist())
        return True

    def _bound(self, ready: list[Request]) -> _Batch:
        rows = [request.row for request in ready if request.row is not None]
        layout = (self.pool.generation, [len(row.pages) for row in rows])
        old = self._batch
        if old is not None and old.requests == ready and old.layout == layout:
            return old
        if old is None or old.requests != ready or old.layout[0] != layout[0] or max(layout[1]) > old.table.shape[1]:
            self._batch = self._bind(ready, rows, layout)
        else:
            old.table[:, : max(layout[1])] = _places(rows)[0]
            old.layout = layout
        assert self._batch is not None
        return self._batch

    def _bind(self, ready: list[Request], rows: list[Row], layout: tuple[int, list[int]]) -> _Batch:
        device = self.model.device
        table, lengths = (value.to(device) for value in _places(rows, spare=8))
        tokens = torch.zeros(len(ready), 1, dtype=torch.int64, device=device)
        positions = torch.zeros_like(tokens)
        inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": torch.ones_like(tokens)}
        bound = self._step.executable.bind(*self._step.arguments(inputs, table, lengths, self.pool.tensors))
        ends = Ends(self._ends, torch.zeros(len(ready), dtype=torch.bool, device=device), 0)
        likeliest = all(request.sampler is None for request in ready)
        greedy = bound.greedy(self._step.feedback, None, ends) if likeliest else None
        return _Batch(ready, tokens, positions, table, lengths, ends, greedy, bound, layout)

    def _chosen(self, batch: _Batch, steps: int) -> Tensor:
        """Tokens [steps, B]: by generated code in one call, or step by step where it cannot choose them."""
        if batch.greedy is not None:
            return batch.greedy(steps, 0).cpu()
        chosen = []
        for _ in range(steps):
            tokens = _next(batch.requests, batch.bound()[0][:, -1])
            chosen.append(tokens.cpu())
            batch.tokens[:, 0] = tokens
            batch.positions += 1
            batch.lengths += 1
        return torch.stack(chosen)

    def _take(self, request: Request, tokens: list[int]) -> None:
        """Hands new tokens on; what came after the end is dropped, with the places it took."""
        for count, token in enumerate(tokens, start=1):
            request.tokens.append(token)
            if token in self._last or len(request.tokens) >= request.limit:
                self._write(request, tokens[:count])
                self._leave(request, "finished")
                return
        self._write(request, tokens)

    # -- text --------------------------------------------------------------------------------------------------------

    def _begin_text(self, request: Request) -> None:
        if self._detokenizer is not None:
            request.writing = self._detokenizer.begin(request.prompt)

    def _write(self, request: Request, tokens: Sequence[int]) -> None:
        """Has the text of ``tokens`` written; it is complete where the request is done."""
        if self._detokenizer is not None and request.writing is not None:
            self._detokenizer.add(request.writing, list(tokens), request.done)


def _next(requests: Sequence[Request], logits: Tensor) -> Tensor:
    """The next token of each request, [B], by logits [B, V]."""
    tokens = logits.float().argmax(-1)
    draws = {row: request.sampler for row, request in enumerate(requests) if request.sampler is not None}
    if draws:
        rows = list(draws)
        tokens[rows] = torch.tensor(drawn(list(draws.values()), logits[rows]), device=tokens.device)
    return tokens


def _places(rows: Sequence[Row], spare: int = 0) -> tuple[Tensor, Tensor]:
    """The pages [B, most] and the lengths [B] of rows, as kernels read them."""
    most = max(len(row.pages) for row in rows) + spare
    table = torch.zeros(len(rows), most, dtype=torch.int32)
    for index, row in enumerate(rows):
        table[index, : len(row.pages)] = torch.tensor(row.pages, dtype=torch.int32)
    return table, torch.tensor([row.length for row in rows])
