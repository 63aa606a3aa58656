"""Compiles ahead of time for the architecture named, and prints what came of it as JSON.

A process of its own: where the tests run, Triton interprets.
"""

import json
import sys
from typing import Any

import sympy

from slim import errors
from slim.codegen.triton.ahead import Binary, compile_for
from slim.codegen.triton.kernel import Config, Kernel
from tests.codegen.triton import small

S = sympy.Symbol("S", integer=True, positive=True)


def facts(binary: Binary) -> dict[str, Any]:
    data = {name: getattr(binary, name) for name in ("arch", "kind", "registers", "spills", "shared", "assembly")}
    return data | {"elf": binary.data[:4] == b"\x7fELF", "size": len(binary.data)}


def refused(kernel: Kernel, arch: str, config: Config | None = None) -> list[str]:
    """The error's class, and its text."""
    try:
        compile_for(kernel, arch, config)
    except errors.SlimError as error:
        return [type(error).__name__, str(error)]
    return []


def main(arch: str) -> None:
    result: dict[str, Any] = {
        "add": facts(compile_for(small.add(), arch)),
        "again": facts(compile_for(small.add(), arch)),
        "wider": facts(compile_for(small.add(), arch, small.add().configs[2])),
        "spilling": facts(compile_for(small.spilling(), arch)),
        "fitting": facts(compile_for(small.spilling(warps=8), arch)),
        "aligned": facts(compile_for(small.row_sum(16 * S), arch)),
        "unaligned": facts(compile_for(small.row_sum(16 * S + 1), arch)),
        "wrong": refused(small.add(name="wrong", body=["tl.store(out, nothing)"]), arch),
    }
    if arch.startswith("sm_"):
        result["no_such"] = refused(small.add(), "sm_99")
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
