"""Compiles a model and remembers everything on the way, for the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from slim import errors
from slim.api import check_generated
from slim.codegen import select
from slim.compiler.lift import lift, lift_path
from slim.compiler.passes_base import Context, Pass, Progress
from slim.compiler.pipeline import probe_tokens, run_pipeline
from slim.compiler.program import Program
from slim.inspection.page.collect import Story
from slim.passes import as_passes
from slim.runtime.compiled import CompiledModel


def tell(
    name: str,
    model: nn.Module | str | Path | Program,
    passes: str | Pass | Sequence[str | Pass] = (),
    *,
    calibration: Any = None,
    example_inputs: Any = None,
    target: str = "auto",
    progress: Progress | None = None,
) -> Story:
    """A compilation with the Program of every stage, for ``write_page``.

    Args:
        name: what the report calls the model.
        model, passes, calibration, example_inputs, target, progress: as ``slim.compile`` takes them; also a Program.

    Raises:
        What ``slim.compile`` raises.

    Example:
        >>> write_page(tell("demo", "examples/demo_model", 'fold_norms, quantize("int8")'), "report.html")
    """
    if not isinstance(model, (nn.Module, str, Path, Program)):
        reason = f"{type(model).__name__} is neither a module nor a path nor a Program"
        raise errors.BadInput(argument="model", reason=reason, of="slim.inspection.tell.tell")
    pipeline, chosen = as_passes(passes), select(target)
    start = time.perf_counter()
    if isinstance(model, nn.Module):
        program = lift(model, example_inputs)
    else:
        program = model if isinstance(model, Program) else lift_path(model, example_inputs)
    lifted = time.perf_counter()
    programs: list[Program] = []
    ctx = Context(calibration=calibration, watch=programs.append)
    ctx.progress = progress or ctx.progress
    final, report = run_pipeline(program, pipeline, ctx)
    begin = time.perf_counter()
    text = ", ".join(map(repr, pipeline))
    compiled = CompiledModel(final, chosen, report=report, pipeline=text, dump=ctx.dumped)
    report.seconds = {"lift": lifted - start, **report.seconds, "lower": time.perf_counter() - begin}
    check_generated(compiled, ctx)
    ctx.dumped.report(report)
    return Story(name, programs, report, compiled, probe_tokens=probe_tokens(pipeline))


def compiled_story(name: str, compiled: CompiledModel) -> Story:
    """What is known of a compiled model: its report and its last Program; the earlier ones were not kept."""
    return Story(name, [compiled.program], compiled.report, compiled)
