"""Exporting: a directory that another library's ``from_pretrained`` reads, written whole or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, fx

from slim import errors
from slim.compiler.program import Program
from slim.compiler.rules import argument
from slim.compiler.uses import DEQUANTIZE, stored_in
from slim.runtime import compressed_tensors
from slim.runtime.artifact import TOKENIZER_FILES, copy_tokenizer
from slim.runtime.fitting import Lazy, architecture, fitted, main_dtype, originals, refuse
from slim.runtime.quantised import QUANTIZE, restored
from slim.runtime.storage import check_destination, written_directory

log = logging.getLogger(__name__)

FORMATS = ("transformers", "compressed-tensors")
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
        format: "transformers", or, for quantised weights, "compressed-tensors", which transformers (with the package
            compressed-tensors) and vLLM read; see ``slim.runtime.compressed_tensors``.
        dequantize: write quantised weights as the floating-point numbers they stand for ("transformers" alone);
            activations are then no longer rounded.

    Raises:
        ExportUnsupported: where the format cannot hold the result, naming the weights.
        ContradictoryOptions: for ``dequantize`` with a format that holds quantised weights.
        SaveFailed: with the reason; nothing is left behind.

    Example:
        >>> slim.compile(model, 'quantize("int4", group_size=32)').export("out", format="compressed-tensors")
        >>> AutoModelForCausalLM.from_pretrained("out")
    """
    check_request(directory, format, dequantize=dequantize, source=program.facts.source)
    _refuse_patterns(program, format)
    write = _prepared(program, format, dequantize)
    with written_directory(directory, lambda folder: _is_export(folder, program.facts.source)) as folder:
        write(folder)
        copy_tokenizer(program.facts.source, folder)


def check_request(directory: str | Path, format: str, *, dequantize: bool, source: Path | None) -> None:
    """What can be refused of an export of the model at ``source`` without reading it; raises as ``export`` does."""
    if format not in FORMATS:
        refuse(format, f"there is no such format; there is {', '.join(FORMATS)}")
    if dequantize and format != "transformers":
        reason = f"{format} is there to hold quantised weights; format='transformers' holds their floating-point values"
        raise errors.ContradictoryOptions(a="dequantize=True", b=f"format={format!r}", reason=reason)
    check_destination(directory, lambda folder: _is_export(folder, source))


def _refuse_patterns(program: Program, format: str) -> None:
    sparse = [node for node in program.attention_nodes() if argument(node, "pattern") is not None]
    if sparse:
        layers = ", ".join(str(node.kwargs["layer"]) for node in sparse[:3]) + ", ..." * (len(sparse) > 3)
        kept = argument(sparse[0], "pattern")
        refuse(format, f"attention of layers {layers} keeps {kept}, which its configuration cannot say; save() can")


def _prepared(program: Program, format: str, dequantize: bool) -> Callable[[Path], None]:
    """What writes the model into a folder, once it is known that it can."""
    if format == "transformers":
        return _plain(program, dequantize)
    return compressed_tensors.prepared(program)


def _is_export(folder: Path, source: Path | None) -> bool:
    if source is not None and folder.resolve() == Path(source).resolve():
        return False
    return all(any(fnmatchcase(file.name, own) for own in _OWN_FILES) for file in folder.iterdir())


# -- plain transformers ------------------------------------------------------------------------------------------------


def _plain(program: Program, dequantize: bool) -> Callable[[Path], None]:
    facts = program.facts
    model = architecture(facts, "transformers")
    state = state_dict(program, dequantize=dequantize)
    dtype = main_dtype(state)
    state = fitted(model, facts, state, "transformers", lambda shape, value: torch.full(shape, value, dtype=dtype))
    model.to(dtype)  # what the configuration then says: from_pretrained goes by it
    return lambda folder: model.save_pretrained(folder, state_dict=state)


def state_dict(program: Program, *, dequantize: bool = False) -> dict[str, Tensor]:
    """Every weight under the name and in the layout it had before the lift; fused ones are put together again.

    Raises:
        ExportUnsupported: for quantised weights, unless they are to be dequantised.
    """
    values = _plain_weights(program, dequantize)
    return {name: value.load() for name, value in originals(program.facts, values, "transformers").items()}


def _plain_weights(program: Program, dequantize: bool) -> dict[str, Lazy]:
    quantised = {str(q.target): node for node in program.nodes(DEQUANTIZE) for q in stored_in(node.args[0])}
    rounded = list(program.nodes(QUANTIZE))
    if (quantised or rounded) and not dequantize:
        what = f"{len(quantised)} weights are quantised ({next(iter(quantised))}, ...)" if quantised else ""
        what = what or f"{len(rounded)} activations are rounded to integers ({rounded[0].name}, ...)"
        reason = (
            f"{what}, and plain transformers has no such format; format='compressed-tensors' has, and "
            "dequantize=True writes the floating-point numbers that weights stand for"
        )
        refuse("transformers", reason)
    if rounded:
        log.warning("dequantize=True: %d roundings of activations are left out", len(rounded))
    grids = {
        str(weight.target)
        for node in (*quantised.values(), *rounded, *program.nodes(DEQUANTIZE))
        for operand in node.args[1:3]
        for weight in stored_in(operand)
    }
    return {name: _value(program, name, quantised.get(name)) for name in program.weights if name not in grids}


def _value(program: Program, name: str, restoring: fx.Node | None) -> Lazy:
    if restoring is None:
        weights = program.weights
        return Lazy(weights.dtype(name), weights.shape(name), lambda: weights[name])
    value = restoring.meta["val"]
    return Lazy(value.dtype, tuple(value.shape), lambda: restored(program, restoring))
