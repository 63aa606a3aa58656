"""Calling a compiled model as the original was called: arguments in, the original's own output object out."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from slim import errors
from slim.compiler.inputs import checked_mask, checked_positions, checked_tokens
from slim.runtime.architecture import loss_function, number_real_tokens
from slim.runtime.cache import KVCache
from slim.runtime.paged import PagedKVCache

if TYPE_CHECKING:
    from slim.runtime.compiled import CompiledModel

# What transformers' models take and slim's do not: None and False leave them out, anything else is refused.
_NOT_HERE = frozenset({
    "inputs_embeds", "output_attentions", "output_hidden_states", "output_router_logits", "cache_position",
    "head_mask", "encoder_hidden_states", "encoder_attention_mask", "token_type_ids",
})  # fmt: skip


def _refuse_unknown(kwargs: dict[str, Any], model: CompiledModel) -> None:
    for name, value in kwargs.items():
        if name not in _NOT_HERE:
            known = ", ".join(value.name for value in model.program.inputs)
            raise errors.BadInput(
                argument=name,
                reason=f"the model has no such argument; its inputs are {known}",
                of="slim.CompiledModel.__call__",
            )
        if value is not None and value is not False:
            raise errors.BadInput(
                argument=name,
                reason="it was not part of what was compiled; leave it out",
                of="slim.CompiledModel.__call__",
            )


def check_cache(cache: Any, model: CompiledModel, batch: int) -> None:
    """Raises CacheMismatch where ``cache`` was not made by this model, for this batch."""
    kind = PagedKVCache if model.paged else KVCache
    if not isinstance(cache, kind):
        raise errors.CacheMismatch(expected=f"a {kind.__name__} of this model", got=f"a {type(cache).__name__}")
    if cache.slots != model.slots:
        expected, got = (f"of {len(layers)} layers {list(layers[:1])}" for layers in (model.slots, cache.slots))
        raise errors.CacheMismatch(expected=expected, got=got)
    if cache.batch != batch:
        raise errors.CacheMismatch(expected=f"for {batch} rows", got=f"for {cache.batch}")


# -- causal language models --------------------------------------------------------------------------------------------


def call_language_model(
    model: CompiledModel,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: KVCache | PagedKVCache | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    return_dict: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    num_items_in_batch: Any = None,
    **kwargs: Any,
) -> Any:
    """See ``CompiledModel.__call__``."""
    _refuse_unknown(kwargs, model)
    if past_key_values is not None and use_cache is False:
        raise errors.ContradictoryOptions(a="past_key_values", b="use_cache=False", reason="the cache goes on growing")
    tokens = checked_tokens(input_ids, model.vocabulary)
    cache = past_key_values
    if cache is not None:
        check_cache(cache, model, tokens.shape[0])
    elif use_cache:
        cache = model.new_cache(tokens.shape[0], tokens.shape[1])
    past = 0 if cache is None else cache.get_seq_length()
    mask = _mask(tokens, attention_mask, cache)
    inputs = {
        "input_ids": tokens,
        "attention_mask": mask[:, past:],
        "position_ids": _positions(model, tokens, mask, position_ids, given=attention_mask is not None),
    }
    outputs = model.run(inputs) if cache is None else _cached(model, cache, mask, inputs)
    result = _rebuild(model, outputs)
    logits = result.logits
    extra: dict[str, Any] = {"loss": None if labels is None else _loss(model, logits, labels, num_items_in_batch)}
    extra["logits"] = _kept(logits, logits_to_keep)
    if cache is not None:
        extra["past_key_values"] = cache
    return _returned(model, _with(result, extra), return_dict)


def _mask(tokens: Tensor, given: Tensor | None, cache: KVCache | PagedKVCache | None) -> Tensor:
    past = 0 if cache is None else cache.get_seq_length()
    if given is not None:
        return checked_mask(given, tokens, past)
    new = torch.ones_like(tokens)
    return new if cache is None else torch.cat([cache.columns.long(), new], dim=1)


def _positions(model: CompiledModel, tokens: Tensor, mask: Tensor, positions: Any, given: bool) -> Tensor:
    """Those given, or those that the original model would have made up for this mask."""
    past = mask.shape[1] - tokens.shape[1]
    if positions is None:
        every = torch.arange(mask.shape[1], device=tokens.device).expand(mask.shape)
        if given and bool((mask == 0).any()) and _takes(model, "position_ids") and model.counts_real_tokens:
            every = number_real_tokens(mask)
        positions = every[:, past:]
    return checked_positions(positions, tokens, model.position_limit)


def _takes(model: CompiledModel, name: str) -> bool:
    return any(value.name == name for value in model.program.inputs)


def _cached(
    model: CompiledModel, cache: KVCache | PagedKVCache, mask: Tensor, inputs: dict[str, Tensor]
) -> tuple[Any, ...]:
    masked = bool((mask == 0).any())
    past = cache.get_seq_length()
    step: Any = model.step(masked=masked)
    cache.remask(mask[:, :past].bool())
    new = mask[:, past:].bool()
    outputs: tuple[Any, ...] = step(cache, new, inputs)
    return outputs


def _kept(logits: Tensor, keep: int | Tensor) -> Tensor:
    """The last ``keep`` tokens, all for 0, or those at the indices given."""
    if isinstance(keep, Tensor):
        return logits[:, keep]
    return logits[:, -keep:] if keep else logits


def _loss(model: CompiledModel, logits: Tensor, labels: Tensor, items: Any) -> Tensor:
    if labels.shape != logits.shape[:2]:
        reason = f"they must be {list(logits.shape[:2])}, one a token, not {list(labels.shape)}"
        raise errors.BadInput(argument="labels", reason=reason, of="slim.CompiledModel.__call__")
    options = {} if items is None else {"num_items_in_batch": items}
    vocab = model.config.get_text_config().vocab_size
    loss: Tensor = loss_function(model.program.facts)(logits=logits, labels=labels, vocab_size=vocab, **options)
    return loss


# -- encoders ----------------------------------------------------------------------------------------------------------


def call_encoder(
    model: CompiledModel, input_ids: Tensor | None = None, *, return_dict: bool | None = None, **kwargs: Any
) -> Any:
    """See ``CompiledModel.__call__``; attention_mask defaults to ones, token_type_ids to zeros."""
    names = [value.name for value in model.program.inputs]
    given = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
    _refuse_unknown(kwargs, model)
    if "input_ids" in names:
        tokens = checked_tokens(input_ids, model.vocabulary)
        given["input_ids"] = tokens
        given.setdefault("attention_mask", torch.ones_like(tokens))
        given.setdefault("token_type_ids", torch.zeros_like(tokens))
        if "position_ids" in names:
            positions = given.get("position_ids", torch.arange(tokens.shape[1], device=tokens.device)[None])
            given["position_ids"] = checked_positions(positions, tokens, model.position_limit)
        given["attention_mask"] = checked_mask(given["attention_mask"], tokens)
    missing = [name for name in names if name not in given]
    if missing:
        raise errors.BadInput(argument=missing[0], reason="the model needs it", of="slim.CompiledModel.__call__")
    return _returned(model, _rebuild(model, model.run(given)), return_dict)


# -- other modules -----------------------------------------------------------------------------------------------------


def call_module(model: CompiledModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """See ``CompiledModel.__call__``: arguments nested as in the example the module was lifted with."""
    inputs = model.program.inputs
    tensors = _by_name(model, args, kwargs) if kwargs else None
    if tensors is None:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if leaf is not None]
    if len(tensors) != len(inputs) or not all(isinstance(value, Tensor) for value in tensors):
        found = ", ".join(type(value).__name__ for value in tensors) or "nothing"
        wanted = ", ".join(f"{value.name} {list(value.shape)}" for value in inputs)
        reason = f"the module was compiled for {len(inputs)} tensors ({wanted}), all else being fixed; got {found}"
        raise errors.BadInput(argument="arguments", reason=reason, of="slim.CompiledModel.__call__")
    sizes: dict[str, int] = {}
    for value, tensor in zip(inputs, tensors, strict=True):
        _check_shape(value, tensor, sizes)
    return _rebuild(model, model.run({v.name: t for v, t in zip(inputs, tensors, strict=True)}))


def _by_name(model: CompiledModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """Plain tensors by position and then by name; None where the arguments nest."""
    names = [value.name for value in model.program.inputs]
    if set(kwargs) - set(names):
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [given[name] for name in names] if len(given) == len(args) + len(kwargs) == len(names) else None


def _check_shape(value: Any, tensor: Tensor, sizes: dict[str, int]) -> None:
    """A named size must be the same wherever it stands; a number must be that number."""
    fits = tensor.dim() == len(value.shape) and tensor.dtype == value.dtype
    for expected, found in zip(value.shape, tensor.shape, strict=False):
        fits = fits and found == (sizes.setdefault(expected, found) if isinstance(expected, str) else expected)
    if not fits:
        known = {name: size for name, size in sizes.items() if name in value.shape}
        reason = f"it must be {value.dtype} {list(value.shape)} {known or ''}, not {tensor.dtype} {list(tensor.shape)}"
        raise errors.BadInput(argument=value.name, reason=reason, of="slim.CompiledModel.__call__")


# -- results -----------------------------------------------------------------------------------------------------------


def _rebuild(model: CompiledModel, outputs: tuple[Any, ...]) -> Any:
    """The object that the original returned, filled with ``outputs``."""
    facts = model.program.facts
    if facts.kind != "module":
        import transformers.modeling_outputs  # noqa: F401  its output classes register themselves
    return pytree.tree_unflatten(list(outputs), _spec(facts.out_spec))


@functools.lru_cache(maxsize=64)
def _spec(text: str) -> pytree.TreeSpec:
    return pytree.treespec_loads(text)


def _with(result: Any, values: dict[str, Any]) -> Any:
    """A copy of a transformers output with some fields set; those it does not have are refused by its class."""
    fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    if "past_key_values" in values and "past_key_values" not in fields:  # GPT-1: its own class never heard of a cache
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(
            **{**fields, **{name: value for name, value in values.items() if value is not None}}
        )
    return type(result)(**{**fields, **{name: value for name, value in values.items() if value is not None}})


def _returned(model: CompiledModel, result: Any, return_dict: bool | None) -> Any:
    wanted = model.config.return_dict if return_dict is None else return_dict
    return result if wanted else result.to_tuple()
