"""Tracing a transformers model so that attention, masks and experts come out as single nodes.

While a model is traced, its configs name "slim" as implementation of attention, masks and experts; afterwards all
of it is as it was. Models that do not use transformers' attention interface are traced as they are (sdpa or eager)
with only the mask replaced, and rules raise their attention later.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slim import errors

# What models hand through to every attention function without meaning for its result.
_IRRELEVANT = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "past_key_values",
        "past_key_value",
        "layer_idx",
        "position_embeddings",
        "is_causal",
        "output_router_logits",
        "head_mask",
        "deterministic",
        "logits_to_keep",
        "num_items_in_batch",
    }
)


@contextlib.contextmanager
def traced(model: PreTrainedModel) -> Iterator[None]:
    """Routes ``model``'s attention, masks and experts into slim ops for the duration of a trace."""
    layers = itertools.count()

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        return _attention(next(layers), module, query, key, value, attention_mask, **options), None

    implementation = _implementation(model)
    experts = _experts_interface()
    settings = {"_attn_implementation_internal": implementation, "use_cache": False}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_registered(ALL_MASK_ATTENTION_FUNCTIONS, implementation, _mask_function(implementation)))
        if implementation == "slim":
            stack.enter_context(_registered(ALL_ATTENTION_FUNCTIONS, "slim", attention))
        if experts is not None:
            stack.enter_context(_registered(experts, "slim", _experts))
            settings["_experts_implementation_internal"] = "slim"
        stack.enter_context(_static_rope(model))
        stack.enter_context(_set(_configs(model), settings))
        yield


@contextlib.contextmanager
def _set(configs: list[Any], settings: dict[str, Any]) -> Iterator[None]:
    """Sets attributes that the configs have, past their setters, and puts back what was there."""
    saved = [(config, {k: config.__dict__[k] for k in settings if k in config.__dict__}) for config in configs]
    try:
        for config, before in saved:
            config.__dict__.update({name: settings[name] for name in before})
        yield
    finally:
        for config, before in saved:
            config.__dict__.update(before)


@contextlib.contextmanager
def _static_rope(model: PreTrainedModel) -> Iterator[None]:
    """Rotary modules that choose their frequencies by the longest position use the ones they start with.

    ``longest_static_position`` says how far that holds; the Program refuses longer sequences.
    """
    patched = [m for m in model.modules() if _chooses_by_length(m)]
    for module in patched:
        module.forward = types.MethodType(inspect.unwrap(type(module).forward), module)
    try:
        yield
    finally:
        for module in patched:
            del module.__dict__["forward"]


def _chooses_by_length(module: nn.Module) -> bool:
    return hasattr(type(module).forward, "__wrapped__") and bool(_rope_types(module) & {"dynamic", "longrope"})


def _rope_types(module: nn.Module) -> set[str]:
    kinds = getattr(module, "rope_type", None)
    return set(kinds.values()) if isinstance(kinds, dict) else {kinds} if isinstance(kinds, str) else set()


def longest_static_position(model: PreTrainedModel) -> int | None:
    """The number of positions up to which a length-dependent rotary module uses its first frequencies."""
    limits = []
    for module in model.modules():
        if _chooses_by_length(module):
            config: Any = module.config
            original = (getattr(config, "rope_parameters", None) or {}).get("original_max_position_embeddings")
            if "longrope" not in _rope_types(module) or original is None:
                original = config.max_position_embeddings
            limits.append(int(original))
    return min(limits, default=None)


def _implementation(model: PreTrainedModel) -> str:
    """The attention to trace: slim's where the model uses the interface, else its own choice of eager and sdpa."""
    if getattr(model, "_supports_attention_backend", False) or getattr(model, "_can_set_attn_implementation", bool)():
        return "slim"
    return "sdpa" if model.config._attn_implementation == "sdpa" else "eager"


def _configs(model: PreTrainedModel) -> list[Any]:
    found = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")}
    return list(found.values())


@contextlib.contextmanager
def _registered(interface: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """``interface[name] = function`` for a while; transformers looks in the class's mapping too, so it goes there."""
    mapping = type(interface)._global_mapping
    before = mapping.get(name)
    mapping[name] = function
    try:
        yield
    finally:
        if before is None:
            del mapping[name]
        else:
            mapping[name] = before


# -- attention ---------------------------------------------------------------------------------------------------------


def _attention(
    layer: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> Tensor:
    unknown = sorted(name for name, v in options.items() if v is not None and name not in _IRRELEVANT)
    if unknown:
        reason = f"its attention passes {', '.join(unknown)}, which slim::attention does not have"
        raise errors.UnsupportedModel(model=type(module).__name__, reason=reason)
    causal, window = False, None
    if mask is None:
        asked = options.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if asked is None else asked)
        window = sliding_window if causal else None
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    out = torch.ops.slim.attention(
        query,
        key,
        value,
        None,
        mask,
        s_aux,
        None,
        layer=layer,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
    )
    return out.transpose(1, 2).contiguous()  # as transformers promises: some models view it


# -- masks -------------------------------------------------------------------------------------------------------------


def _mask_function(implementation: str) -> Callable[..., Tensor]:
    def mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Tensor:
        causal, window = describe_mask(mask_function)
        return torch.ops.slim.visibility(
            attention_mask,
            batch_size,
            q_length,
            kv_length,
            causal=causal,
            window=window,
            additive=dtype if implementation == "eager" else None,
        )

    return mask


_FAR = 1 << 17  # longer than any window a model was given so far


def describe_mask(function: Callable[..., Any] | None) -> tuple[bool, int | None]:
    """(causal, window) of a mask given as a function of (batch, head, query, key) indices.

    The function is asked, not recognised: which distances it lets through, then whether distance is all it goes by.

    Raises:
        UnsupportedModel: where no causal flag and window say what the function says.
    """
    if function is None:
        return True, None
    with _disable_current_modes():
        distances = torch.arange(-_FAR, _FAR)
        seen = _ask(function, torch.full_like(distances, 2 * _FAR), 2 * _FAR - distances)
        causal = not bool(seen[distances < 0].any())
        behind = int(seen[distances >= 0].sum())
        window = None if behind == _FAR else behind
        rows = torch.randint(0, 4 * _FAR, (4096,), generator=torch.Generator().manual_seed(0))
        near = rows - torch.randint(-64, 64 + 2 * (window or 64), (4096,), generator=torch.Generator().manual_seed(1))
        columns = near.clamp_min(0)
        expected = (columns <= rows) if causal else torch.ones_like(rows, dtype=torch.bool)
        if window is not None:
            expected &= rows - columns < window
            if not causal:
                expected &= columns - rows < window
        if not torch.equal(_ask(function, rows, columns), expected):
            raise errors.UnsupportedModel(
                model="the attention mask", reason="it is neither causal nor a sliding window of fixed size"
            )
    return causal, window


def _ask(function: Callable[..., Any], rows: Tensor, columns: Tensor) -> Tensor:
    zeros = torch.zeros_like(rows)
    try:
        seen = torch.as_tensor(function(zeros, zeros, rows, columns)).expand(rows.shape)
        known = type(seen) is Tensor
        why: str | Exception = "it is computed from the inputs, as with packing, or chunks after left padding"
    except Exception as error:  # whatever a function of the model's own raises when asked about numbers
        known, why = False, error
    if not known:
        raise errors.UnsupportedModel(model="the attention mask", reason=f"it depends on more than positions ({why})")
    return seen


# -- experts -----------------------------------------------------------------------------------------------------------


def _experts_interface() -> Any:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return None
    return ALL_EXPERTS_FUNCTIONS


def _experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Every chosen (token, expert) pair as a row: two expert linears with the module's own gate between them."""
    chosen = top_k_index.shape[-1]
    expert = top_k_index.reshape(-1)
    rows = hidden.repeat_interleave(chosen, dim=0)
    gated = getattr(module, "has_gate", True)
    first = "gate_up_proj" if gated else "up_proj"
    rows = _expert_linear(module, first, rows, expert)
    rows = module._apply_gate(rows) if gated else module.act_fn(rows)
    rows = _expert_linear(module, "down_proj", rows, expert)
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1, 1).to(rows.dtype)
    return rows.view(-1, chosen, rows.shape[-1]).sum(dim=1).to(hidden.dtype)


def _expert_linear(module: Any, name: str, rows: Tensor, expert: Tensor) -> Tensor:
    weight = getattr(module, name)
    weight = weight.transpose(1, 2) if getattr(module, "is_transposed", False) else weight
    return torch.ops.slim.expert_linear(rows, weight, getattr(module, f"{name}_bias", None), expert)
