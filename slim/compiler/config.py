"""The model's configuration as transformers has it, and a model without weights to ask what it says."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from slim import errors
from slim.compiler.program import Facts

# What configurations call the number of kv heads.
KV_HEADS = ("num_key_value_heads", "num_kv_heads")


def rebuild_config(facts: Facts) -> Any:
    """The transformers configuration that the facts describe; None for a model that is not transformers'."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    if facts.config is None:
        return None
    kind = str(facts.config.get("model_type"))
    if kind in CONFIG_MAPPING:
        return CONFIG_MAPPING[kind].from_dict(facts.config)
    return PreTrainedConfig.from_dict(facts.config)


def empty_model(facts: Facts, **options: Any) -> Any:
    """The architecture with its weights on the meta device, which hold shapes and no memory.

    Raises:
        UnsupportedModel: where this transformers has no such architecture.
    """
    import transformers

    kind = getattr(transformers, facts.architecture, None)
    if kind is None or facts.config is None:
        reason = f"transformers {transformers.__version__} has no class of that name"
        raise errors.UnsupportedModel(model=facts.architecture or "the model", reason=reason)
    with torch.device("meta"):
        return kind._from_config(rebuild_config(facts), **options).eval()


def is_valid(facts: Facts, config: dict[str, Any]) -> bool:
    """Whether transformers takes ``config`` for the model's configuration."""
    log = logging.getLogger("transformers.configuration_utils")
    heard, log.disabled = log.disabled, True  # it prints a configuration that it refuses
    try:
        rebuild_config(replace(facts, config=config))
    except Exception:  # what a configuration class raises is its own affair
        return False
    finally:
        log.disabled = heard
    return True
