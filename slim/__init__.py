"""slim: a compiler that makes transformer models smaller and faster.

>>> import slim
>>> compiled = slim.compile("path/to/model", passes=[slim.passes.Quantize("int8")])
>>> compiled.generate(input_ids, max_new_tokens=64)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slim import errors, passes
    from slim.api import compile
    from slim.compiler.lift import lift
    from slim.compiler.program import Program
    from slim.runtime.artifact import load
    from slim.runtime.cache import KVCacheConfig
    from slim.runtime.compiled import CompiledModel
    from slim.runtime.sampling import Sampling
    from slim.runtime.scheduler import Scheduler

__version__ = "0.1.0"

__all__ = [
    "CompiledModel", "KVCacheConfig", "Program", "Sampling", "Scheduler", "compile", "errors", "lift", "load", "passes",
]  # fmt: skip

# Imported when first used: `slim --help` need not wait for torch.
_HOME = {
    "CompiledModel": "slim.runtime.compiled",
    "KVCacheConfig": "slim.runtime.cache",
    "Program": "slim.compiler.program",
    "Sampling": "slim.runtime.sampling",
    "Scheduler": "slim.runtime.scheduler",
    "compile": "slim.api",
    "lift": "slim.compiler.lift",
    "load": "slim.runtime.artifact",
}


def __getattr__(name: str) -> Any:
    if name in ("errors", "passes"):
        return importlib.import_module(f"slim.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'slim' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
