"""Runs what a reproducer holds: one pass, on its Program, with random weights."""

from __future__ import annotations

import importlib
import json
import linecache
import math
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from slim import errors
from slim.compiler.facts_json import decode_dtype, decode_facts
from slim.compiler.inputs import vocabulary
from slim.compiler.passes_base import Context, Pass
from slim.compiler.pipeline import run_pipeline
from slim.compiler.program import Program
from slim.compiler.text import parse
from slim.compiler.weights import Weights

_CALIBRATION = (4, 64)  # rows and tokens of random text, for a pass that was given some


def reproduce(
    program: str, weights: str, facts: str, made: dict[str, Any], source: str | None, options: dict[str, Any]
) -> int:
    """Runs a pass again, and says what becomes of it.

    Args:
        program: IR text. weights: a line of JSON each, name, type, shape and perhaps numbers. facts: as JSON.
        made: module, name and options of the pass, and folders to import modules from.
        source: Python text that defines the pass; None where the module can be imported.
        options: of the run: strict, verify, calibrated, and what was raised.

    Returns:
        1 where the pass fails again, 0 where it does not, 2 where it cannot be made.
    """
    try:
        pass_ = _pass(made, source)
    except Exception as error:  # whatever a module of the user's does when it is imported
        print(f"{made['module']}.{made['name']} cannot be made: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    start = parse(program, random_weights(weights), decode_facts(json.loads(facts)))
    calibration = _calibration(start) if options["calibrated"] else None
    print(f"{pass_!r} on {len(start.graph.nodes)} nodes, with random weights")
    with tempfile.TemporaryDirectory() as folder:  # for the reproducer of this failure, which nobody needs
        ctx = Context(options["strict"], options["verify"], Path(folder), calibration=calibration)
        try:
            _, report = run_pipeline(start, [pass_], ctx)
        except errors.SlimError as error:
            cause = error if error.__cause__ is None else error.__cause__
            same = "it fails again" if type(cause).__name__ == options["raised"] else "it fails, in another way"
            told = str(cause).partition("\n  hint: ")[0]  # which is of the first failure
            print(f"{same}: {type(cause).__name__}: {told}")
            return 1
    print(report)
    print(f"it does not fail: the {options['raised']} hangs on the numbers of the weights, or of the calibration data")
    return 0


def random_weights(lines: str) -> Weights:
    """Seeded numbers of about the size that weights have; those that are written out as they are."""
    generator = torch.Generator().manual_seed(0)
    found = Weights()
    for line in filter(None, lines.splitlines()):
        name, dtype, shape, values = json.loads(line)
        kind = decode_dtype(dtype)
        exact = values is not None
        found[name] = torch.tensor(values, dtype=kind).view(shape) if exact else _random(kind, shape, generator)
    return found


def _random(dtype: torch.dtype, shape: list[int], generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        noise = torch.randn(shape, generator=generator)
        value = noise / math.sqrt(shape[-1]) if len(shape) > 1 else 1.0 + 0.1 * noise
        return value.to(dtype)
    if dtype in (torch.int8, torch.uint8):  # quantised numbers, packed or not
        low = -127 if dtype == torch.int8 else 0
        return torch.randint(low, low + 255, shape, generator=generator, dtype=torch.int16).to(dtype)
    return torch.zeros(shape, dtype=dtype)


def _pass(made: dict[str, Any], source: str | None) -> Pass:
    sys.path += [path for path in made["paths"] if path not in sys.path]
    kind: Any = importlib.import_module(made["module"]) if source is None else _module(made["module"], source)
    for part in made["name"].split("."):
        kind = getattr(kind, part)
    pass_: Pass = kind(**made["options"])
    return pass_


def _module(name: str, source: str) -> ModuleType:
    """A module made of ``source``, which tracebacks and ``inspect`` find as if it were a file."""
    module, file = ModuleType(name), f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.modules[name] = module  # where dataclasses look for the types of their fields
    exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
    return module


def _calibration(program: Program) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary(program) or 2, _CALIBRATION, generator=generator)]
