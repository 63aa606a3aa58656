"""Generating text: transformers' options, processors and criteria around slim's own loop."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode

from slim import errors
from slim.compiler.inputs import POSITIONS, checked_mask, checked_positions, checked_tokens
from slim.runtime.loop import Loop, Plan
from slim.runtime.steps import Decoder

log = logging.getLogger(__name__)


class Generative(Protocol):
    """What generation needs of a compiled model."""

    @property
    def config(self) -> Any: ...
    @property
    def generation_config(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def vocabulary(self) -> int | None: ...
    @property
    def position_limit(self) -> int | None: ...
    def decoder(self, plan: Plan) -> Decoder: ...


def generate(
    model: Generative,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    streamer: Any = None,
    **kwargs: Any,
) -> Any:
    """See ``CompiledModel.generate``."""
    for name, setting in _take(kwargs, _OTHER_METHODS).items():
        if setting not in (None, False):
            raise errors.UnsupportedGenerateOption(option=name, reason="it asks for another way of decoding")
    tokenizer = kwargs.pop("tokenizer", None)
    host: Any = _Host(model)  # to a type checker, transformers' helpers belong to whole models
    plan = _plan(host, model, inputs, generation_config, kwargs)
    if streamer is not None:
        streamer.put(plan.tokens.cpu())
    _settle_length(host, model, plan, generation_config, kwargs)
    with _TransformersErrors():
        criteria = stopping_criteria if stopping_criteria is not None else StoppingCriteriaList()
        plan.criteria = host._get_stopping_criteria(plan.config, criteria, tokenizer=tokenizer)
        plan.config.max_length = plan.criteria.max_length or plan.config.max_length  # the caller's criterion wins
        plan.processors = host._get_logits_processor(
            generation_config=plan.config,
            input_ids_seq_length=plan.tokens.shape[1],
            encoder_input_ids=plan.tokens,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            logits_processor=logits_processor if logits_processor is not None else LogitsProcessorList(),
            device=str(plan.tokens.device),
            model_kwargs={"attention_mask": plan.mask},
        )
    _check_fits(model, plan)
    return Loop(plan, model.decoder(plan), streamer).run()


# -- options -----------------------------------------------------------------------------------------------------------

_OTHER_METHODS = (
    "assistant_model", "assistant_tokenizer", "negative_prompt_ids", "negative_prompt_attention_mask",
    "custom_generate", "trust_remote_code", "synced_gpus",
)  # fmt: skip
_INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values")
# Options of GenerationConfig that the loop, transformers' processors or its criteria carry out.
_HONOURED = frozenset({
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample",
    "use_cache", "prefill_chunk_size", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "watermarking_config", "num_return_sequences", "output_scores",
    "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id",
})  # fmt: skip
# What says nothing about the result of greedy decoding and sampling, whatever its value.
_WITHOUT_EFFECT = frozenset({
    "transformers_version", "decoder_start_token_id", "early_stopping", "length_penalty", "disable_compile",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size", "is_assistant",
    "num_beam_groups", "diversity_penalty",
})  # fmt: skip
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class _Host(GenerationMixin):
    """Stands in for the model where transformers' own helpers read its configuration."""

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, model: Generative) -> None:
        self.config = model.config
        self.generation_config = model.generation_config
        self.device = model.device

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> None:
        """Only its signature is read."""


class _TransformersErrors:
    """Turns what transformers' checks raise into slim's own error, with their text."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (ValueError, TypeError)) and not isinstance(error, errors.SlimError):
            raise errors.BadInput(
                argument="generation option", reason=str(error), of="slim.CompiledModel.generate"
            ) from error


def _take(kwargs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def _plan(host: Any, model: Generative, inputs: Any, given: GenerationConfig | None, kwargs: dict[str, Any]) -> Plan:
    if "input_ids" in kwargs and inputs is not None:
        raise errors.ContradictoryOptions(a="inputs", b="input_ids", reason="both are the prompt")
    arrived = _take(kwargs, _INPUTS)
    use_cache = kwargs.get("use_cache", None if given is None else given.use_cache)
    with _TransformersErrors():
        config, unknown = host._prepare_generation_config(given, **kwargs)
    _refuse_unknown(unknown)
    _refuse_unsupported(config)
    prompt = _prompt(inputs if inputs is not None else arrived.get("input_ids"), config)
    tokens = checked_tokens(prompt, model.vocabulary).to(model.device)
    with _TransformersErrors():
        has_mask = arrived.get("attention_mask") is not None
        host._prepare_special_tokens(config, has_mask, device=tokens.device, batch_size=tokens.shape[0])
    mask = _mask(host, config, tokens, arrived.get("attention_mask"))
    positions = _positions(tokens, mask, arrived.get("position_ids"))
    repeat = config.num_return_sequences or 1
    tokens, mask, positions = (value.repeat_interleave(repeat, dim=0) for value in (tokens, mask, positions))
    return Plan(tokens, mask, positions, config, arrived.get("past_key_values"), use_cache)


def _prompt(tokens: Any, config: Any) -> Any:
    if tokens is not None:
        return tokens
    if config.bos_token_id is None:
        raise errors.EmptyPrompt()
    return torch.tensor([[config.bos_token_id]])


def _refuse_unknown(unknown: dict[str, Any]) -> None:
    for name, value in unknown.items():
        if value not in (None, False):
            known = set(inspect.signature(GenerationConfig).parameters) | _HONOURED
            reason = "there is no such option" if name not in known else "slim's models do not return that"
            raise errors.UnsupportedGenerateOption(option=name, reason=reason)


def _refuse_unsupported(config: Any) -> None:
    """No option is ignored: one that the loop does not carry out must be at its default."""
    mode = config.get_generation_mode()
    if mode not in _MODES:
        option = f"num_beams={config.num_beams}" if "beam" in mode.value else mode.value
        raise errors.UnsupportedGenerateOption(option=option, reason="slim decodes greedily or by sampling")
    if config.guidance_scale not in (None, 1, 1.0):
        reason = "it needs a second prompt run beside the first"
        raise errors.UnsupportedGenerateOption(option=f"guidance_scale={config.guidance_scale}", reason=reason)
    defaults = {**GenerationConfig().to_dict(), **GenerationConfig._get_default_generation_params()}
    for name, value in config.to_dict().items():
        neutral = name in _HONOURED or name in _WITHOUT_EFFECT or name.startswith("_")
        if not neutral and value not in (None, False) and value != defaults.get(name) and hasattr(config, name):
            if name in defaults:
                raise errors.UnsupportedGenerateOption(option=f"{name}={value!r}", reason="slim has no such thing yet")
            log.debug("generation_config holds %s=%r, which transformers does not know either", name, value)


def _mask(host: Any, config: Any, tokens: Tensor, given: Any) -> Tensor:
    mask: Tensor
    if given is None:
        mask = host._prepare_attention_mask_for_generation(tokens, config, {})
    else:
        mask = checked_mask(given, tokens).to(tokens.device)
    if bool((mask[:, -1] == 0).any()):
        reason = "a row ends in padding; pad on the left, so that every row ends in its newest token"
        raise errors.BadInput(argument="attention_mask", reason=reason, of="slim.CompiledModel.generate")
    return mask


def _positions(tokens: Tensor, mask: Tensor, given: Any) -> Tensor:
    """As transformers' generate numbers them: real tokens from 0, padding 0."""
    if given is not None:
        return checked_positions(given, tokens, None).to(tokens.device)
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


def _settle_length(
    host: Any, model: Generative, plan: Plan, given: GenerationConfig | None, kwargs: dict[str, Any]
) -> None:
    """Completes max_length and min_length as transformers does, and checks that all of it fits."""

    def unset(name: str) -> bool:
        sources = (kwargs.get(name), getattr(given, name, None), getattr(model.generation_config, name, None))
        return all(value is None for value in sources)

    length = plan.tokens.shape[1]
    with _TransformersErrors():
        plan.config = host._prepare_generated_length(
            generation_config=plan.config,
            has_default_max_length=unset("max_length"),
            has_default_min_length=unset("min_length"),
            model_input_name="input_ids",
            inputs_tensor=plan.tokens,
            input_ids_length=length,
        )
        host._validate_generated_length(plan.config, length, unset("max_length"))


def _check_fits(model: Generative, plan: Plan) -> None:
    run = plan.max_length - 1  # the last token is returned, and never run
    if model.position_limit is not None and run > model.position_limit:
        raise errors.PromptTooLong(length=run, capacity=model.position_limit, room=POSITIONS)
    trained = getattr(model.config, "max_position_embeddings", None)
    if trained is not None and run > trained:
        log.warning("up to %d tokens are asked of a model made for %d: expect it to lose the thread", run, trained)
