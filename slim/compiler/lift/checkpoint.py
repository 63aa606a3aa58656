"""Lifting by path: the architecture is built without its weights, which stay on disk until they are needed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from slim import errors
from slim.compiler.program import Program
from slim.compiler.weights import SAFETENSORS_DTYPES, PartOf, Stored

log = logging.getLogger(__name__)

# A model and its tokenizer; never pickled weights.
_FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def locate(path: str | Path) -> Path:
    """The directory of a local model, or of a hub id's snapshot.

    Raises:
        ModelNotFound: where there is neither.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        if (directory / "slim.json").is_file():
            raise errors.ModelNotFound(path=f"{path} (a compiled artifact, which slim.load reads)")
        if not (directory / "config.json").is_file():
            raise errors.ModelNotFound(path=f"{path} (a directory without config.json)")
        return directory
    if directory.exists() or str(path).count("/") > 1 or str(path).startswith((".", "~", "/")):
        raise errors.ModelNotFound(path=str(path))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=_FETCHED, ignore_patterns=["consolidated*"]))
    except Exception as error:  # the hub client has a dozen errors for "not there" and "no network"
        raise errors.ModelNotFound(path=str(path)) from error


class Checkpoint:
    """A transformers directory: its configuration, and where each tensor lies."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = _config(directory)
        self.stored = _stored(directory)

    @property
    def dtype(self) -> torch.dtype:
        """The type the model is run in: the configuration's, else that of the first floating-point tensor."""
        dtype = getattr(self.config, "dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
        return next((s.dtype for s in self.stored.values() if s.dtype.is_floating_point), torch.float32)

    def skeleton(self) -> tuple[nn.Module, bool]:
        """The model, and whether its weights are yet to be read.

        Its parameters are allocated and never touched, which costs address space and no memory. Where the names in
        the files are not the model's own (transformers converts some layouts on loading), transformers loads it.
        """
        cls = _model_class(self.config)
        with _no_weights(), _default_dtype(self.dtype):
            model = cls(self.config)
        model.tie_weights()
        missing = self._missing(model)
        if not missing:
            self._generation_config(model)
            return model.eval(), True
        log.info(
            "%s: %d names differ from the model's (%s...); transformers loads it",
            self.directory,
            len(missing),
            missing[0],
        )
        return _loaded(cls, self.directory, self.dtype), False

    def _missing(self, model: nn.Module) -> list[str]:
        """Parameters that no stored tensor of the same name and shape fills."""
        named = dict(model.named_parameters(remove_duplicate=False))
        filled = {id(parameter) for name, parameter in named.items() if self._fits(name, parameter)}
        return [
            name
            for name, tensor in model.state_dict().items()
            if not self._fits(name, tensor) and (name not in named or id(named[name]) not in filled)
        ]

    def _fits(self, name: str, tensor: torch.Tensor) -> bool:
        return name in self.stored and self.stored[name].shape == tuple(tensor.shape)

    def _generation_config(self, model: Any) -> None:
        from transformers import GenerationConfig

        if (self.directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.directory)

    def attach(self, program: Program) -> None:
        """Puts the weights on disk in the place of the skeleton's."""
        weights, facts = program.weights, program.facts
        for name in list(weights):
            part = facts.parts.get(name)
            base = name if part is None else part.base
            stored = self.stored.get(base) or self._by_alias(base, facts.tied)
            if stored is None:
                continue
            own = Stored(stored.file, stored.key, weights.dtype(name), stored.shape)
            weights[name] = own if part is None else PartOf(own, part)

    def _by_alias(self, name: str, tied: dict[str, str]) -> Stored | None:
        aliases = (other for other, canonical in tied.items() if canonical == name)
        return next((self.stored[other] for other in aliases if other in self.stored), None)


def _config(directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = _first_line(error)
        raise errors.CheckpointCorrupt(file=str(directory / "config.json"), reason=reason) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _model_class(config: Any) -> Any:
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    raise errors.UnsupportedModel(
        model=str(config.model_type),
        reason=f"transformers {transformers.__version__} has none of its architectures ({config.architectures})",
    )


def _stored(directory: Path) -> dict[str, Stored]:
    """Every tensor of the directory's safetensors files; each file is opened, so a damaged one is found now."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise errors.CheckpointCorrupt(file=str(index), reason=f"not an index ({error})") from error
        files = [directory / name for name in names]
    else:
        files = [directory / "model.safetensors"]
    found: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            pickled = any(directory.glob("*.bin"))
            reason = "the file is not there" + ", only pickled weights, which slim does not execute" * pickled
            raise errors.CheckpointCorrupt(file=str(file), reason=reason)
        found.update(_read_header(file))
    return found


def _read_header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118  not a mapping
            return {
                key: Stored(file, key, SAFETENSORS_DTYPES[part.get_dtype()], tuple(part.get_shape()))
                for key, part in slices.items()
            }
    except (SafetensorError, OSError, KeyError) as error:
        raise errors.CheckpointCorrupt(file=str(file), reason=str(error)) from error


@contextmanager
def _no_weights() -> Iterator[None]:
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if dtype.is_floating_point and dtype.itemsize > 1 else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _loaded(cls: Any, directory: Path, dtype: torch.dtype) -> nn.Module:
    try:
        model, info = cls.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise errors.CheckpointCorrupt(file=str(directory), reason=_first_line(error)) from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise errors.CheckpointCorrupt(
            file=str(directory), reason=f"{len(absent)} weights are missing, the first of them {absent[0]}"
        )
    return model.eval()
