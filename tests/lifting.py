"""Lifting takes seconds, and most tests are about what comes after it: each model is lifted once a process.

``conftest`` puts ``lift_once`` and ``lift_path_once`` where slim.compile and the command line look for lift and
lift_path. A model that changed, in its weights or its configuration, is lifted anew. Tests of lifting itself call
``slim.compiler.lift.lift``, which is as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from slim.compiler.lift import lift, lift_path
from slim.compiler.program import Program

_models: WeakKeyDictionary[nn.Module, tuple[Any, Program]] = WeakKeyDictionary()
_paths: dict[Any, Program] = {}


def lift_once(model: nn.Module, example_inputs: Any = None, source: Path | None = None) -> Program:
    """``lift``, or a copy of what it gave for the same transformers model before."""
    if not isinstance(model, PreTrainedModel) or example_inputs is not None or source is not None:
        return lift(model, example_inputs, source)
    state = _state(model)
    if model not in _models or _models[model][0] != state:
        _models[model] = (state, lift(model))
    return _models[model][1].copy()


def lift_path_once(path: str | Path, example_inputs: Any = None) -> Program:
    """``lift_path``, or a copy of what it gave for the same files before."""
    files = sorted(Path(path).iterdir()) if Path(path).is_dir() else []
    if example_inputs is not None or not files:
        return lift_path(path, example_inputs)
    key = (str(path), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    if key not in _paths:
        _paths[key] = lift_path(path)
    return _paths[key].copy()


def _state(model: PreTrainedModel) -> Any:
    """What changes when a weight is written to or replaced, and when the configuration changes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    generation = model.generation_config.to_dict() if model.can_generate() else None
    return [(name, id(t), t._version, t.dtype) for name, t in tensors], model.config.to_dict(), generation
