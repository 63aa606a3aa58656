"""The original architecture, as transformers has it."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slim.compiler.config import empty_model
from slim.compiler.lift.spelled import SpelledOut
from slim.compiler.program import Facts

log = logging.getLogger(__name__)


def rebuild_generation_config(facts: Facts) -> Any:
    """The transformers generation configuration of the model; its defaults where it has none of its own."""
    from transformers import GenerationConfig

    return GenerationConfig.from_dict(facts.generation or {})


def loss_function(facts: Facts) -> Any:
    """The loss that transformers gives this architecture, chosen by its name as transformers does."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    if facts.architecture in LOSS_MAPPING:
        return LOSS_MAPPING[facts.architecture]
    found = re.findall(f"({'|'.join(LOSS_MAPPING)})", facts.architecture)
    return LOSS_MAPPING[found[0] if found else "ForCausalLM"]


class _CumulativeSums(TorchDispatchMode):
    """Notes whether anything of ``shape`` is summed up along the way."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or (func is torch.ops.aten.cumsum.default and args[0].shape == self.shape)
        return func(*args, **(kwargs or {}))


def counts_real_tokens(facts: Facts) -> bool:
    """Whether the model, given a mask and no positions, numbers its real tokens (OPT) and not all of them (Llama).

    The architecture is asked: it runs once without weights, and one that numbers real tokens sums up the mask (others
    sum up the tokens of their experts). It is spelled out: torch has no grouped float32 products without values.
    """
    tokens = torch.zeros(1, 3, dtype=torch.long, device="meta")
    try:
        model = empty_model(facts, attn_implementation="eager")
        with SpelledOut(), _CumulativeSums(tokens.shape) as sums, torch.no_grad():
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except Exception as error:  # an architecture may do anything on tensors without values
        log.warning("cannot ask %s how it numbers padded tokens (%s): all are numbered", facts.architecture, error)
        return False
    return sums.seen


def number_real_tokens(mask: Tensor) -> Tensor:
    """Positions of real tokens from 0 on, -1 at padding, for a mask [B, T]."""
    mask = mask.long()
    return mask.cumsum(1) * mask - 1
