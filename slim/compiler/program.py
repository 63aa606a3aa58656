"""The Program: a graph in slim's dialect, its weights, and the facts that later stages need."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

import slim.compiler.dialect  # noqa: F401  registers the ops that every Program is written in
from slim import errors
from slim.compiler.types import Input, Typer
from slim.compiler.weights import Part, Weights

if TYPE_CHECKING:
    import networkx

    from slim.compiler.difference import Difference


@dataclass
class Facts:
    """What a graph cannot say of itself.

    Attributes:
        kind: "causal_lm" (has generate), "encoder", or "module".
        architecture: the class the model came as, for messages and for export; passes never read it.
        config: transformers' configuration as a dict, kept true by the passes that change shapes; None elsewhere.
        generation: transformers' generation configuration as a dict.
        source: where the model was read from; its tokenizer lies there too.
        in_spec, out_spec: how the caller's arguments and results nest (torch pytree, as JSON).
        tied: other name -> the one name under which a shared weight is kept.
        parts: derived weight -> which part of which original it is.
        constants: weights that are not parameters (buffers, folded literals).
        retired: weights that were folded away, and the constant that stands in their place.
        replaced: weights in whose place a pass put others, and that pass as pipeline text.
        bases: shape and dtype of the originals that ``parts`` refers to.
        max_length: the longest sequence the graph is right for; None where nothing limits it.
        notes: what the lift wants the user to know.
    """

    kind: str = "module"
    architecture: str = ""
    config: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    source: Path | None = None
    in_spec: str = ""
    out_spec: str = ""
    tied: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    bases: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    retired: dict[str, float] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    added: list[str] = field(default_factory=list)
    max_length: int | None = None
    notes: list[str] = field(default_factory=list)


_UNPACKS = (
    torch.ops.slim.unpack_int4.default,
    torch.ops.slim.unpack_int3.default,
    torch.ops.slim.unpack_nf4.default,
)


class Program:
    """A model as slim sees it. Running ``module()`` eagerly is its meaning; whatever is generated must match it."""

    def __init__(self, graph: fx.Graph, weights: Weights, inputs: tuple[Input, ...], facts: Facts) -> None:
        self.graph = graph
        self.weights = weights
        self.inputs = inputs
        self.facts = facts
        self.raised: dict[str, Any] = {}  # what each rule did while lifting, by its name
        self.typer = Typer(inputs)
        weights.masks |= facts.constants

    # -- reading ---------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        from slim.compiler.text import print_program

        return print_program(self)

    def _repr_html_(self) -> str:
        """For notebooks."""
        from slim.compiler.notebook import program_html

        return program_html(self)

    @property
    def dims(self) -> dict[Any, str]:
        """Symbol -> name of the symbolic dimensions."""
        return self.typer.dims

    def nodes(self, *targets: Any) -> Iterator[fx.Node]:
        """The nodes that call one of ``targets``, in order; all operations when none is named."""
        for node in self.graph.nodes:
            if node.op == "call_function" and (not targets or node.target in targets):
                yield node

    def attention_nodes(self) -> list[fx.Node]:
        """One node a layer, in the order of execution."""
        ops = torch.ops.slim
        return list(self.nodes(ops.attention.default, ops.cached_attention.default, ops.paged_attention.default))

    def weight_of(self, node: Any) -> str | None:
        """The name of the weight that ``node`` reads, if that is what it does."""
        return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    @property
    def parameters(self) -> int:
        """Numbers the model holds, tied weights once; buffers, scales and zero points are not counted."""
        q, dq = torch.ops.slim.quantize.default, torch.ops.slim.dequantize.default
        unpacked = {self.weight_of(node.args[0]): node for node in self.nodes(*_UNPACKS)}
        grids = {
            self.weight_of(argument.args[0] if argument.target in _UNPACKS else argument)
            for node in self.nodes(q, dq)
            for argument in node.args[1:3]
            if isinstance(argument, fx.Node)
        }
        counted = [name for name in self.weights if name not in grids | self.facts.constants]
        return sum(
            unpacked[name].meta["val"].numel() if name in unpacked else self.weights.numel(name) for name in counted
        )

    @property
    def nbytes(self) -> int:
        return sum(self.weights.nbytes(name) for name in self.weights)

    def diff(self, other: Program, context: int = 2) -> Difference:
        """What is other in ``other``: nodes and weights, by name and as a unified text of the IR.

        Weights that are not one tensor in both are read and compared, one at a time.

        Args:
            context: equal lines around those that differ.

        Raises:
            BadInput: for what is no Program; of a compiled model it is ``compiled.program``.

        Example:
            >>> print(before.diff(after))
        """
        from slim.compiler.difference import Difference

        if not isinstance(other, Program):
            raise errors.BadInput(
                argument="other", reason=f"it is no Program, but {other!r:.40}", of="slim.Program.diff"
            )
        if not isinstance(context, int) or context < 0:
            raise errors.BadInput(
                argument="context", reason=f"{context!r:.40} is no number of lines", of="slim.Program.diff"
            )
        return Difference.of(self, other, context)

    def to_networkx(self) -> networkx.MultiDiGraph:
        """The graph for networkx; see ``slim.compiler.networkx_graph`` for what nodes and edges say."""
        from slim.compiler.networkx_graph import to_networkx

        return to_networkx(self)

    # -- running ---------------------------------------------------------------------------------------------------

    def module(self) -> fx.GraphModule:
        """The Program as a torch.fx.GraphModule over its own weights (read from disk where they still lie there)."""
        self.weights.materialise()
        return fx.GraphModule(dict(self.weights.items()), self.graph)

    @torch.no_grad()
    def run(self, *args: Any) -> tuple[Any, ...]:
        """Executes node by node, dropping each value after its last use: weights on disk pass through one at a time."""
        return Streaming(self).run(*args)

    # -- rewriting -------------------------------------------------------------------------------------------------

    def copy(self) -> Program:
        """A Program that can be rewritten without touching this one; the tensors are shared."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, mapping))
        output, old_output = graph.output_node(), self.graph.output_node()
        output.meta = dict(old_output.meta)
        for old, new in mapping.items():
            new.meta = dict(old.meta)
        other = Program(graph, self.weights.copy(), self.inputs, copy.deepcopy(self.facts))
        other.raised = self.raised
        other.typer = self.typer  # the types copied above are in its symbols
        return other

    def infer(self) -> None:
        """Types every node anew."""
        self.typer.infer(self.graph, self.weights)

    def insert(self, before: fx.Node, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        """A new operation before ``before``, typed, with the provenance of ``like``."""
        args, kwargs = without_defaults(target, args, kwargs)
        schema = getattr(target, "_schema", None)
        name = schema.name.split("::")[-1] if schema is not None else None
        with self.graph.inserting_before(before):
            node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta.update(provenance(like))
        node.meta["val"] = self.typer.value(node, self.weights)
        return node

    def weight_node(self, name: str) -> fx.Node:
        """The node that reads weight ``name``, made, ahead of all operations, if there is none."""
        for node in self.graph.find_nodes(op="get_attr", target=name):
            return node
        anchor = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        with self.graph.inserting_before(anchor) if anchor is not None else nullcontext():
            node = self.graph.create_node("get_attr", name, name=_identifier(name))
        node.meta["val"] = self.typer.value(node, self.weights)
        return node

    def clean(self) -> None:
        """Removes what no output depends on: dead operations, and weights that nothing reads."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op in ("call_function", "get_attr") and not _has_effect(node):
                self.graph.erase_node(node)
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        for name in [name for name in self.weights if name not in read]:
            del self.weights[name]


class Streaming(fx.Interpreter):
    """Runs a Program node by node; a subclass may look at what comes by."""

    def __init__(self, program: Program) -> None:
        super().__init__(fx.GraphModule({}, fx.Graph()), garbage_collect_values=True, graph=program.graph)
        self.extra_traceback = False  # errors of slim's own say all there is to say
        self.weights = program.weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> None:
        """Reads nothing yet: weight nodes lead the graph, and all of them at once may not fit into memory."""

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        return fx.map_arg(args, lambda a: self.weights[str(a.target)] if a.op == "get_attr" else self.env[a])


def without_defaults(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with nothing said that the schema says already, so that equal operations read alike."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return args, kwargs
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    kept = len(args)
    while kept and positional[kept - 1] in defaults and _equal(args[kept - 1], defaults[positional[kept - 1]]):
        kept -= 1
    said = {k: v for k, v in kwargs.items() if k not in defaults or not _equal(v, defaults[k])}
    return tuple(args[:kept]), said


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def provenance(node: fx.Node) -> dict[str, Any]:
    """What of a node's meta says where it came from: ``module`` (path) and ``where`` (file:line)."""
    return {key: node.meta[key] for key in ("module", "where") if key in node.meta}


def where(node: fx.Node) -> str:
    """A node for a message: its name, and the line of the model's source that made it."""
    origin = " ".join(part for part in (node.meta.get("module"), node.meta.get("where")) if part)
    return f"{node.name} ({origin})" if origin else node.name


def _identifier(name: str) -> str:
    return "w_" + "".join(c if c.isalnum() else "_" for c in name)


def _has_effect(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
