"""Exporting to plain transformers: the original state dict, put together again from what the Program holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from slim import errors
from slim.compiler.program import Program
from slim.compiler.uses import DEQUANTIZE, stored_in
from slim.runtime.architecture import empty_model, rebuild_generation_config
from slim.runtime.artifact import TOKENIZER_FILES, copy_tokenizer
from slim.runtime.storage import written_directory

FORMATS = ("transformers",)
# What an export writes: a directory that holds nothing else may be replaced by another export.
_OWN_FILES = (
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "*.safetensors.index.json",
)


def export(program: Program, directory: str | Path, format: str = "transformers", *, dequantize: bool = False) -> None:
    """Writes a directory that ``from_pretrained`` reads: config, weights under their original names, tokenizer.

    Args:
        directory: a new one, an empty one, or an earlier export; the model's own source is never overwritten.
        format: "transformers".
        dequantize: write quantised weights as the floating-point numbers they stand for.

    Raises:
        ExportUnsupported: where plain transformers cannot hold the result, naming the weights.
        SaveFailed: with the reason; nothing is left behind.
    """
    if format not in FORMATS:
        raise errors.ExportUnsupported(format=format, reason=f"there is no such format; there is {', '.join(FORMATS)}")
    model = _architecture(program)
    state = _fitted(model, program, state_dict(program, dequantize=dequantize))
    with written_directory(directory, lambda folder: _is_export(folder, program.facts.source)) as folder:
        model.save_pretrained(folder, state_dict=state)
        copy_tokenizer(program.facts.source, folder)


def _architecture(program: Program) -> Any:
    facts = program.facts
    if facts.config is None:
        reason = f"{facts.architecture or 'the model'} is not one of transformers' own"
        raise errors.ExportUnsupported(format="transformers", reason=reason)
    try:
        model = empty_model(facts)
    except errors.UnsupportedModel as error:
        raise errors.ExportUnsupported(format="transformers", reason=error.reason) from error
    if facts.generation is not None:
        model.generation_config = rebuild_generation_config(facts)
    return model


def _is_export(folder: Path, source: Path | None) -> bool:
    if source is not None and folder.resolve() == Path(source).resolve():
        return False
    return all(any(fnmatchcase(file.name, own) for own in _OWN_FILES) for file in folder.iterdir())


# -- the original state dict -------------------------------------------------------------------------------------------


def state_dict(program: Program, *, dequantize: bool = False) -> dict[str, Tensor]:
    """Every weight under the name and in the layout it had before the lift; fused ones are put together again.

    Raises:
        ExportUnsupported: for quantised weights, unless they are to be dequantised.
    """
    facts = program.facts
    state: dict[str, Tensor] = {}
    missing: dict[str, int] = {}  # elements of fused weights that no part has filled yet
    for name, tensor in _plain_weights(program, dequantize):
        part = facts.parts.get(name)
        if part is None:
            state[name] = tensor
            continue
        if part.base not in state:
            shape, dtype = facts.bases[part.base]
            state[part.base] = torch.zeros(shape, dtype=dtype)
            missing[part.base] = math.prod(shape)
        if tuple(tensor.shape) != part.taken_shape:
            _refuse(f"{name} is {list(tensor.shape)}, and its place in {part.base} is {list(part.taken_shape)}")
        part.put(state[part.base], tensor.to(state[part.base].dtype))
        missing[part.base] -= tensor.numel()
    for name, count in missing.items():
        if count:
            _refuse(f"{count:,} numbers of {name} are no longer part of the program")
    return state


def _refuse(reason: str) -> NoReturn:
    raise errors.ExportUnsupported(format="transformers", reason=reason)


def _plain_weights(program: Program, dequantize: bool) -> Iterator[tuple[str, Tensor]]:
    quantised = {str(q.target): node for node in program.nodes(DEQUANTIZE) for q in stored_in(node.args[0])}
    if quantised and not dequantize:
        example = next(iter(quantised))
        reason = (
            f"{len(quantised)} weights are quantised ({example}, ...), and plain transformers has no such format; "
            "dequantize=True writes the floating-point numbers that they stand for"
        )
        raise errors.ExportUnsupported(format="transformers", reason=reason)
    grids = {program.weight_of(argument) for node in quantised.values() for argument in node.args[1:3]}
    for name in program.weights:
        if name in grids:
            continue
        node = quantised.get(name)
        if node is None:
            yield name, program.weights[name]
        else:
            yield name, _restored(program, node)


def _restored(program: Program, value: fx.Node) -> Tensor:
    """The numbers that a weight, or what restores one, stands for."""
    if value.op == "get_attr":
        return program.weights[str(value.target)]
    args, kwargs = fx.map_arg((value.args, value.kwargs), lambda node: _restored(program, node))
    return value.target(*args, **kwargs)  # type: ignore[operator]


# -- filling the architecture ------------------------------------------------------------------------------------------


def _fitted(model: Any, program: Program, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with tied and retired names added, once every name and shape is what ``model`` has.

    Raises:
        ExportUnsupported: naming what is missing, left over, or of another shape.
    """
    expected = model.state_dict(keep_vars=True)
    same = _tied_names(expected)
    fitted: dict[str, Tensor] = {}
    for name, meta in expected.items():
        names = (name, program.facts.tied.get(name, name), *same[name])
        value = next((state[other] for other in names if other in state), None)
        if value is None and name in program.facts.retired:
            value = torch.full(meta.shape, program.facts.retired[name], dtype=_dtype(state))
        if value is None:
            _refuse(f"{name} {list(meta.shape)} is no longer part of the program")
        if value.shape != meta.shape:
            _refuse(f"{name} is {list(value.shape)}, and the configuration says {list(meta.shape)}")
        fitted[name] = value
    known = set(expected) | program.facts.constants | set(program.facts.tied.values())
    left = [name for name in state if name not in known]
    if left:
        _refuse(f"the architecture has no place for {', '.join(left[:5])}{' and others' * (len(left) > 5)}")
    return fitted


def _tied_names(expected: dict[str, Tensor]) -> dict[str, list[str]]:
    """Each name of the state dict -> the names of the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: groups[id(tensor)] for name, tensor in expected.items()}


def _dtype(state: dict[str, Tensor]) -> torch.dtype:
    """The type of most numbers: what a folded weight had."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])
