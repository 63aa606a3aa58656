"""torchao: its configurations for int8, int4 and float8, with its own defaults."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import torch
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup


def versions() -> dict[str, str]:
    """Of what decides the result."""
    return {name: version(name) for name in ("torchao", "transformers", "torch")}


def quantised(
    model: Any, recipe: dict[str, Any], calibration: list[list[int]], skipped: list[str]
) -> tuple[Any, float]:
    """The model, and the bits of a quantised weight: numbers, and scales of 16 bits."""
    patterns = [re.compile(name.removeprefix("re:")) for name in (skipped if "group" in recipe else skipped[:1])]
    chosen: list[torch.nn.Linear] = []

    def choose(module: torch.nn.Module, name: str) -> bool:
        if not isinstance(module, torch.nn.Linear) or any(pattern.match(name) for pattern in patterns):
            return False
        chosen.append(module)
        return True

    bits = recipe.get("bits", 8)
    quantize_(model, _config(recipe), filter_fn=choose)
    numbers = sum(module.weight.numel() for module in chosen)
    scales = sum(
        module.out_features * (module.in_features // recipe.get("group", module.in_features)) for module in chosen
    )
    return model, bits + 16 * scales / numbers


def _config(recipe: dict[str, Any]) -> Any:
    method = recipe["method"]
    if method == "int8":
        return Int8WeightOnlyConfig()
    if method == "w8a8":
        return Int8DynamicActivationInt8WeightConfig()
    if method == "fp8":
        return Float8WeightOnlyConfig()
    more = {"intx_choose_qparams_algorithm": "hqq_scale_only"} if recipe.get("hqq") else {}
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{recipe['bits']}"), granularity=PerGroup(recipe["group"]), **more
    )
