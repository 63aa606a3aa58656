"""From a module to a raw graph: torch.export, then one node an ATen call, weights under their original names."""

from __future__ import annotations

import inspect
import io
import logging
import operator
import os
import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import tracing
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.utils import _pytree as pytree

from slim import errors
from slim.compiler.lift.functional import is_functional, spelled
from slim.compiler.lift.spelled import SpelledOut
from slim.compiler.program import Facts, Program, where
from slim.compiler.text import free_name
from slim.compiler.types import SIZE_OPS, Input
from slim.compiler.weights import Deferred, Weights

log = logging.getLogger(__name__)

_WRITTEN = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION)
_TORCH = str(Path(torch.__file__).parent)


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, facts: Facts
) -> Program:
    """The Program of ``model`` on inputs like ``args`` and ``kwargs``, before any rule is applied.

    Raises:
        LiftFailed: naming the module and the line of its source that cannot be exported.
    """
    # Within torch.compile, guards of this export must not become guards of the graph that Dynamo is making.
    with torch.no_grad(), tracing(None), _quiet(), SpelledOut(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns of its own internals, which no user can act upon
        try:
            args, kwargs = _distinct((args, kwargs))
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            if not is_functional(exported.graph):
                exported = exported.run_decompositions({})
        except errors.SlimError:
            raise
        except Exception as error:  # export raises whatever the model's own code raises under tracing
            module, line = _place(model, error.__traceback__)
            raise errors.LiftFailed(module=module, line=line, reason=_first_lines(error)) from error
    facts.in_spec = pytree.treespec_dumps(exported.call_spec.in_spec)
    facts.out_spec = pytree.treespec_dumps(exported.call_spec.out_spec)
    with _quiet():
        return _Builder(model, exported, facts).build()


def _distinct(inputs: Any) -> Any:
    """The same with a copy for a tensor that is given twice, or torch.export would take the two for one input."""
    given: set[int] = set()

    def once(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = id(value) in given
        given.add(id(value))
        return value.clone() if known else value

    return pytree.tree_map(once, inputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from printing the graph so far when a trace fails, unless TORCH_LOGS asks for its logs."""
    if "TORCH_LOGS" in os.environ:
        yield
        return
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def _first_lines(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: " + " ".join(line.strip() for line in text.splitlines()[:2])


def _place(model: nn.Module, trace: TracebackType | None) -> tuple[str, str]:
    """The innermost submodule whose code was running, and the line of model source it was running."""
    names = {id(module): name for name, module in model.named_modules()}
    module, line = type(model).__name__, "unknown line"
    for frame, number in traceback.walk_tb(trace):
        owner = names.get(id(frame.f_locals.get("self")))
        file = frame.f_code.co_filename
        if owner is not None and not file.startswith(_TORCH):
            module, line = owner or type(model).__name__, f"{_short(file)}:{number}"
    if line == "unknown line":
        source = inspect.getsourcefile(type(model)) or "unknown file"
        line = f"{_short(source)}:{inspect.getsourcelines(type(model).forward)[1]}"
    return module, line


def _short(file: str) -> str:
    """A source path from its package on: ``transformers/models/llama/modeling_llama.py``."""
    return file.rsplit("site-packages/", 1)[-1]


class _Builder:
    """Copies an exported graph: parameters and buffers become ``get_attr`` nodes, other inputs stay inputs."""

    def __init__(self, model: nn.Module, exported: torch.export.ExportedProgram, facts: Facts) -> None:
        self.exported = exported
        self.facts = facts
        self.signature = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
        self.tensors: dict[str, Tensor] = {**exported.state_dict, **exported.constants}
        self.canonical = _canonical_names(model, self.tensors)
        self.values: dict[fx.Node, Any] = {}
        self.graph = fx.Graph()

    def build(self) -> Program:
        self._symbols: dict[str, str] = {}
        inputs: list[Input] = []
        for node in self.exported.graph.find_nodes(op="placeholder"):
            spec = self.signature[node.name]
            if spec.kind == InputKind.USER_INPUT and isinstance(node.meta.get("val"), Tensor):
                inputs.append(self._input(node))
        for node in self.exported.graph.nodes:
            self._copy(node)
        self._tell_written()
        program = Program(self.graph, self._weights(), tuple(inputs), self.facts)
        self._infer(program)
        program.clean()
        return program

    def _input(self, node: fx.Node) -> Input:
        fake = node.meta["val"]
        shape = tuple(self._dim(size, position) for position, size in enumerate(fake.shape))
        name = free_name(node.name, self.signature)
        self.values[node] = self.graph.placeholder(name)
        return Input(name, fake.dtype, shape)

    def _dim(self, size: Any, position: int) -> int | str:
        """Symbols are named in the order they are met: B for a first dimension, S for a second, then d2, d3..."""
        if not isinstance(size, torch.SymInt) or size.node.expr.is_Integer:
            return int(size)
        key = str(size.node.expr)
        if not size.node.expr.is_Symbol:
            raise errors.LiftFailed(
                module=self.facts.architecture,
                line="inputs",
                reason=f"an input dimension depends on another one ({key}); pass example_inputs of fixed size there",
            )
        if key not in self._symbols:
            preferred = {0: "B", 1: "S"}.get(position, f"d{len(self._symbols)}")
            taken = set(self._symbols.values())
            self._symbols[key] = preferred if preferred not in taken else f"d{len(self._symbols)}"
        return self._symbols[key]

    def _copy(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            spec = self.signature[node.name]
            if spec.kind != InputKind.USER_INPUT:
                self.values[node] = self._weight_node(node, spec)
            elif node not in self.values:  # a constant argument (use_cache=False): traced in, no longer an input
                self.values[node] = None
        elif node.op == "output":
            results: Any = node.args[0]
            specs = self.exported.graph_signature.output_specs
            pairs = zip(results, specs, strict=True)
            self.graph.output(
                self._mapped(tuple(value for value, spec in pairs if spec.kind == OutputKind.USER_OUTPUT))
            )
        elif node.op == "call_function" and _is_dialect(node.target):
            self.values[node] = self._call(node)
        else:
            reason = f"the exported graph holds {node.op} of {node.target}, which slim's dialect does not have"
            meta = _provenance(node)
            raise errors.LiftFailed(
                module=meta.get("module", self.facts.architecture), line=meta.get("where", node.name), reason=reason
            )

    def _call(self, node: fx.Node) -> Any:
        """The same call, or the one that stands for it."""
        if node.target is torch.sym_sum:
            return self._sum(self._mapped(node.args[0]))
        other = spelled(node)
        target, args, kwargs = (node.target, node.args, node.kwargs) if other is None else other
        args, kwargs = self._mapped(args), self._mapped(kwargs)
        if target is None:
            return args[0]
        name = node.name if other is None else target._schema.name.split("::")[-1]  # type: ignore[union-attr]
        copied = self.graph.create_node("call_function", target, args, kwargs, name=name)
        copied.meta.update(_provenance(node))
        return copied

    def _sum(self, sizes: Sequence[Any]) -> Any:
        """Sizes, added one by one."""
        total, *others = sizes
        for size in others:
            total = self.graph.call_function(operator.add, (total, size))
        return total

    def _tell_written(self) -> None:
        """What the model writes besides its results, which torch.export puts ahead of them, is left unwritten."""
        specs = self.exported.graph_signature.output_specs
        written = [spec.target for spec in specs if spec.kind in _WRITTEN and spec.target is not None]
        if written:
            self.facts.notes.append(
                f"the model writes to {', '.join(written)} as it runs; what is compiled gives its results, and "
                "does not write there"
            )

    def _mapped(self, value: Any) -> Any:
        return fx.map_arg(value, lambda n: self.values[n])

    def _weight_node(self, node: fx.Node, spec: InputSpec) -> fx.Node:
        name = self.canonical[spec.target or node.name]
        if name not in self._weight_nodes:
            self._weight_nodes[name] = self.graph.create_node("get_attr", name, name=node.name)
        return self._weight_nodes[name]

    @property
    def _weight_nodes(self) -> dict[str, fx.Node]:
        return self.__dict__.setdefault("_made", {})

    def _weights(self) -> Weights:
        held: dict[str, Tensor | Deferred] = {}
        for name, tensor in self.tensors.items():
            if self.canonical[name] != name:
                self.facts.tied[name] = self.canonical[name]
            elif isinstance(tensor, Tensor):
                held[name] = tensor.detach()
        buffers = {spec.target for spec in self.signature.values() if spec.kind is not InputKind.PARAMETER}
        self.facts.constants |= {name for name in held if name in buffers}
        return Weights(held)

    def _infer(self, program: Program) -> None:
        for node in program.graph.nodes:
            try:
                node.meta["val"] = program.typer.value(node, program.weights)
            except Exception as error:
                raise errors.LiftFailed(
                    module=node.meta.get("module", ""),
                    line=node.meta.get("where", where(node)),
                    reason=_first_lines(error),
                ) from error


def _canonical_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Every name of a tensor -> the first name it goes by, so that a tied weight is one value."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in tensors.items():
        names[name] = first.setdefault(id(tensor), name)
    for owner in (model.named_parameters, model.named_buffers):
        for name, tensor in owner(remove_duplicate=False):
            names.setdefault(name, first.setdefault(id(tensor), name))
    return names


def _is_dialect(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in ("aten", "slim")
    return target is operator.getitem or target in SIZE_OPS or target is torch.sym_sum


def _provenance(node: fx.Node) -> dict[str, str]:
    stack = node.meta.get("nn_module_stack") or {}
    path = re.sub(r"^L\['self'\]\.?", "", list(stack.values())[-1][0]) if stack else ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, line) for file, line in frames if not file.startswith(_TORCH)]
    place = f"{_short(own[-1][0])}:{own[-1][1]}" if own else ""
    return {key: value for key, value in (("module", path), ("where", place)) if value}
