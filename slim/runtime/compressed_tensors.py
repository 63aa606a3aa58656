"""Exporting as compressed-tensors: quantised weights in the files that transformers and vLLM read.

``config.json`` says in its ``quantization_config`` which modules hold what, and a module's ``weight`` is replaced:

- pack-quantized (integers that multiply floating-point inputs, and all of less than eight bits): ``weight_packed``
  int32 [m, ceil(n bits / 32)], each row one stream of bits, lowest first, of ``q + 2^(bits - 1)``; ``weight_shape``;
  ``weight_zero_point`` int32 [ceil(m bits / 32), groups], packed likewise down its columns;
- int-quantized (int8 that multiplies int8), naive-quantized (fp8): ``weight`` [m, n] as it is;
- all of them: ``weight_scale`` [m, groups], one group where a scale is a row's; ``input_scale`` [1] where inputs are
  rounded by one calibrated step.

Steps of a token are found as the model runs: vLLM sends the largest magnitude to 127, as slim does, and transformers
(compressed-tensors in Python) to 127.5. Embeddings are written as floating-point numbers, because transformers cannot
read packed ones; one that is the head as well is written twice, and ``tie_word_embeddings`` is false then.

Source: the compressed-tensors package (https://github.com/vllm-project/compressed-tensors), versions 0.19 and 0.20.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from slim.compiler.dialect.quant import pack_int3, pack_int4
from slim.compiler.program import Facts, Program, where
from slim.compiler.uses import DEQUANTIZE, LINEAR, stored_in
from slim.compiler.weights import Part, Weights
from slim.runtime.compressed_config import BITS, FORMAT, PACKED, compression, with_quantization
from slim.runtime.fitting import (
    Lazy,
    architecture,
    check_whole,
    fitted,
    main_dtype,
    originals,
    refuse,
    sources,
    tied_names,
)
from slim.runtime.quantised import (
    QUANTIZE,
    Quantised,
    Scheme,
    Unsuitable,
    describe,
    quantised_weights,
    restored,
    weight_name,
)
from slim.runtime.storage import stored_weights, write_text, write_weights

_INSTEAD = "exclude it, or export with dequantize=True in the format 'transformers'"


def prepared(program: Program) -> Callable[[Path], None]:
    """What writes the model into a folder; nothing is left to refuse then.

    Raises:
        ExportUnsupported: naming the weight that compressed-tensors cannot hold, and what to do instead.
    """
    facts = program.facts
    model = architecture(facts, FORMAT)
    _check_roundings(program)
    matrices = _matrices(program, model)
    if not matrices:
        refuse(FORMAT, "no weight is quantised; format='transformers' writes it as it is")
    _check_additions(program, matrices)
    state: dict[str, Lazy | Matrix] = {**_plain(program, matrices), **matrices}
    dtype = main_dtype(state)
    state = fitted(model, facts, state, FORMAT, lambda shape, value: _full(shape, value, dtype))
    tensors = _tensors(program, model, state)
    schemes = {name: value.scheme for name, value in state.items() if isinstance(value, Matrix)}
    modules = {
        stem: scheme
        for name, scheme in schemes.items()
        if isinstance(model.get_submodule(stem := name.removesuffix(".weight")), nn.Linear)
    }
    config = with_quantization(model, modules, dtype)
    return lambda folder: _write(folder, model, config, tensors, facts.constants)


def _full(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Lazy:
    return Lazy(dtype, shape, lambda: torch.full(shape, value, dtype=dtype))


# -- what is quantised -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """The weight of one module, whole: a fused one is several weights of the Program.

    Attributes:
        dtype, shape: of the floating-point weight in its place.
        pieces: the weights of the Program, and which part of the whole each is; None for all of it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    scheme: Scheme
    pieces: tuple[tuple[Part | None, Quantised], ...]

    @property
    def groups(self) -> int:
        """Scales a row."""
        return self.shape[1] // (self.scheme.group or self.shape[1])


def _matrices(program: Program, model: nn.Module) -> dict[str, Matrix]:
    """Original name -> the quantised weight."""
    restoring = {weight_name(node): node for node in quantised_weights(program)}
    found: dict[str, Matrix] = {}
    for name, names in sources(program.facts, dict.fromkeys(program.weights)).items():
        is_table = all(isinstance(owner, nn.Embedding) for owner in _owners(model, program.facts, name))
        if not is_table and not restoring.keys().isdisjoint(names):
            found[name] = _matrix(program, model, name, {part: restoring.get(part) for part in names})
    return found


def _matrix(program: Program, model: nn.Module, name: str, parts: Mapping[str, fx.Node | None]) -> Matrix:
    facts = program.facts
    pieces = []
    for part, node in parts.items():
        if node is None:
            reason = f"{part} is not quantised and other parts of {name} are"
            refuse(FORMAT, f"{reason}: a module is quantised as a whole; quantise or exclude all of it")
        _check_module(model, facts, name, part)
        try:
            pieces.append((_rows(facts.parts.get(part)), _known(describe(program, node))))
        except Unsuitable as error:
            refuse(FORMAT, f"{part} {error}, which compressed-tensors cannot hold; {_INSTEAD}")
    if len({(piece.scheme, piece.input_scale) for _, piece in pieces}) > 1:
        text = " and ".join(f"{piece.name} is {piece.scheme}" for _, piece in pieces[:2])
        refuse(FORMAT, f"the parts of {name} are quantised unlike each other ({text}), and a module has one format")
    first = pieces[0][1].restoring.meta["val"]
    shape, dtype = facts.bases.get(name, (tuple(first.shape), first.dtype))
    if name in facts.bases:
        values = [piece.restoring.meta["val"] for _, piece in pieces]
        check_whole(
            name, shape, {p.name: (facts.parts[p.name], v) for (_, p), v in zip(pieces, values, strict=True)}, FORMAT
        )
    for _, piece in pieces:
        _check_zeros(program, piece)
    return Matrix(dtype, shape, pieces[0][1].scheme, tuple(pieces))


def _known(weight: Quantised) -> Quantised:
    if weight.scheme.numbers not in BITS:
        raise Unsuitable(f"is {weight.scheme.numbers}, whose levels are not evenly spaced")
    return weight


def _rows(part: Part | None) -> Part | None:
    """``part``, where it is some rows of the original, each of them whole."""
    if part is not None and (part.transposed or part.index[-1] != (0, part.shape[-1])):
        raise Unsuitable("is kept column by column in the original")
    return part


def _check_module(model: nn.Module, facts: Facts, name: str, part: str) -> None:
    kinds = {type(owner) for owner in _owners(model, facts, name)}
    for kind in kinds:
        if not issubclass(kind, (nn.Linear, nn.Embedding)) or not name.endswith(".weight"):
            refuse(FORMAT, f"{part} belongs to a {kind.__name__}, and compressed-tensors holds linears; {_INSTEAD}")


def _owners(model: nn.Module, facts: Facts, name: str) -> list[nn.Module]:
    """The modules that have a weight, under any of its names."""
    modules = dict(model.named_modules())
    names = (name, *(other for other, kept in facts.tied.items() if kept == name))
    return [modules[owner] for other in names if (owner := other.rpartition(".")[0]) in modules]


def _check_zeros(program: Program, weight: Quantised) -> None:
    if weight.zero is None:
        return
    limit = 1 << BITS[weight.scheme.numbers] - 1
    low, high = torch.aminmax(restored(program, weight.zero))
    if int(low) < -limit or int(high) >= limit:
        reason = f"has zero points from {int(low)} to {int(high)}, beyond its numbers"
        refuse(FORMAT, f"{weight.name} {reason}, which compressed-tensors cannot hold; {_INSTEAD}")


def _check_roundings(program: Program) -> None:
    """Refuses roundings of anything but what enters quantised linears."""
    quantised = set(quantised_weights(program))
    for rounding in program.nodes(QUANTIZE):
        for value in rounding.users:
            for reader in value.users:
                if reader.target is not LINEAR or reader.args[0] is not value or reader.args[1] not in quantised:
                    reason = f"{where(rounding)} rounds what {where(reader)} reads, which is no quantised linear"
                    refuse(FORMAT, f"{reason}; leave out the pass that rounds it")


def _grids(program: Program) -> set[str]:
    """The names of scales and zero points, of weights and of what is rounded."""
    return {
        str(weight.target)
        for node in program.nodes(DEQUANTIZE, QUANTIZE)
        for argument in node.args[1:3]
        for weight in stored_in(argument)
    }


def _check_additions(program: Program, matrices: Mapping[str, Matrix]) -> None:
    """Refuses what stands beside a quantised weight and is added to its product."""
    known = _grids(program)
    for matrix in matrices.values():
        for _, piece in matrix.pieces:
            extra = [name for name in program.weights if name.startswith(f"{piece.name}_") and name not in known]
            if extra:
                reason = f"{piece.name} has outlier columns or a correction beside it ({', '.join(extra)})"
                refuse(FORMAT, f"{reason}, which compressed-tensors cannot hold; quantise it without, or exclude it")


def _plain(program: Program, matrices: Mapping[str, Matrix]) -> dict[str, Lazy]:
    """All other weights, under the original names; quantised tables as the numbers that they stand for."""
    weights = program.weights
    held = {piece.name for matrix in matrices.values() for _, piece in matrix.pieces}
    tables = {weight_name(node): node for node in quantised_weights(program) if weight_name(node) not in held}
    grids = _grids(program)
    values = {
        name: Lazy(weights.dtype(name), weights.shape(name), functools.partial(weights.__getitem__, name))
        for name in weights
        if name not in grids | held
    }
    return originals(program.facts, values | {name: _value(program, node) for name, node in tables.items()}, FORMAT)


def _value(program: Program, restoring: fx.Node) -> Lazy:
    value = restoring.meta["val"]
    return Lazy(value.dtype, tuple(value.shape), functools.partial(restored, program, restoring))


# -- tensors -----------------------------------------------------------------------------------------------------------


def _tensors(program: Program, model: nn.Module, state: Mapping[str, Lazy | Matrix]) -> dict[str, Lazy]:
    """What the files hold; of two names of one tensor the first, unless one of them is quantised."""
    same = tied_names(model.state_dict(keep_vars=True))
    tensors: dict[str, Lazy] = {}
    for name, value in state.items():
        stem = name.removesuffix(".weight")
        if not isinstance(value, Matrix):
            if same[name][0] == name:
                tensors[name] = value
        elif isinstance(model.get_submodule(stem), nn.Linear):
            tensors |= {f"{stem}.{suffix}": tensor for suffix, tensor in _held(program, value).items()}
        else:  # an embedding that is the head as well
            tensors[name] = _value(program, value.pieces[0][1].restoring)
    return tensors


def _held(program: Program, matrix: Matrix) -> dict[str, Lazy]:
    """The tensors of one module, by what follows its name."""
    weights, scheme, (rows, columns) = program.weights, matrix.scheme, matrix.shape
    first = matrix.pieces[0][1]
    grid = (rows, matrix.groups)
    kinds = [weights.dtype(piece.scale) for _, piece in matrix.pieces]
    if first.zero is not None and matrix.dtype == torch.float32:
        kinds.append(torch.float32)  # where transformers restores weights as it reads them, it does so in this type
    scale_dtype = functools.reduce(torch.promote_types, kinds)

    def whole(read: Callable[[Quantised], Tensor], dtype: torch.dtype, width: int) -> Lazy:
        return Lazy(dtype, (rows, width), lambda: _joined(matrix, read, dtype, width))

    def stored(piece: Quantised) -> Tensor:
        return weights[piece.name]

    held = {"weight_scale": whole(lambda piece: weights[piece.scale], scale_dtype, matrix.groups)}
    if compression(scheme) != PACKED:
        held["weight"] = whole(stored, weights.dtype(first.name), columns)
    else:
        bits, dtype, width = BITS[scheme.numbers], weights.dtype(first.name), weights.shape(first.name)[1]
        shape = (rows, _words(columns, bits))
        numbers = whole(stored, dtype, width)
        held["weight_packed"] = Lazy(torch.int32, shape, lambda: _as_words(numbers.load(), shape[1]))
        held["weight_shape"] = Lazy(torch.int64, (2,), lambda: torch.tensor([rows, columns]))
    if first.zero is not None:
        bits = BITS[scheme.numbers]
        zeros = whole(lambda piece: restored(program, piece.zero), torch.int8, grid[1])  # type: ignore[arg-type]
        held["weight_zero_point"] = Lazy(
            torch.int32, (_words(rows, bits), grid[1]), lambda: _packed(zeros.load().T, bits).T.contiguous()
        )
    if scheme.inputs == "tensor":
        name = str(first.input_scale)
        held["input_scale"] = Lazy(weights.dtype(name), (1,), lambda: weights[name].reshape(1))
    return held


def _joined(matrix: Matrix, read: Callable[[Quantised], Tensor], dtype: torch.dtype, width: int) -> Tensor:
    """What ``read`` gives of each piece, ``width`` columns of it, in the place of its rows."""
    rows = matrix.shape[0]
    if matrix.pieces[0][0] is None:
        return read(matrix.pieces[0][1]).to(dtype).reshape(rows, width)
    whole = torch.empty(rows, width, dtype=dtype)
    for part, piece in matrix.pieces:
        assert part is not None
        _with_columns(part, width).put(whole, read(piece).to(dtype).reshape(-1, width))
    return whole


def _with_columns(part: Part, width: int) -> Part:
    """The same rows of a matrix of ``width`` columns."""
    return replace(
        part, grid=(*part.grid[:-1], width), index=(*part.index[:-1], (0, width)), shape=(*part.shape[:-1], width)
    )


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _packed(numbers: Tensor, bits: int) -> Tensor:
    """int8 [m, n] as int32 [m, words]: a row is a stream of ``bits`` a number, lowest first, offset to be positive."""
    count = numbers.shape[1]
    padded = F.pad(numbers, (0, -count % 8), value=-(1 << bits - 1))
    pack = {4: pack_int4, 3: pack_int3}[bits]
    return _as_words(pack(padded), _words(count, bits))


def _as_words(stored: Tensor, words: int) -> Tensor:
    """Rows of packed numbers as slim keeps them, uint8 or int8, as rows of ``words`` int32: the bits are the same."""
    if stored.dtype == torch.int8:
        stored = stored.view(torch.uint8) ^ 128  # q + 128
    padded = F.pad(stored, (0, -stored.shape[1] % 4))
    return padded.reshape(-1).view(torch.int32).view(len(padded), -1)[:, :words]


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(folder: Path, model: Any, config: Any, tensors: Mapping[str, Lazy], masks: set[str]) -> None:
    """config.json, generation_config.json and the tensors, one in memory at a time."""
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    weights = Weights(dict(tensors))
    weights.masks = set(masks)
    files = write_weights(weights, folder, "model")
    if len(files) > 1:
        _write_index(folder, weights, files)


def _write_index(folder: Path, weights: Weights, files: list[Path]) -> None:
    where_kept = {name: file.name for file in files for name in stored_weights([file])}
    total = sum(weights.nbytes(name) for name in weights)
    index = {"metadata": {"total_size": total}, "weight_map": where_kept}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
