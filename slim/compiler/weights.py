"""The weights of a Program: tensors under their original names, some of them still on disk.

Nothing here reads a value before it is asked for: types come from headers, so that a pass over a model larger than
memory holds one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from slim import errors
from slim.compiler.blocks import row_blocks

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Deferred(Protocol):
    """A tensor that can say what it is before it is read."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def load(self) -> Tensor: ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file; the file is opened for each read, so that no mapping stays resident.

    ``dtype`` is the type it is read as, which may not be the one it is stored in.
    """

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def load(self) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as handle:
                tensor = handle.get_tensor(self.key)
                return tensor.clone() if tensor.dtype == self.dtype else tensor.to(self.dtype)
        except (SafetensorError, OSError) as error:
            raise errors.CheckpointCorrupt(file=str(self.file), reason=f"{self.key}: {error}") from error


@dataclass(frozen=True)
class Part:
    """Which elements of a fused weight a weight is: ``base.reshape(grid)[index].reshape(shape)``, then transposed.

    Attributes:
        base: the original name.
        grid: the shape that puts the fused parts on an axis of their own.
        index: one ``(start, stop)`` a grid axis.
        shape: the part's shape before ``transposed``.
        transposed: whether the last two dimensions are swapped at the end (Conv1D keeps [in, out]).
    """

    base: str
    grid: tuple[int, ...]
    index: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    transposed: bool = False

    def take(self, base: Tensor) -> Tensor:
        part = base.reshape(self.grid)[self._slices()].reshape(self.shape)
        return part.transpose(-1, -2) if self.transposed else part

    def put(self, base: Tensor, part: Tensor) -> None:
        """Writes the part back into ``base``, in place."""
        cells = base.view(self.grid)[self._slices()]
        cells.copy_((part.transpose(-1, -2) if self.transposed else part).reshape(cells.shape))

    def moved(self, base: str) -> Part:
        """The same part of a weight of another name."""
        return replace(self, base=base)

    @property
    def taken_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    def _slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, stop) for start, stop in self.index)


@dataclass(frozen=True, eq=False)
class Derived:
    """A weight of the shape and type of another, made from it whenever it is read; a subclass says how, in ``load``."""

    value: Tensor | Deferred

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def source(self) -> Tensor:
        """The other weight."""
        return self.value if isinstance(self.value, Tensor) else self.value.load()


@dataclass(frozen=True)
class PartOf:
    """A Part of a value that may itself be deferred."""

    value: Tensor | Deferred
    part: Part

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.taken_shape

    def load(self) -> Tensor:
        if isinstance(self.value, Tensor):
            return self.part.take(self.value)
        part = self.part.take(self.value.load())
        return part.clone(memory_format=torch.contiguous_format)  # a view would keep all of what was read


class Weights(MutableMapping[str, Tensor]):
    """Name to tensor. Reading a deferred weight loads it anew each time; ``materialise`` keeps all of them.

    Attributes:
        masks: names that may hold infinity, as a buffer that masks by -inf does; no other may, and none may hold NaN.
    """

    def __init__(self, values: dict[str, Tensor | Deferred] | None = None) -> None:
        self._values: dict[str, Tensor | Deferred] = dict(values or {})
        self._checked: set[str] = set()
        self.masks: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        value = self._values[name]
        tensor = value if isinstance(value, Tensor) else value.load()
        if name not in self._checked:
            check_finite(name, tensor, mask=name in self.masks)
            self._checked.add(name)
        return tensor

    def __setitem__(self, name: str, value: Tensor | Deferred) -> None:
        self._values[name] = value
        self._checked.discard(name)

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the weight
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def raw(self, name: str) -> Tensor | Deferred:
        """The value as it is held, without reading it."""
        return self._values[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._values[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._values[name].shape)

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    def nbytes(self, name: str) -> int:
        return self.numel(name) * self.dtype(name).itemsize

    def is_deferred(self, name: str) -> bool:
        return not isinstance(self._values[name], Tensor)

    def copy(self) -> Weights:
        """Another mapping over the same tensors."""
        other = Weights(self._values)
        other._checked = set(self._checked)
        other.masks = set(self.masks)
        return other

    def rename(self, name: Callable[[str], str]) -> None:
        """Gives every weight the name that ``name`` makes of its own; the order stays."""
        self._values = {name(old): value for old, value in self._values.items()}
        self._checked = set(map(name, self._checked))
        self.masks = set(map(name, self.masks))

    def share(self, other: Weights) -> None:
        """Holds what ``other``, a copy of this mapping, holds under the same names: read from disk, or packed."""
        for name, value in other._values.items():
            if name in self._values and value is not self._values[name]:
                self._values[name] = value
        self._checked |= other._checked & self._values.keys()

    def materialise(self) -> None:
        """Reads what is still on disk, once, and keeps it; checks all of it for NaN and infinity."""
        for name in self._values:
            self._values[name] = self[name]


def check_finite(name: str, tensor: Tensor, *, mask: bool = False) -> None:
    """Raises NonFiniteWeight where a floating-point weight holds NaN or, unless it is a mask, infinity."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = _extremes(tensor.detach())
    if (torch.isfinite(low) and torch.isfinite(high)) or (mask and not torch.isnan(low)):
        return
    flat = tensor.detach().reshape(-1)
    flat = flat.to(torch.float16) if flat.itemsize == 1 else flat
    nans = int(torch.isnan(flat).sum())
    kind, count = ("NaN", nans) if nans else ("infinite", int(torch.isinf(flat).sum()))
    raise errors.NonFiniteWeight(name=name, kind=kind, count=count)


def _extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest number and the highest; NaN if there is any. Needs no temporary of the tensor's size."""
    if tensor.itemsize > 1:
        return torch.aminmax(tensor)
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)  # of eight bits, which aminmax does not take
    found = [torch.aminmax(rows[block].to(torch.float16)) for block in row_blocks(rows.shape)]
    low, high = (torch.stack(part) for part in zip(*found, strict=True))
    return low.amin(), high.amax()
