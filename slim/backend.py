"""``torch.compile(model, backend="slim")``: what Dynamo captures goes the way of ``slim.compile``.

Dynamo calls the backend once for each graph that it captures. Weights are frozen into the Program, passes are applied,
and what comes back runs the generated code. Nothing is left to PyTorch in silence: where Dynamo breaks a graph, or a
piece has nothing to compute, a warning names the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx

from slim import errors
from slim.codegen import select
from slim.compiler.lift.captured import Captured, capture
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.report import PipelineReport
from slim.passes import as_passes
from slim.runtime.compiled import CompiledModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What ``options={...}`` of torch.compile may hold; each as ``slim.compile`` has it.

    Attributes:
        calibration: a list of tuples of tensors, or of dicts by the names of the model's arguments; every graph that is
            captured must take them, so that calibration wants a model without graph breaks.
    """

    passes: Any = ()
    calibration: Any = None
    target: str = "auto"
    verify: bool = True
    strict: bool = True

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """Raises BackendOption for one that there is not."""
        known = [field.name for field in fields(cls)]
        for name in given or {}:
            if name not in known:
                raise errors.BackendOption(option=name, known=known)
        return cls(**(given or {}))


def slim_backend(module: fx.GraphModule, examples: Sequence[Any], *, options: Any = None, mode: Any = None) -> Any:
    """Compiles one captured graph; torch.compile calls this, and nobody else.

    Args:
        options: see ``Options``. mode: refused; slim has none.

    Raises:
        BackendOption, NeedsNoGrad, and what slim.compile raises; torch.compile wraps them.

    Example:
        >>> fast = torch.compile(model, backend="slim", options={"passes": 'quantize("int8")'})
        >>> with torch.no_grad():
        ...     fast(x)
    """
    if mode is not None:
        raise errors.BackendOption(option="mode", known=[field.name for field in fields(Options)])
    chosen = Options.of(options)
    if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in examples):
        raise errors.NeedsNoGrad
    passes, target = as_passes(chosen.passes), select(chosen.target)
    _tell_breaks()
    captured = capture(module, examples)
    if captured.program is None:
        log.warning("a captured graph computes nothing: all that it returns are its inputs, or views of them")
        return module.forward
    context = Context(calibration=chosen.calibration, verify=chosen.verify, strict=chosen.strict)
    program, report = run_pipeline(captured.program, passes, context)
    text = ", ".join(map(repr, passes))
    return Piece(captured, CompiledModel(program, target, report=report, pipeline=text))


class Piece:
    """A captured graph, compiled: takes and returns what that did."""

    def __init__(self, captured: Captured, compiled: CompiledModel) -> None:
        self.captured, self.compiled = captured, compiled
        self._versions = {place: weight._version for place, weight in captured.frozen.items()}

    @property
    def report(self) -> PipelineReport:
        found: PipelineReport = self.compiled.report
        return found

    @torch.no_grad()
    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """Raises WeightsChanged where a weight is no longer what was compiled."""
        self._check_weights(arguments)
        outputs = self.compiled.run_flat([arguments[place].contiguous() for place in self.captured.inputs])
        for place, output in self.captured.mutated:
            arguments[place].copy_(outputs[output])
        return tuple(give(arguments, outputs) for give in self.captured.results)

    def _check_weights(self, arguments: Sequence[Any]) -> None:
        for place, weight in self.captured.frozen.items():
            if arguments[place] is not weight or weight._version != self._versions[place]:
                raise errors.WeightsChanged


_told = 0  # how many of Dynamo's graph breaks have been told of


def _tell_breaks() -> None:
    """Warns of the graph breaks that came since it was last asked; Dynamo forgets them when it is reset."""
    global _told
    from torch._dynamo.utils import graph_break_reasons

    _told = min(_told, len(graph_break_reasons))
    for number, found in enumerate(graph_break_reasons[_told:], _told + 1):
        log.warning("graph break %d%s: PyTorch runs what lies between two graphs: %s", number, _at(found), _why(found))
    _told = len(graph_break_reasons)


def _at(found: Any) -> str:
    return f" at {found.user_stack[-1].filename}:{found.user_stack[-1].lineno}" if found.user_stack else ""


def _why(found: Any) -> str:
    """What Dynamo calls it, and its explanation, which names the call."""
    lines = [line.strip() for line in found.reason.strip().splitlines()]
    if lines[0].startswith("generic_jump"):
        return "a branch depends on the numbers in a tensor"
    told = next((line for line in lines if line.startswith("Explanation:")), "")
    return f"{lines[0]}. {told}" if told else lines[0]
