"""Lifting transformers models: which inputs to trace with, and what to remember of the model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from transformers import PreTrainedModel

from slim import errors
from slim.compiler.lift.export import export
from slim.compiler.lift.interfaces import longest_static_position, traced
from slim.compiler.program import Facts, Program

BATCH, LENGTH = 5, 11  # sizes to trace with; unlike each other, and unlike any width


def lift_pretrained(model: PreTrainedModel, example_inputs: dict[str, Tensor] | None, source: Path | None) -> Program:
    """The raw Program of a transformers model, batch and sequence symbolic."""
    if model.config.is_encoder_decoder:
        raise errors.UnsupportedModel(
            model=type(model).__name__, reason="encoder-decoder models need two caches, which slim does not have yet"
        )
    was_training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        return _export(model, example_inputs, _facts(model, source))
    finally:
        for module in was_training:
            module.training = True


def _export(model: PreTrainedModel, example_inputs: dict[str, Tensor] | None, facts: Facts) -> Program:
    options = _constant_options(model)

    def attempt(inputs: dict[str, Tensor], shapes: dict[str, Any]) -> Program:
        with traced(model):
            return export(model, (), {**inputs, **options}, {**shapes, **dict.fromkeys(options)}, facts)

    if example_inputs is not None:
        return attempt(*_dynamic(example_inputs))
    try:
        return attempt(*_trace_inputs(model, None))
    except errors.LiftFailed as failure:
        limit = _position_limit(model)
        if limit is None or "Constraints violated" not in str(failure):
            raise
        # a table of positions that the graph cuts: it is right for shorter sequences only
        facts.max_length = limit - 1
        return attempt(*_trace_inputs(model, limit - 1))


def _position_limit(model: PreTrainedModel) -> int | None:
    names = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")
    return next((int(v) for name in names if (v := getattr(model.config, name, None))), None)


def _facts(model: PreTrainedModel, source: Path | None) -> Facts:
    causal = model.can_generate()
    return Facts(
        kind="causal_lm" if causal else "encoder",
        architecture=type(model).__name__,
        config=model.config.to_dict(),
        generation=model.generation_config.to_dict() if causal else None,
        source=source,
        max_length=longest_static_position(model),
    )


def _trace_inputs(model: PreTrainedModel, longest: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if model.main_input_name != "input_ids":
        reason = f"it takes {model.main_input_name}, whose shape slim cannot guess; pass example_inputs"
        raise errors.UnsupportedModel(model=type(model).__name__, reason=reason)
    batch, length = Dim("B"), Dim("S", max=longest)
    taken = _parameters(model)
    values = {
        "input_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
        "position_ids": torch.arange(LENGTH).repeat(BATCH, 1),
        "token_type_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long),
    }
    if model.can_generate() or not getattr(model.config, "type_vocab_size", 0):
        del values["token_type_ids"]
    if not model.can_generate():  # encoders number their own positions, some of them past the pad token
        del values["position_ids"]
    inputs = {name: value for name, value in values.items() if name in taken}
    return inputs, {name: {0: batch, 1: length} for name in inputs}


def _dynamic(example_inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    shapes = {name: dict.fromkeys(range(value.dim()), Dim.AUTO) for name, value in example_inputs.items()}
    return dict(example_inputs), shapes


def _constant_options(model: PreTrainedModel) -> dict[str, Any]:
    options = {"use_cache": False, "return_dict": True, "output_router_logits": False}
    return {name: value for name, value in options.items() if name in _parameters(model)}


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
