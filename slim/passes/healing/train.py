"""The loop: batches in a seeded order, a step for each few, a held-out score now and then, and the best state kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from slim import errors
from slim.compiler.objective import Objective
from slim.compiler.passes_base import Context
from slim.compiler.program import Streaming
from slim.compiler.statistics.batches import Batch
from slim.passes.healing.checkpoint import Checkpoint
from slim.passes.healing.steps import Steps
from slim.passes.healing.student import Student

_CHECK = 25  # steps between two scorings of the held-out batches
_HELD_OUT = 8  # every eighth batch
_SCORED = 8192  # held-out tokens at most: scoring must not take longer than training
_OF_DISTANCE, _HIGHEST = 1 / 32, 0.01  # the learning rate, where none is given
_SAME = 1e-9  # a distance that is rounding: there is nothing to heal
_WARMUP, _LAST = 0.05, 0.05  # shares of the steps that the rate rises for, and of the rate that remains at the end


@dataclass(frozen=True)
class Plan:
    """How long and how fast; ``asked_by`` is the pass with its options, to know its own checkpoint again."""

    asked_by: str
    steps: int
    learning_rate: float | None
    tokens: int
    patience: int
    seed: int

    def share(self, step: int) -> float:
        """The learning rate of a step, as a share of the highest."""
        warm = max(1, round(_WARMUP * self.steps))
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Outcome:
    """Whether anything was learned, and what the user should know."""

    changed: bool
    notes: list[str] = field(default_factory=list)


@dataclass
class Best:
    """The state that scored best so far."""

    score: float
    step: int
    state: list[Tensor]
    since: int = 0  # scorings that brought nothing better


def train(
    student: Student, teacher: Streaming, objective: Objective, batches: Sequence[Batch], plan: Plan, ctx: Context
) -> Outcome:
    """Trains what ``student`` names; what it is left with scored best.

    Raises:
        NothingToHeal: where the two give the same outputs. BadInput: where there is nothing to train on.
    """
    run = _Run(student, teacher, objective, batches, plan)
    before = run.score()
    if before <= _SAME:
        raise errors.NothingToHeal(pass_name=plan.asked_by)
    return run.go(before, ctx)


class _Run:
    def __init__(
        self, student: Student, teacher: Streaming, objective: Objective, batches: Sequence[Batch], plan: Plan
    ) -> None:
        self.student, self.teacher, self.objective, self.plan = student, teacher, objective, plan
        self.device = next((p.device for p in student.parameters), torch.device("cpu"))
        self.seen, self.held_out = _split(batches)
        self.highest = plan.learning_rate or self._rate_for_the_distance()
        self.optimizer = Steps(*student.split, self.highest)

    # -- one step ------------------------------------------------------------------------------------------------------

    def _rate_for_the_distance(self) -> float:
        """By the divergence itself: cross-entropy, and what is divided by a temperature, are of other sizes."""
        plain = replace(self.objective, mix=0.0, temperature=1.0)
        return min(_OF_DISTANCE * self.score(plain), _HIGHEST)

    def loss(self, batch: Batch, objective: Objective | None = None) -> Tensor:
        inputs = [value.to(self.device) for value in batch.inputs]
        with torch.no_grad():
            wanted = self.teacher.run(*inputs)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        return (objective or self.objective).loss(self.student.outputs(inputs), wanted, batch)

    @torch.enable_grad()
    def step(self, step: int, batches: Sequence[Batch]) -> None:
        """One update, over ``batches`` one after the other."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.highest * self.plan.share(step)
        self.optimizer.zero_grad()
        total = sum(batch.tokens for batch in batches)
        for batch in batches:
            (self.loss(batch) * (batch.tokens / total)).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters, 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def score(self, objective: Objective | None = None) -> float:
        """The loss of the held-out batches, or another objective's, a mean over tokens."""
        total = sum(batch.tokens for batch in self.held_out)
        return sum(float(self.loss(batch, objective)) * batch.tokens / total for batch in self.held_out)

    # -- all steps -----------------------------------------------------------------------------------------------------

    def go(self, before: float, ctx: Context) -> Outcome:
        plan, parameters = self.plan, self.student.parameters
        checkpoint = Checkpoint.of(self.student.program, [*self.seen, *self.held_out], plan.asked_by)
        best = Best(before, 0, [parameter.detach().clone() for parameter in parameters])
        first = checkpoint.restore(self.optimizer, parameters, best)
        done = first
        for step, batches in enumerate(_in_order(self.seen, plan)):
            if step < first:
                continue
            ctx.progress(f"{plan.asked_by}: healing", step, plan.steps)
            self.step(step, batches)
            done = step + 1
            if done % _CHECK == 0 or done == plan.steps:
                self._note(best, done)
                if best.since >= plan.patience:
                    break
                checkpoint.save(done, self.optimizer, parameters, best)
        ctx.progress(f"{plan.asked_by}: healing", plan.steps, plan.steps)
        self._take(best)
        checkpoint.drop()
        return Outcome(best.step > 0, self._told(before, best, done))

    def _note(self, best: Best, step: int) -> None:
        score = self.score()
        if score < best.score:
            best.score, best.step, best.since = score, step, 0
            best.state = [parameter.detach().clone() for parameter in self.student.parameters]
        else:
            best.since += 1

    @torch.no_grad()
    def _take(self, best: Best) -> None:
        for parameter, kept in zip(self.student.parameters, best.state, strict=True):
            parameter.copy_(kept)

    def _told(self, before: float, best: Best, done: int) -> list[str]:
        tokens, held = (sum(batch.tokens for batch in part) for part in (self.seen, self.held_out))
        on = (
            f"{held:,} held-out tokens"
            if self.seen is not self.held_out
            else "the data trained on (too few to hold out)"
        )
        notes = [
            f"the distance from the original fell from {before:.4f} to {best.score:.4f} on {on}, "
            f"trained on {tokens:,} tokens at a rate of {self.highest:.1g}"
        ]
        if done < self.plan.steps:
            notes.append(
                f"it ended after {done} of {self.plan.steps} steps: the last {best.since} scorings were no better"
            )
        if best.step < done:
            notes.append(f"what it learned by step {best.step} scored best, and was kept")
        return notes


def _split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(to train on, to score on): the same where there are too few to hold some out."""
    if len(batches) < 2:
        return list(batches), list(batches)
    every = min(_HELD_OUT, len(batches))
    chosen = set(range(every - 1, len(batches), every))
    held: list[Batch] = []
    for index in sorted(chosen):
        if not held or sum(batch.tokens for batch in held) < _SCORED:
            held.append(batches[index])
    return [batch for index, batch in enumerate(batches) if index not in chosen], held


def _in_order(batches: Sequence[Batch], plan: Plan) -> Iterator[list[Batch]]:
    """The batches of each step: all of them in a new order, again and again, as many at once as make the tokens."""
    generator = torch.Generator().manual_seed(plan.seed)
    waiting: list[int] = []
    for _ in range(plan.steps):
        chosen: list[Batch] = []
        while sum(batch.tokens for batch in chosen) < plan.tokens:
            waiting = waiting or torch.randperm(len(batches), generator=generator).tolist()
            chosen.append(batches[waiting.pop()])
        yield chosen
