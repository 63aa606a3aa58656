"""A compiled model: called as the original was, generates as transformers does, and can be saved and looked into."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from slim import errors
from slim.codegen import Executable, Target, select
from slim.codegen.regions.provenance import Stage
from slim.compiler.config import rebuild_config
from slim.compiler.dump import Dump
from slim.compiler.inputs import position_limit, vocabulary
from slim.compiler.notebook import program_html, report_html, together
from slim.compiler.program import Program
from slim.compiler.rounded_kv import pair_bits
from slim.runtime import calls, generation
from slim.runtime.architecture import counts_real_tokens, rebuild_generation_config
from slim.runtime.binding import bind_cache, cache_slots, check_cacheable
from slim.runtime.cache import KVCache, KVCacheConfig, Slot, as_config
from slim.runtime.evicting import EvictingKVCache
from slim.runtime.eviction import Eviction
from slim.runtime.explain import Explanation, explain
from slim.runtime.loop import Plan
from slim.runtime.paged import PagedKVCache, paging
from slim.runtime.paged_steps import PagedDecoder, PagedStep
from slim.runtime.steps import CachedDecoder, Decoder, RecomputingDecoder, Step

log = logging.getLogger(__name__)

_ROOM = 256  # new tokens a cache has room for at first, where more are allowed; it doubles when they come


class CompiledModel:
    """What ``slim.compile`` returns.

    Attributes:
        program: the IR that runs; ``print`` it.
        report: what each pass did; ``print`` it. None for a Program that went through no pipeline.
        pipeline: the passes, as text.
        kv_cache: how keys and values of past tokens are kept.
        target: what the Program was lowered to.
        executables: name -> what generated code was made for so far: "whole", "step_last", ...

    Example:
        >>> compiled = slim.compile("path/to/model", passes='quantize("int8")')
        >>> compiled.generate(tokens, max_new_tokens=64)
        >>> compiled(input_ids=tokens).logits
    """

    def __init__(
        self,
        program: Program,
        target: str | Target = "auto",
        *,
        report: Any = None,
        kv_cache: KVCacheConfig | None = None,
        pipeline: str = "",
        dump: Dump | None = None,
    ) -> None:
        """Lowers ``program``, now and for each form that is asked for later; the code of all goes to ``dump``.

        Raises:
            UnknownTarget, TargetUnavailable. CacheUnsupported: where a ``kv_cache`` was asked for that cannot be.
        """
        self.program = program
        self.report = report
        self.pipeline = pipeline
        self.target = select(target) if isinstance(target, str) else target
        self.kv_cache = as_config(kv_cache)
        self._dump = dump or Dump(None)
        self._paging, self._eviction = paging(self.kv_cache), Eviction.of(self.kv_cache)
        self._steps: dict[tuple[bool, bool], Step | PagedStep] = {}
        self.executables: dict[str, Executable] = {}
        if report is not None:  # it may have been saved by another target
            report.error = report.error if report.target == self.target.name else None
            report.target, report.forms = self.target.name, {}
        if kv_cache is not None:
            self.slots  # noqa: B018  asked for: then it must be possible
        self._make_first_form()

    def _make_first_form(self) -> None:
        """Lowers what this model is most often asked for; other forms come when they are first used."""
        if self.can_generate():
            try:
                self.step(masked=False, last_only=True)
                return
            except errors.CacheUnsupported as reason:
                log.debug("no form over a cache: %s", reason)
        self._executable  # noqa: B018  made when it is first read

    @functools.cached_property
    def _executable(self) -> Executable:
        """The whole Program, without a cache."""
        return self._lower("whole", self.program)

    def _lower(self, name: str, program: Program) -> Executable:
        """``program``, this one or a form of it, as an executable; its source and its report are kept."""
        start = time.perf_counter()
        executable: Executable = self.target.lower(program)
        self.program.weights.share(program.weights)  # all forms read one copy, in the layout that their kernels want
        self.executables[name] = executable
        self._dump.code(_below(name, executable))
        if self.report is not None:
            self.report.forms[name] = replace(executable.form, seconds=time.perf_counter() - start)
        return executable

    def __repr__(self) -> str:
        name = self.program.facts.architecture or "model"
        passes = self.pipeline or "no passes"
        return f"CompiledModel({name}, {passes}, {self.program.nbytes:,} bytes, target={self.target.name!r})"

    def _repr_html_(self) -> str:
        """For notebooks: what it is, its report and its IR."""
        report = [] if self.report is None else [report_html(self.report)]
        return together(repr(self), [*report, program_html(self.program)])

    # -- what evaluation harnesses and transformers' helpers ask ----------------------------------------------------

    @functools.cached_property
    def config(self) -> Any:
        """The transformers configuration, kept true by the passes; None for other modules."""
        return rebuild_config(self.program.facts)

    @functools.cached_property
    def generation_config(self) -> Any:
        """The transformers GenerationConfig that ``generate`` starts from; it may be changed."""
        return rebuild_generation_config(self.program.facts)

    @functools.cached_property
    def device(self) -> torch.device:
        """Where the weights lie, and the inputs must."""
        weights = self.program.weights
        place = self.target.place()
        return place or next((weights[name].device for name in weights), torch.device("cpu"))

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The type of the first output."""
        value = self.program.graph.output_node().args[0][0]  # type: ignore[index]
        dtype: torch.dtype = value.meta["val"].dtype  # type: ignore[union-attr]
        return dtype

    @functools.cached_property
    def vocabulary(self) -> int | None:
        """How many token ids the model knows."""
        return vocabulary(self.program)

    @functools.cached_property
    def position_limit(self) -> int | None:
        """How many positions the model can tell apart; None where nothing but its training limits them."""
        return position_limit(self.program)

    @functools.cached_property
    def counts_real_tokens(self) -> bool:
        """Whether, without position_ids, padding is left out of the count, as the original does or does not."""
        return counts_real_tokens(self.program.facts)

    @functools.cached_property
    def slots(self) -> tuple[Slot, ...]:
        """What a KV cache of this model holds; raises CacheUnsupported where it can have none."""
        check_cacheable(self.program, self._paging, self._eviction)
        self._check_format()
        return cache_slots(self.program, self.kv_cache.bits, self._eviction is not None)

    def _check_format(self) -> None:
        """Raises where the cache is asked to hold other numbers than the Program rounds to."""
        bits = self.kv_cache.bits
        for node in self.program.attention_nodes() if bits else ():
            own = pair_bits(node)[1]
            if own not in (0, bits):
                a, b = f"KVCacheConfig(dtype={self.kv_cache.dtype!r})", f'QuantizeKV("int{own}")'
                raise errors.ContradictoryOptions(a=a, b=b, reason="a number is rounded once; leave one of them out")

    @property
    def paged(self) -> bool:
        """Whether keys and values lie in pages; see ``KVCacheConfig``."""
        return self._paging is not None

    @property
    def name_or_path(self) -> str:
        """Where the model came from."""
        return str(self.program.facts.source or "")

    def can_generate(self) -> bool:
        """Whether ``generate`` applies: a causal language model."""
        return self.program.facts.kind == "causal_lm"

    def num_parameters(self) -> int:
        """Numbers the model holds, tied weights once."""
        return self.program.parameters

    def eval(self) -> CompiledModel:
        """Itself: a compiled model is always in evaluation mode."""
        return self

    def tie_weights(self) -> None:
        """Nothing to do: tied weights are one value."""

    def to(self, *args: Any, **kwargs: Any) -> CompiledModel:
        """Itself, where the device and type are those it has already.

        Raises:
            BadInput: for any other; the Program was compiled for this one.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and torch.device(device).type != self.device.type:
            raise errors.BadInput(
                argument="device",
                reason=f"the model was compiled for {self.device}, not {device}",
                of="slim.CompiledModel.to",
            )
        if dtype is not None and dtype != self.dtype:
            raise errors.BadInput(
                argument="dtype",
                reason=f"the model was compiled for {self.dtype}, not {dtype}",
                of="slim.CompiledModel.to",
            )
        return self

    # -- running -----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the original model did.

        A causal language model takes ``input_ids`` [B, S], and by keyword ``attention_mask``, ``position_ids``,
        ``labels``, ``past_key_values`` (a KVCache), ``use_cache``, ``logits_to_keep`` and ``return_dict``; without
        ``use_cache=True`` no cache is kept. An encoder takes its inputs by keyword. Any other module takes the
        arguments it was compiled with.

        Raises:
            BadInput: for arguments that the model does not have or that have the wrong shape.
            TokenOutOfRange, EmptyPrompt, PromptTooLong, CacheMismatch, CacheUnsupported.
        """
        kind = self.program.facts.kind
        if kind == "causal_lm":
            return calls.call_language_model(self, *args, **kwargs)
        if kind == "encoder":
            return calls.call_encoder(self, *args, **kwargs)
        return calls.call_module(self, args, kwargs)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Continues prompts, greedily or by sampling, with transformers' arguments and the same result.

        Args:
            inputs: token ids [B, S], also as ``input_ids``; left out, generation starts from the first token.
            generation_config: a transformers GenerationConfig; options given by keyword go first.
            logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer: as transformers takes them.
            kwargs: ``attention_mask`` [B, S] (0 at padding, which is on the left), ``position_ids``,
                ``past_key_values`` (a KVCache), ``tokenizer`` (for ``stop_strings``), and the options of
                GenerationConfig: ``max_new_tokens``, ``do_sample``, ``temperature``, ...

        Returns:
            Token ids [B, up to max_length], prompts included, or a GenerateDecoderOnlyOutput with
            ``return_dict_in_generate``.

        Raises:
            NotGenerative. EmptyPrompt, PromptTooLong, TokenOutOfRange, BadInput: for the prompt.
            UnsupportedGenerateOption: for beam search, assisted decoding and unknown options; none is ignored.

        Example:
            >>> compiled.generate(tokenizer("def ", return_tensors="pt").input_ids, max_new_tokens=32)
        """
        if not self.can_generate():
            facts = self.program.facts
            raise errors.NotGenerative(model=facts.architecture or "the model", reason=f"its kind is {facts.kind}")
        return generation.generate(
            self, inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer,
            **kwargs,
        )  # fmt: skip

    def run(self, inputs: dict[str, Tensor]) -> tuple[Any, ...]:
        """The flat outputs for inputs by name; those that the Program does not take are left out."""
        return self.run_flat([inputs[value.name] for value in self.program.inputs])

    def run_flat(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """The flat outputs for one tensor an input, in the order of the Program's inputs."""
        return self._executable(*inputs)

    def step(self, *, masked: bool = True, last_only: bool = False) -> Step | PagedStep:
        """The Program over a KV cache, lowered when it is first asked for; see ``bind_cache``.

        Raises:
            CacheUnsupported: with the reason, where the model cannot be cached.
        """
        key = (masked and self._paging is None, last_only)  # pages hold no padding
        if key not in self._steps:
            checked = bool(self.slots)  # or it raises
            bound = bind_cache(
                self.program, masked=key[0], last_only=last_only, checked=checked, bits=self.kv_cache.bits,
                paging=self._paging, eviction=self._eviction,
            )  # fmt: skip
            name = "step" + "_masked" * key[0] + "_last" * last_only
            kind = Step if self._paging is None else PagedStep
            self._steps[key] = kind(bound, self._lower(name, bound))
        return self._steps[key]

    def new_cache(self, batch: int, tokens: int = 0) -> KVCache | PagedKVCache:
        """An empty cache for ``batch`` sequences, with room for ``tokens`` tokens at first.

        Raises:
            CacheUnsupported, PromptTooLong: beyond ``kv_cache.max_tokens``. BadInput: for what are no numbers.
        """
        for name, value, least in (("batch", batch, 1), ("tokens", tokens, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                reason = f"{value!r:.40} is no number from {least} on"
                raise errors.BadInput(argument=name, reason=reason, of="slim.CompiledModel.new_cache")
        limit = self.kv_cache.max_tokens
        if limit is not None and tokens > limit:
            raise errors.PromptTooLong(length=tokens, capacity=limit)
        if self._paging is not None:
            return PagedKVCache(self.slots, batch, max(1, tokens), self.kv_cache, self.device)
        if self._eviction is not None:
            return EvictingKVCache(self.slots, batch, max(1, tokens), self._eviction, limit, self.device)
        return KVCache(self.slots, batch, max(1, tokens), limit, self.device)

    def decoder(self, plan: Plan) -> Decoder:
        """What runs a call of ``generate``: over a cache, unless the call or the model is against it."""
        if plan.use_cache is False:
            return RecomputingDecoder(self.run, plan.max_length)
        try:
            cache = self._cache_for(plan)
        except errors.CacheUnsupported as error:
            if plan.use_cache or plan.cache is not None:
                raise
            log.warning("generating without a KV cache, each token at the cost of the whole sequence: %s", error)
            return RecomputingDecoder(self.run, plan.max_length)
        step = self.step(masked=bool((plan.mask == 0).any()), last_only=True)
        chunk = plan.config.prefill_chunk_size
        if isinstance(step, PagedStep):
            assert isinstance(cache, PagedKVCache)
            return PagedDecoder(step, cache, chunk)
        assert isinstance(cache, KVCache)
        return CachedDecoder(step, cache, chunk)

    def _cache_for(self, plan: Plan) -> KVCache | PagedKVCache:
        batch, length = plan.tokens.shape
        limit = self.kv_cache.max_tokens
        run = plan.max_length - 1  # the last token is returned, and never run
        if limit is not None and run > limit:
            raise errors.PromptTooLong(length=run, capacity=limit)
        if plan.cache is None:
            return self.new_cache(batch, min(run, length + _ROOM))
        calls.check_cache(plan.cache, self, batch)
        past = plan.cache.get_seq_length()
        if past >= length:
            reason = f"the prompt must go on beyond the {past} tokens of past_key_values, and has {length}"
            raise errors.BadInput(argument="input_ids", reason=reason, of="slim.CompiledModel.generate")
        return plan.cache

    # -- looking inside, and keeping ---------------------------------------------------------------------------------

    @property
    def code(self) -> dict[str, str | bytes]:
        """Name -> source (or binary) of everything generated so far; forms over a cache come when first used."""
        made = (_below(name, executable) for name, executable in self.executables.items())
        return {file: source for files in made for file, source in files.items()}

    @property
    def stages(self) -> dict[str, Sequence[Stage]]:
        """Executable -> its regions in the order they run, each with its nodes, its weights and its kernels."""
        return {name: executable.stages for name, executable in self.executables.items()}

    def explain(self, node: str | fx.Node) -> Explanation:
        """From which line of the model, through which passes, into which kernel; ``print`` it.

        Args:
            node: name of a node or a weight, also of one that a pass removed.

        Raises:
            BadInput: for a name that never was, with those like it.

        Example:
            >>> print(compiled.explain("model.layers.0.mlp.down_proj.weight"))
        """
        return explain(self.program, self.report, self.stages, node)

    def cost(self) -> Any:
        """Parameters, bytes and operations as expressions in batch B, new tokens S and context T."""
        from slim.compiler.cost import cost

        return cost(self.program, self.kv_cache.bits)

    def save(self, directory: str | Path) -> None:
        """Writes everything ``slim.load`` needs; see ``slim.runtime.artifact.save``."""
        from slim.runtime.artifact import save

        save(self, directory)

    def export(self, directory: str | Path, format: str = "transformers", *, dequantize: bool = False) -> None:
        """Writes the model as another library reads it; see ``slim.runtime.export.export``."""
        from slim.runtime.export import export

        export(self.program, directory, format, dequantize=dequantize)
        if changed := self.kv_cache.changes:
            log.warning("the export has no %s: how keys and values are kept is not part of it", changed)


def _below(name: str, executable: Executable) -> dict[str, str | bytes]:
    """The source of an executable as files below ``name``."""
    return {f"{name}/{file}": source for file, source in executable.code.items()}
