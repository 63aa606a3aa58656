"""``torch.compile(model, backend="slim")``: what Dynamo captures goes the way of ``slim.compile``.

Dynamo calls the backend once for each graph that it captures. Weights are frozen into the Program, passes are applied,
and what comes back runs the generated code. Where Dynamo says that it breaks a graph, or a piece has nothing to
compute, a warning names the reason.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from slim import errors
from slim.codegen import select
from slim.compiler.lift.captured import Captured, capture
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.probe import make_probe
from slim.compiler.report import left_to_pytorch
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
        """Raises BackendOption for one that there is not, BadInput for a value of another type."""
        if given is not None and not isinstance(given, Mapping):
            raise errors.BadInput(
                argument="options", reason=f"it is a dict, not {given!r:.40}", of="slim.backend.Options"
            )
        known = [field.name for field in fields(cls)]
        for name, value in (given or {}).items():
            if name not in known:
                raise errors.BackendOption(option=str(name), known=known)
            if not isinstance(value, _TYPES.get(name, object)):
                reason = f"it must be a {_TYPES[name].__name__}, not {value!r:.40}"
                raise errors.BadInput(argument=f"options[{name!r}]", reason=reason, of="slim.backend.Options")
        return cls(**(given or {}))


_TYPES: dict[str, type] = {"target": str, "verify": bool, "strict": bool}


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
    if _records_gradients(module.graph) and any(isinstance(one, Tensor) and one.requires_grad for one in examples):
        raise errors.NeedsNoGrad
    _tell_breaks()
    return Pieces(module, chosen, examples)


def _records_gradients(graph: fx.Graph) -> bool:
    """Whether something is computed while gradients are recorded, by the mode of the call and those in the graph."""
    modes = [torch.is_grad_enabled()]
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            modes[-1] = bool(node.args[0])
        elif node.target is torch.autograd.grad_mode._enter_inference_mode:
            modes.append(not node.args[0])
        elif node.target is torch.autograd.grad_mode._exit_inference_mode:
            modes.pop()
        elif node.op.startswith("call_") and modes[-1]:
            return True
    return False


_MOST = 256  # pieces of one graph: what changes at every call must not be compiled at every call
_TOO_MANY = f"a graph has been compiled for {_MOST} sizes, numbers and weights; make numbers that change tensors"


class Pieces:
    """A captured graph, compiled for each set of weights that it is called with: takes and returns what that did.

    Dynamo has one graph for all instances of a class, and for a block that is used several times. Where sizes cannot be
    left open, each set of sizes has a piece too.
    """

    def __init__(self, module: fx.GraphModule, options: Options, examples: Sequence[Any]) -> None:
        self._module, self._options = module, options
        self._closed: errors.LiftFailed | None = None  # why sizes cannot be left open
        self._pieces: list[Piece | _Nothing] = []
        self._add(examples)

    @torch.no_grad()
    def __call__(self, *arguments: Any) -> Any:
        """Raises WeightsChanged where a weight no longer holds what was compiled.

        Raises BadInput where inputs overlap, and where more comes than can be compiled.
        """
        _tell_breaks()  # one at the end of a frame comes after the last graph was compiled
        piece = self._found(arguments) or self._made(arguments)
        return piece(arguments)

    def _found(self, arguments: Sequence[Any]) -> Piece | _Nothing | None:
        return next((piece for piece in self._pieces if piece.is_for(arguments)), None)

    def _made(self, arguments: Sequence[Any]) -> Piece | _Nothing:
        from torch._dynamo.convert_frame import compile_lock

        with compile_lock:  # what torch keeps of a trace is one for all threads; and none compiles twice
            return self._found(arguments) or self._add(arguments)

    def _add(self, arguments: Sequence[Any]) -> Piece | _Nothing:
        if len(self._pieces) == _MOST:
            raise errors.BadInput(argument="inputs", reason=_TOO_MANY)
        captured = self._captured(arguments)
        if self._pieces and captured.numbers and self._closed is None:
            log.warning("a graph is compiled once more, for other numbers: %s", [*captured.numbers.values()])
        self._pieces.append(Piece.of(captured, self._module, self._options, arguments))
        return self._pieces[-1]

    def _captured(self, arguments: Sequence[Any]) -> Captured:
        """For all sizes that Dynamo lets change; where that cannot be lifted, for these alone, with a warning."""
        if self._closed is None:
            try:
                return capture(self._module, arguments)
            except errors.LiftFailed as error:
                self._closed = error
        captured = capture(self._module, arguments, fixed=True)
        log.warning("a graph is compiled for each set of sizes and numbers that comes: %s", self._closed)
        return captured


class Piece:
    """A captured graph, compiled for the weights that it was given."""

    def __init__(self, captured: Captured, compiled: CompiledModel) -> None:
        self.captured, self.compiled = captured, compiled
        self._states = {place: _State(weight) for place, weight in captured.frozen.items()}

    @classmethod
    def of(
        cls, captured: Captured, module: fx.GraphModule, options: Options, examples: Sequence[Any]
    ) -> Piece | _Nothing:
        passes, target = as_passes(options.passes), select(options.target)
        if captured.program is None:
            log.warning("a captured graph computes nothing: all that it returns are its inputs, or views of them")
            return _Nothing(module)
        # Its own arguments: Dynamo may have a size of its own for each of two that must be equal.
        probe = make_probe(captured.program, [examples[place].detach() for place in captured.inputs])
        context = Context(calibration=options.calibration, probe=probe, verify=options.verify, strict=options.strict)
        program, report = run_pipeline(captured.program, passes, context)
        text = ", ".join(map(repr, passes))
        compiled = CompiledModel(program, target, report=report, pipeline=text, dump=context.dumped)
        for note in (*report.notes, *left_to_pytorch(report)):
            log.warning("%s", note)
        context.dumped.report(report)
        return cls(captured, compiled)

    def is_for(self, arguments: Sequence[Any]) -> bool:
        shaped = all(arguments[place].shape == shape for place, shape in self.captured.shapes.items())
        counted = all(arguments[place] == number for place, number in self.captured.numbers.items())
        return shaped and counted and all(arguments[place] is weight for place, weight in self.captured.frozen.items())

    def __call__(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        if not all(state.is_of(self.captured.frozen[place]) for place, state in self._states.items()):
            raise errors.WeightsChanged
        for place, _ in self.captured.mutated:
            _check_apart(arguments, place)
        outputs = self.compiled.run_flat([arguments[place].contiguous() for place in self.captured.inputs])
        for place, output in self.captured.mutated:
            arguments[place].copy_(outputs[output])
        return tuple(give(arguments, outputs) for give in self.captured.results)


class _Nothing:
    """A captured graph that computes nothing, whatever its weights: as PyTorch runs it."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module

    def is_for(self, arguments: Sequence[Any]) -> bool:
        return True

    def __call__(self, arguments: Sequence[Any]) -> Any:
        return self._module.forward(*arguments)


class _State:
    """In which memory a weight was, and how often it had been written to; other memory comes with ``to`` and ``half``.

    PyTorch counts neither writes through ``data`` nor those to tensors of inference mode.
    """

    def __init__(self, weight: Tensor) -> None:
        self._memory = StorageWeakRef(weight.untyped_storage())  # while it is there, no other memory has its name
        self._version = None if weight.is_inference() else weight._version

    def is_of(self, weight: Tensor) -> bool:
        written = self._version is not None and weight._version != self._version
        return not written and weight.untyped_storage()._cdata == self._memory.cdata


def _check_apart(arguments: Sequence[Any], place: int) -> None:
    """Refuses an input that is written to and that shares memory with another: what one sees of the other is lost."""
    written = _extent(arguments[place])
    for other, value in enumerate(arguments):
        if other != place and isinstance(value, Tensor) and value.device == arguments[place].device:
            start, end = _extent(value)
            if start < written[1] and written[0] < end:
                reason = "the model writes to one that shares memory with another; give it a clone of one of the two"
                raise errors.BadInput(argument="inputs", reason=reason)


def _extent(x: Tensor) -> tuple[int, int]:
    """The addresses from its first byte to behind its last."""
    if x.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


_told: list[Any] = []  # the graph breaks that have been told of


def _tell_breaks() -> None:
    """Warns of the graph breaks that came since it was last asked; Dynamo forgets them when it is reset."""
    from torch._dynamo.utils import graph_break_reasons

    known = len(_told) if all(map(operator.is_, _told, graph_break_reasons)) else 0
    known = min(known, len(graph_break_reasons))
    for number, found in enumerate(graph_break_reasons[known:], known + 1):
        log.warning("graph break %d%s: PyTorch runs what lies between two graphs: %s", number, _at(found), _why(found))
    _told[:] = graph_break_reasons


def _at(found: Any) -> str:
    return f" at {found.user_stack[-1].filename}:{found.user_stack[-1].lineno}" if found.user_stack else ""


def _why(found: Any) -> str:
    """What Dynamo calls it, and its explanation, which names the call."""
    lines = [line.strip() for line in found.reason.strip().splitlines()]
    if lines[0].startswith("generic_jump"):
        return "a branch depends on the numbers in a tensor"
    told = next((line for line in lines if line.startswith("Explanation:")), "")
    return f"{lines[0]}. {told}" if told else lines[0]
