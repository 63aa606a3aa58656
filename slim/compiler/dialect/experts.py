"""Mixture of experts: a linear whose weight is chosen per row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slim.compiler.dialect._register import define


def _expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    """y[t] = weight[expert[t]] x[t] + bias[expert[t]] for x [T,n], weight [E,m,n], expert [T].

    Only the experts that some row asks for are read.
    """
    y = x.new_empty(x.shape[0], weight.shape[1])
    for index in torch.unique(expert).tolist():
        rows = (expert == index).nonzero(as_tuple=True)[0]
        y[rows] = F.linear(x[rows], weight[index], None if bias is None else bias[index])
    return y


def _expert_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


define(
    "expert_linear(Tensor x, Tensor weight, Tensor? bias, Tensor expert) -> Tensor",
    _expert_linear,
    _expert_linear_fake,
)
