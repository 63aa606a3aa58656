"""slim and its peers on one model in one process: how each is made, and how long a step or a prompt takes."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

import slim
from benchmarks.gpu_peers.device import Device
from slim.passes import Quantize, SparseAttention
from slim.runtime.cache import KVCache
from slim.runtime.steps import Step

PEERS = ("slim", "torch.compile", "torchao", "transformers")
GROUP = 32  # numbers that share a scale in int4 and int3, here and in torchao
PASSES: dict[str, list[Any]] = {
    "bf16": [],
    "int8": [Quantize("int8")],
    "int4": [Quantize("int4", group_size=GROUP)],
    "w8a8": [Quantize("int8", activations="int8")],
    "fp8": [Quantize("fp8")],
    "int3": [Quantize("int3", group_size=GROUP)],
    "nf4": [Quantize("nf4")],
}
# What attention visits, over bfloat16 weights: to be run with long prompts.
SPARSE: dict[str, tuple[list[Any], slim.KVCacheConfig | None]] = {
    "window": ([SparseAttention("window", window=1024, sinks=4)], None),
    "block_topk": ([SparseAttention("block_topk", block=64, share=8)], None),
    "vertical_slash": ([SparseAttention("vertical_slash", columns=1000, slashes=1000)], None),
    "ring": ([], slim.KVCacheConfig(layout="paged", window=1024, sinks=4)),
    "h2o": ([], slim.KVCacheConfig(eviction="h2o", budget=1024)),
}
FORMATS = (*PASSES, *SPARSE)
USUAL = FORMATS[:3]  # measured where a call names none


class NotHere(Exception):
    """An engine that this machine cannot run, with the reason."""


class Engine(Protocol):
    """A model ready to run.

    Attributes:
        nbytes: of the matrices, scales included, that a new token reads; the embedding table is not among them.
        shared: bytes of the original model's weights that it reads as they are.
    """

    nbytes: int
    shared: int

    def decode(self, prompt: Tensor, new: int) -> float:
        """Seconds of a step, over the steps from the first of ``new`` tokens to the last; nothing ends it sooner."""
        ...

    def prefill(self, prompt: Tensor) -> float:
        """Seconds until the token after ``prompt`` is known."""
        ...

    def forget(self) -> None:
        """Drops what was made for the last case alone."""
        ...


@dataclass(frozen=True)
class Setup:
    """What engines are made from.

    Attributes:
        model: transformers' own, in bfloat16; engines share its weights and change none.
        target: slim's.
        tune: seconds slim may spend on tuning; 0 leaves that option out of the call.
        mode: torch.compile's, for a step.
    """

    model: Any
    device: Device
    target: str
    tune: float
    mode: str


@dataclass(frozen=True)
class Kind:
    """An engine by its name and its weight format; ``once`` is measured at batch 1 alone."""

    peer: str
    format: str
    once: bool = False

    @property
    def name(self) -> str:
        return f"{self.peer} {self.format}"

    def make(self, setup: Setup) -> Engine:
        """Raises NotHere, or whatever the engine itself raises."""
        if self.peer == "slim":
            return Slim(setup, self.format)
        if self.peer == "torchao":
            return PyTorch(_torchao(setup, self.format), setup, setup.mode)
        return PyTorch(setup.model, setup, setup.mode if self.peer == "torch.compile" else None)


def kinds(peers: list[str], formats: list[str]) -> Iterator[Kind]:
    """The engines of a run, each of slim's beside what it is measured against."""
    for form in formats:
        if "slim" in peers:
            yield Kind("slim", form)
        peer = "torch.compile" if form == "bf16" else "torchao"
        if peer in peers and (peer != "torchao" or form in TORCHAO):
            yield Kind(peer, form)
    if "torch.compile" in peers and "bf16" not in formats:
        yield Kind("torch.compile", "bf16")  # what no format may be slower than
    if "transformers" in peers:
        yield Kind("transformers", "bf16", once=True)


# -- slim --------------------------------------------------------------------------------------------------------------


class Slim:
    """A compiled model: decoding as a user sees it, in ``generate``; a prompt as one step over an empty cache."""

    def __init__(self, setup: Setup, form: str) -> None:
        self._device = setup.device
        options: dict[str, Any] = {"tune": setup.tune} if setup.tune else {}
        passes, cache = SPARSE.get(form) or (PASSES[form], None)
        self._has_own_cache = cache is not None
        self._compiled = slim.compile(setup.model, passes, target=setup.target, kv_cache=cache, verify=False, **options)
        weights = self._compiled.program.weights
        self.nbytes = sum(weights[name].nbytes for name in weights if _is_multiplied(name, weights[name]))
        originals = {weight.data_ptr() for weight in setup.model.parameters()}
        self.shared = sum(weights[name].nbytes for name in weights if weights[name].data_ptr() in originals)

    def decode(self, prompt: Tensor, new: int) -> float:
        one, all_of_them = (self._device.seconds(partial(self._write, prompt, count)) for count in (1, new))
        return (all_of_them - one) / (new - 1)

    def _write(self, prompt: Tensor, new: int) -> None:
        self._compiled.generate(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)

    @torch.no_grad()
    def prefill(self, prompt: Tensor) -> float:
        if self._has_own_cache:  # which says how much of a prompt is run at once
            return self._device.seconds(lambda: self._write(prompt, 1))
        batch, length = prompt.shape
        step = self._compiled.step(masked=False, last_only=True)
        cache = self._compiled.new_cache(batch, length)
        assert isinstance(step, Step)
        assert isinstance(cache, KVCache)
        positions = torch.arange(length, device=prompt.device).expand(batch, length)
        inputs = {"input_ids": prompt, "position_ids": positions, "attention_mask": torch.ones_like(prompt)}
        return self._device.seconds(lambda: step(cache, None, inputs)[0][:, -1].argmax(-1))

    def forget(self) -> None:
        """Nothing: one compiled model serves every batch and length."""


def _is_multiplied(name: str, weight: Tensor) -> bool:
    return "embed_tokens" not in name and (weight.dim() > 1 or name.endswith("_scale"))


# -- PyTorch -----------------------------------------------------------------------------------------------------------


class PyTorch:
    """transformers' model in a loop by hand, as gpt-fast has it: eagerly, or compiled over a static cache."""

    def __init__(self, model: Any, setup: Setup, mode: str | None) -> None:
        """``mode`` None is eager."""
        self._model, self._device, self._compiles = model, setup.device, mode is not None
        self._step, self._read = _step_of(model), _read_of(model)
        self._fast_step, self._fast_read = self._step, self._read
        if mode is not None:
            torch._inductor.config.coordinate_descent_tuning = True  # as gpt-fast and torchao advise
            self._fast_step = torch.compile(self._step, mode=mode, dynamic=False, fullgraph=True)
            plain = "max-autotune-no-cudagraphs" if mode == "max-autotune" else "default"
            self._fast_read = torch.compile(self._read, mode=plain, dynamic=False, fullgraph=True)
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        self.nbytes = sum(_nbytes(linear.weight) for linear in linears)
        self.shared = sum(weight.nbytes for weight in model.parameters()) if model is setup.model else 0
        self._cache: Any = None
        self._room = 0

    @torch.no_grad()
    def decode(self, prompt: Tensor, new: int) -> float:
        cache = self._empty_cache(prompt.shape[0], prompt.shape[1] + new)
        tokens = self._step(prompt, cache)  # eagerly: it is not timed, and needs no kernels of its own
        return self._device.seconds(lambda: self._write(tokens, cache, new - 1)) / (new - 1)

    def _write(self, tokens: Tensor, cache: Any, steps: int) -> None:
        for _ in range(steps):
            if self._compiles:
                torch.compiler.cudagraph_mark_step_begin()
            tokens = self._fast_step(tokens, cache).clone()  # the next replay writes over what it returned

    def _empty_cache(self, batch: int, room: int) -> Any:
        """The compiled step is bound to one cache's memory, so that is kept from round to round."""
        if not self._compiles:
            return transformers.DynamicCache(config=self._model.config)
        if self._cache is None or self._room < room:
            config = self._model.config
            self._cache, self._room = transformers.StaticCache(config=config, max_cache_len=room), room
            heads, device = config.num_key_value_heads, torch.device(self._device.kind)
            self._cache.early_initialization(batch, heads, config.head_dim, torch.bfloat16, device)
        self._cache.reset()
        return self._cache

    @torch.no_grad()
    def prefill(self, prompt: Tensor) -> float:
        return self._device.seconds(lambda: self._fast_read(prompt))

    def forget(self) -> None:
        self._cache = None


def _step_of(model: Any) -> Callable[[Tensor, Any], Tensor]:
    """The next token of every row, [B, 1]; positions are the cache's to know."""

    def step(tokens: Tensor, cache: Any) -> Tensor:
        found = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1].argmax(-1, keepdim=True)

    return step


def _read_of(model: Any) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
    """The token after a prompt, and the prompt's keys and values; with no cache to look up, attention is plain."""

    def read(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        kept = [each for layer in found.past_key_values.layers for each in (layer.keys, layer.values)]
        return found.logits[:, -1].argmax(-1), kept

    return read


# Format -> torchao's configuration and its arguments. Tiles are PyTorch's own int4 kernel's; others want more packages.
TORCHAO: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("Int8WeightOnlyConfig", {}),
    "int4": ("Int4WeightOnlyConfig", {"group_size": GROUP, "int4_packing_format": "tile_packed_to_4d"}),
    "w8a8": ("Int8DynamicActivationInt8WeightConfig", {}),
    "fp8": ("Float8WeightOnlyConfig", {}),
}


def _torchao(setup: Setup, form: str) -> Any:
    """A copy of the model with its linears held by torchao."""
    if importlib.util.find_spec("torchao") is None:
        raise NotHere("torchao is not installed; carry its wheel")
    from torchao import quantization

    name, arguments = TORCHAO[form]
    model = copy.deepcopy(setup.model)
    quantization.quantize_(model, getattr(quantization, name)(**arguments))
    return model


def _nbytes(weight: Any) -> int:
    """Of a tensor, or of the tensors that torchao's kind of tensor holds."""
    if not hasattr(type(weight), "__tensor_flatten__"):
        return int(weight.nbytes)
    names, _ = weight.__tensor_flatten__()
    return sum(_nbytes(getattr(weight, name)) for name in names)
