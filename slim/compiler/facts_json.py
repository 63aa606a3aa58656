"""What is known of a Program beside its graph, as JSON has it, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from slim.compiler.program import Facts
from slim.compiler.weights import Part


def encode_facts(facts: Facts) -> dict[str, Any]:
    """What ``decode_facts`` reads back, once through ``json``."""
    encoded: dict[str, Any] = _encode(facts)
    return encoded


def _encode(value: Any) -> Any:
    """Dataclasses as dicts, dtypes and paths as text, everything else as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, torch.dtype):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def decode_facts(data: dict[str, Any]) -> Facts:
    """The facts; KeyError, TypeError or ValueError where ``data`` is not as ``encode_facts`` gives it."""
    parts = {name: _decode_part(part) for name, part in data["parts"].items()}
    bases = {name: (tuple(shape), decode_dtype(dtype)) for name, (shape, dtype) in data["bases"].items()}
    return Facts(**{**data, "parts": parts, "bases": bases, "constants": set(data["constants"])})


def _decode_part(data: dict[str, Any]) -> Part:
    tuples = {name: tuple(data[name]) for name in ("grid", "shape")}
    return Part(**{**data, **tuples, "index": tuple((start, stop) for start, stop in data["index"])})


def decode_dtype(text: str) -> torch.dtype:
    """torch.float32 from "torch.float32"; ValueError for anything that is no dtype."""
    dtype = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{text!r} is no dtype")
    return dtype
