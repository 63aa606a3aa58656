"""How far a model is from another on the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slim.compiler.program import Program
from slim.compiler.statistics.batches import Batch


@dataclass(frozen=True)
class Objective:
    """The loss of a batch, as a mean over its tokens (rows, where there are none).

    Attributes:
        speaks: whether the first output is logits of next tokens; else all float outputs are compared as they are.
        tokens: the place of the token ids among the inputs, for cross-entropy.
    """

    speaks: bool
    kind: Literal["forward", "reverse"]
    temperature: float
    mix: float
    tokens: int | None

    @classmethod
    def of(
        cls,
        program: Program,
        kind: Literal["forward", "reverse"] = "forward",
        temperature: float = 1.0,
        mix: float = 0.0,
    ) -> Objective:
        names = [item.name for item in program.inputs]
        tokens = names.index("input_ids") if "input_ids" in names else None
        return cls(program.facts.kind == "causal_lm", kind, temperature, mix, tokens)

    def loss(self, student: Sequence[Any], teacher: Sequence[Any], batch: Batch) -> Tensor:
        """A scalar; differentiable by ``student``."""
        if not self.speaks:
            pairs = zip(student, teacher, strict=True)
            floats = [pair for pair in pairs if isinstance(pair[0], Tensor) and pair[0].is_floating_point()]
            return torch.stack([_distance(a, b, batch.real) for a, b in floats]).sum()
        distance = divergence(_real(student[0], batch.real), _real(teacher[0], batch.real), self.kind, self.temperature)
        if not self.mix:
            return distance
        return (1 - self.mix) * distance + self.mix * self._cross_entropy(student[0], batch)

    def _cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        assert self.tokens is not None
        wanted = batch.inputs[self.tokens][:, 1:].to(logits.device)
        if batch.real is not None:
            wanted = wanted.masked_fill(~batch.real[:, 1:].to(logits.device), -100)  # what cross_entropy leaves out
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted.flatten())


def divergence(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """KL divergence of two sets of logits [T, V] in nats, a mean over T, times temperature^2.

    The factor keeps the size of gradients when the temperature changes (Hinton et al., 2015).
    """
    log_student, log_teacher = (F.log_softmax(logits.float() / temperature, -1) for logits in (student, teacher))
    of, to = (log_teacher, log_student) if kind == "forward" else (log_student, log_teacher)
    return F.kl_div(to, of, log_target=True, reduction="batchmean") * temperature**2


def _distance(student: Tensor, teacher: Tensor, real: Tensor | None) -> Tensor:
    """The squared error over the square of what was wanted."""
    if real is not None and student.shape[:2] == real.shape:
        student, teacher = _real(student, real), _real(teacher, real)
    wanted = teacher.float()
    return (student.float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)


def _real(value: Tensor, real: Tensor | None) -> Tensor:
    """[T, ...]: without padding."""
    return value.flatten(0, 1) if real is None else value[real.to(value.device)]
