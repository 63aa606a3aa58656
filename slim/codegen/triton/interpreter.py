"""Triton's interpreter: kernels run on the CPU, by numpy, when the environment has TRITON_INTERPRET=1.

Triton reads that variable when it is imported, and a process either interprets all kernels or none.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any


def interpreting() -> bool:
    """Whether kernels of this process are interpreted."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def mend() -> None:
    """Two faults of the interpreter, up to Triton 3.6: numbers as range bounds under numpy 2.4, dot of bfloat16."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    @functools.wraps(patch)
    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    dot = interpreter.InterpreterBuilder.create_dot

    @functools.wraps(dot)
    def widened(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype == tl.bfloat16:  # held as the bits of a uint16
            a, b = (
                interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for x in (a, b)
            )
        return dot(self, a, b, d, *rest)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = widened
