"""The optimiser: orthogonal steps for weight matrices, AdamW's for all else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_MOMENTUM = 0.95
_BETAS, _EPS = (0.9, 0.95), 1e-8
_ROUNDS, _QUINTIC = 5, (3.4445, -4.7750, 2.0315)  # of Newton and Schulz's iteration: singular values go to about 1


class Steps(torch.optim.Optimizer):
    """One step changes every number by about the learning rate, as AdamW does without its decay.

    Of a matrix the gradient's running mean is made orthogonal first: all its directions move alike, also those that
    few tokens ask for. PyTorch's own Muon does so in bfloat16, which most CPUs emulate.

    Sources: Jordan, Muon, 2024 (orthogonal steps); Liu et al., Muon is Scalable for LLM Training, 2025 (of a size that
    shares AdamW's rate); Loshchilov and Hutter, AdamW, 2017.

    Args:
        matrices: parameters [m, n] that get orthogonal steps. others: any.
    """

    def __init__(self, matrices: Sequence[Tensor], others: Sequence[Tensor], learning_rate: float) -> None:
        groups = [{"params": list(matrices), "orthogonal": True}, {"params": list(others), "orthogonal": False}]
        super().__init__([group for group in groups if group["params"]], {"lr": learning_rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            change = self._orthogonal if group["orthogonal"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(change(parameter.grad, self.state[parameter]), alpha=group["lr"])

    @staticmethod
    def _orthogonal(gradient: Tensor, state: dict[str, Any]) -> Tensor:
        if not state:
            state["exp_avg"] = torch.zeros_like(gradient)
        mean = state["exp_avg"].lerp_(gradient, 1 - _MOMENTUM)
        step = orthogonal(torch.lerp(gradient, mean, _MOMENTUM))
        return step * math.sqrt(max(step.shape))  # its numbers' mean square is 1

    @staticmethod
    def _adam(gradient: Tensor, state: dict[str, Any]) -> Tensor:
        if not state:
            state |= {"step": torch.zeros(()), **{key: torch.zeros_like(gradient) for key in ("exp_avg", "exp_avg_sq")}}
        count = float(state["step"].add_(1))
        mean = state["exp_avg"].lerp_(gradient, 1 - _BETAS[0])
        square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - _BETAS[1])
        first, second = (1 - beta**count for beta in _BETAS)
        return (mean / first) / ((square / second).sqrt() + _EPS)


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T, of ``matrix`` = U S V^T."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-20)
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.T
