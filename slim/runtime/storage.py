"""Writing directories whole or not at all, and tensors to safetensors files one at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slim import errors
from slim.compiler.weights import SAFETENSORS_DTYPES, Deferred, Stored, Weights

SHARD_BYTES = 5 * 10**9
_TRANSPOSED = "slim.transposed"  # in a file's metadata: which of its tensors are written as their transpose
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

# -- directories -------------------------------------------------------------------------------------------------------


def check_destination(directory: str | Path, replaceable: Callable[[Path], bool]) -> Path:
    """``directory`` as a path that may be written to.

    Raises:
        SaveFailed: where it cannot be made, or holds something that ``replaceable`` does not know.
    """
    path = Path(directory).resolve()  # a link stays a link, and what it leads to is replaced
    if path.exists() and not path.is_dir():
        raise errors.SaveFailed(path=directory, reason="there is a file of that name")
    if path.is_dir() and any(path.iterdir()) and not replaceable(path):
        raise errors.SaveFailed(path=directory, reason="the directory holds other files, which slim does not overwrite")
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        raise errors.SaveFailed(path=directory, reason=f"{existing} cannot be written to")
    return path


@contextlib.contextmanager
def written_directory(directory: str | Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A temporary directory to write into, which becomes ``directory`` at the end, or vanishes if anything raises.

    Raises:
        SaveFailed: for every failure to write, a full disk for instance; ``directory`` is then as it was.
    """
    target = check_destination(directory, replaceable)
    made = [parent for parent in target.parents if not parent.exists()]
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        _swap(temporary, target)
    except BaseException as error:  # Ctrl-C too must leave nothing behind
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:  # the innermost first
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, (OSError, SafetensorError)) and not isinstance(error, errors.SlimError):
            raise errors.SaveFailed(path=directory, reason=_reason(error)) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _swap(temporary: Path, target: Path) -> None:
    """Puts the new directory in the place of the old one, which comes back if that fails."""
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    was = old / "was"
    try:
        target.rename(was)
        temporary.rename(target)
    except BaseException:
        with contextlib.suppress(OSError):  # what cannot be put back stays in `old`, and is not deleted
            if was.exists():
                was.rename(target)
            old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


# -- files -------------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Writes a file and waits until the disk has it: a full disk may say so only then."""
    with path.open("wb") as file:
        file.write(text.encode())
        _settle(file)


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def checksum(path: Path) -> str:
    """CRC-32 of a file, in hexadecimal."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def write_weights(weights: Weights, directory: Path, stem: str) -> list[Path]:
    """Writes ``<stem>.safetensors``, or numbered shards of 5 GB, holding one weight in memory at a time."""
    shards = list(_shards(weights))
    files = []
    for number, names in enumerate(shards, start=1):
        label = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
        files.append(directory / f"{stem}{label}.safetensors")
        _write_shard(weights, names, files[-1])
    return files


def _shards(weights: Weights) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name in weights:
        if names and size + weights.nbytes(name) > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += weights.nbytes(name)
    yield names


def _write_shard(weights: Weights, names: Iterable[str], path: Path) -> None:
    """The safetensors format: the header's length in 8 bytes, the header in JSON, the tensors as they lie in memory.

    A matrix that lies in memory column by column is written that way, as its transpose, and comes back so: products
    add up in the order of memory, and a reloaded model must give the same bits.
    """
    ordered = sorted(names, key=lambda name: (-weights.dtype(name).itemsize, name))  # so that all are aligned
    turned = [name for name in ordered if _by_column(weights.raw(name))]
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _TRANSPOSED: json.dumps(turned)}}
    offset = 0
    for name in ordered:
        end = offset + weights.nbytes(name)
        shape = list(weights.shape(name))
        shape = [*shape[:-2], shape[-1], shape[-2]] if name in turned else shape
        header[name] = {"dtype": _NAMES[weights.dtype(name)], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(_bytes(weights[name].mT if name in turned else weights[name]))
        _settle(file)


def _by_column(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() >= 2 and not value.is_contiguous() and value.stride(-2) == 1
    return isinstance(value, _Transposed)


@dataclass(frozen=True)
class _Transposed:
    """A stored tensor whose last two dimensions are swapped, so that it lies in memory as it did when it was saved."""

    stored: Stored

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        *rest, columns, rows = self.stored.shape
        return (*rest, rows, columns)

    def load(self) -> Tensor:
        return self.stored.load().mT


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def stored_weights(files: Iterable[Path]) -> Weights:
    """The weights in ``files``, still on disk.

    Raises:
        CheckpointCorrupt: where a file is damaged.
    """
    values: dict[str, Tensor | Deferred] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                turned = json.loads((handle.metadata() or {}).get(_TRANSPOSED, "[]"))
                for key in handle.keys():  # noqa: SIM118  it is no mapping
                    part = handle.get_slice(key)
                    stored = Stored(file, key, SAFETENSORS_DTYPES[part.get_dtype()], tuple(part.get_shape()))
                    values[key] = _Transposed(stored) if key in turned else stored
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise errors.CheckpointCorrupt(file=file, reason=str(error)) from error
    return Weights(values)
