"""slim.compile: lift, rewrite, lower."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slim import errors
from slim.codegen import select
from slim.compiler.dump import Dump
from slim.compiler.lift import lift, lift_path
from slim.compiler.passes_base import Context, Pass, Progress
from slim.compiler.pipeline import run_pipeline
from slim.compiler.program import Program
from slim.passes import as_passes
from slim.runtime.cache import KVCacheConfig, as_config
from slim.runtime.compiled import CompiledModel


def compile(
    model: nn.Module | str | Path,
    passes: str | Pass | Sequence[str | Pass] = (),
    *,
    calibration: Any = None,
    example_inputs: Any = None,
    target: str = "auto",
    kv_cache: KVCacheConfig | None = None,
    verify: bool = True,
    strict: bool = True,
    dump: str | Path | None = None,
    progress: Progress | None = None,
    tune: float | None = None,
) -> CompiledModel:
    """Compiles a model: lifts it into slim's IR, applies ``passes`` in order, and lowers the result for ``target``.

    The model is left as it was, and shares every weight that no pass changes. Given by path, its weights are read
    one at a time and never all at once before they are compressed.

    Args:
        model: an nn.Module, a transformers model, or the path or hub id of one.
        passes: Pass objects, or pipeline text: ``'fold_norms, quantize("int8")'``.
        calibration: texts (list of str), token ids (list of [B, S]) or a DataLoader, for passes that need statistics.
        example_inputs: a tensor, tuple or dict to trace a plain module with.
        target: "auto", "cpu", "cuda" or "eager"; "cuda:sm_90" compiles ahead of time for a GPU that is not here.
        kv_cache: how past keys and values are kept.
        verify: check the IR, and the output on a probe, after every pass.
        strict: a pass that matches nothing is an error.
        dump: a directory for the IR after each stage and for what was generated (also by SLIM_DUMP).
        progress: called with (what, done, of how many) on the way.
        tune: seconds to spend on finding the fastest configurations of kernels on this GPU; what was found is kept
            for later. None takes the defaults, which are the same on every run.

    Raises:
        SlimError: one of the catalogue in ``slim.errors``; nothing is left behind.

    Example:
        >>> compiled = slim.compile(model, passes=[FoldNorms(), Quantize("int8")])
        >>> print(compiled.report)
    """
    pipeline = as_passes(passes)
    chosen = select(target, tune)
    as_config(kv_cache)  # now, and not after the passes
    context = _context(calibration, verify, strict, dump, progress)
    Dump.to(context.dump).check()  # now, and not after the lift
    start = time.perf_counter()
    program = _lift(model, example_inputs)
    seconds = {"lift": time.perf_counter() - start}
    program, report = run_pipeline(program, pipeline, context)
    start = time.perf_counter()
    compiled = CompiledModel(
        program, chosen, report=report, kv_cache=kv_cache, pipeline=", ".join(map(repr, pipeline)), dump=context.dumped
    )
    report.seconds = seconds | report.seconds | {"lower": time.perf_counter() - start}
    check_generated(compiled, context)
    context.dumped.report(report)
    return compiled


def check_generated(compiled: CompiledModel, context: Context) -> None:
    """Notes in the report how far what generated code computes of the probe is off."""
    report = compiled.report
    if report is None or context.probed is None or not compiled.target.runs:
        return
    if any(form.regions for form in report.forms.values()):
        probe, expected = context.probed
        start = time.perf_counter()
        report.error = probe.error(expected, _on_target(compiled, probe.inputs))
        report.seconds["check"] = time.perf_counter() - start


def _on_target(compiled: CompiledModel, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The flat outputs of generated code, where the inputs lie."""
    outputs = compiled.run_flat([value.to(compiled.device) for value in inputs])
    return tuple(value.to(inputs[0].device) if isinstance(value, Tensor) else value for value in outputs)


def _lift(model: nn.Module | str | Path, example_inputs: Any) -> Program:
    if isinstance(model, nn.Module):
        return lift(model, example_inputs)
    if isinstance(model, (str, Path)):
        return lift_path(model, example_inputs)
    raise errors.BadInput(argument="model", reason=f"{type(model).__name__} is neither a module nor a path")


def _context(
    calibration: Any, verify: bool, strict: bool, dump: str | Path | None, progress: Progress | None
) -> Context:
    folder = None if dump is None else Path(dump)
    context = Context(calibration=calibration, verify=verify, strict=strict, dump=folder)
    return context if progress is None else replace(context, progress=progress)
