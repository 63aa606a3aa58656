"""The ``quantization_config`` of compressed-tensors: which modules hold what, and in which kind of file."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from slim.runtime.fitting import refuse, tied_names
from slim.runtime.quantised import Scheme

FORMAT = "compressed-tensors"
BITS = {"int8": 8, "int4": 4, "int3": 3, "fp8": 8}  # of what compressed-tensors can hold
PACKED, INT, NAIVE = "pack-quantized", "int-quantized", "naive-quantized"


def compression(scheme: Scheme) -> str:
    """compressed-tensors' name of the way in which a module's weight is kept."""
    if scheme.numbers == "fp8":
        return NAIVE
    return INT if scheme.numbers == "int8" and scheme.inputs else PACKED


def with_quantization(model: Any, modules: Mapping[str, Scheme], dtype: torch.dtype) -> Any:
    """The model's configuration, and what of it is quantised."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.quantization_config = quantization_config(model, modules)
    tied = tied_names(model.state_dict(keep_vars=True))
    if any(len(tied[f"{name}.weight"]) > 1 for name in modules):  # transformers ties parameters of one name alone
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def quantization_config(model: nn.Module, modules: Mapping[str, Scheme]) -> dict[str, Any]:
    """The ``quantization_config`` for modules by name: a group a scheme.

    All linears of one scheme are targeted by their class, as vLLM likes it best; else each by its name. With zero
    points, transformers is told to restore the weights as it reads them ("dequantize"): it has no place for packed
    ones, which it takes for a mismatch of shapes (compressed-tensors 0.19 and 0.20, where a model without weights is
    compressed). vLLM knows no such key.

    Raises:
        ExportUnsupported: for zero points beside another scheme, or with rounded inputs: what transformers restores it
            takes to be all of the first scheme, and it rounds no inputs then.
    """
    groups: dict[Scheme, list[str]] = defaultdict(list)
    for name, scheme in modules.items():
        groups[scheme].append(name)
    asymmetric = next((name for name, scheme in modules.items() if not scheme.symmetric), None)
    if asymmetric and (len(groups) > 1 or modules[asymmetric].inputs):
        reason = "transformers reads zero points only where all weights are quantised alike and no inputs are rounded"
        refuse(FORMAT, f"{asymmetric}.weight has zero points, and {reason}; quantise symmetrically, or all alike")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if len(groups) == 1:
        [(scheme, names)] = groups.items()
        groups[scheme] = ["Linear", *(name for name in names if name not in linears)]
    formats = {compression(scheme) for scheme in groups}
    return {
        "quant_method": FORMAT,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": _group(*item) for i, item in enumerate(groups.items())},
        "ignore": [name for name in linears if name not in modules],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        **({} if all(scheme.symmetric for scheme in groups) else {"dequantize": True}),
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": BITS[scheme.numbers],
        "type": "float" if scheme.numbers == "fp8" else "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group,
        "dynamic": False,
    }
    inputs = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": scheme.inputs,
        "group_size": None,
        "dynamic": scheme.inputs == "token",
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs if scheme.inputs else None,
        "output_activations": None,
        "format": compression(scheme),
    }
