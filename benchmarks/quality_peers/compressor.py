"""llm-compressor: round to nearest, GPTQ (its default order of columns), AWQ and SmoothQuant, on its own defaults.

A quantised model stays in memory as it is after ``oneshot``: each linear rounds its weight, and its inputs where the
recipe says so, as compressed-tensors defines it.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, cast

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache

if not torch.accelerator.is_available():  # AWQ pins its cache for copies to a device, which torch then refuses
    IntermediatesCache.pin_memory = lambda self, index: None


def versions() -> dict[str, str]:
    """Of what decides the result."""
    return {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}


def quantised(
    model: Any, recipe: dict[str, Any], calibration: list[list[int]], skipped: list[str]
) -> tuple[Any, float]:
    """The model, and the bits of a quantised weight: numbers, scales of 16 bits, zero points."""
    data = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration])
    longest = max(map(len, calibration))
    oneshot(
        model=model, dataset=data, recipe=_modifiers(recipe, skipped if "group" in recipe else skipped[:1]),
        max_seq_length=longest, num_calibration_samples=len(calibration), shuffle_calibration_samples=False,
    )  # fmt: skip
    return model, _bits(model)


def _modifiers(recipe: dict[str, Any], skipped: list[str]) -> list[Any]:
    grouped, zeros = recipe.get("group"), bool(recipe.get("zeros"))
    weights = dict(
        num_bits=recipe["bits"], type="int", symmetric=not zeros, dynamic=False, group_size=grouped,
        strategy="group" if grouped else "channel",
    )  # fmt: skip
    inputs = dict(num_bits=8, type="int", symmetric=True, dynamic=True, strategy="token")
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if recipe.get("inputs") else None}
    options: Any = dict(config_groups={"group_0": group}, ignore=skipped)
    found: list[Any] = []
    if "smooth" in recipe:
        found.append(SmoothQuantModifier(smoothing_strength=recipe["smooth"]))
    if recipe["method"] == "awq":
        found.append(AWQModifier())
    return [*found, GPTQModifier(**options) if recipe["method"] == "gptq" else QuantizationModifier(**options)]


def _bits(model: torch.nn.Module) -> float:
    total = numbers = 0
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        weight, scale = cast(torch.Tensor, module.weight), cast(torch.Tensor, module.weight_scale)
        numbers += weight.numel()
        total += weight.numel() * scheme.weights.num_bits + scale.numel() * 16
        total += 0 if scheme.weights.symmetric else scale.numel() * scheme.weights.num_bits
    return total / numbers
