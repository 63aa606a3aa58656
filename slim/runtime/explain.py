"""Where a node or a weight came from, and what became of it: the answer of ``CompiledModel.explain``."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from slim import errors
from slim.codegen.regions.provenance import Stage
from slim.compiler.program import Program
from slim.compiler.report import PipelineReport
from slim.compiler.sources import source_line
from slim.compiler.text import print_node
from slim.compiler.types import show_shape, show_type
from slim.compiler.uses import weight_nodes

_NEAR = 5  # names that are offered for one that is unknown


@dataclass(frozen=True)
class Origin:
    """A line of the model's source.

    Attributes:
        module: path of the module in the model, "model.layers.0.mlp.down_proj".
        where: "transformers/models/llama/modeling_llama.py:66".
        text: that line; None where the file is not here.
    """

    module: str
    where: str
    text: str | None

    def __str__(self) -> str:
        place = " in ".join(part for part in (self.where, self.module) if part)
        return f"{place}: {self.text}" if self.text else place


@dataclass(frozen=True)
class Place:
    """Where generated code computes a node or reads a weight.

    Attributes:
        form: the executable: "whole", "step_last", ...
        number, of: the region's place among those of the form, counted from 1, and how many there are.
        stage: the region, with the kernels that run it.
    """

    form: str
    number: int
    of: int
    stage: Stage

    def __str__(self) -> str:
        kernels = ", ".join(f"{kernel.name} in {self.form}/{kernel.file}" for kernel in self.stage.kernels)
        return f"{self.form}, region {self.number} of {self.of} by {kernels or 'PyTorch'}: {self.stage.text}"


@dataclass
class Explanation:
    """What is known of one name; ``print`` it.

    Attributes:
        name, kind: "node" or "weight".
        line: of a node that is in the Program, its line of IR.
        type: "f32[B, S, 64]"; empty for what a pass removed.
        nbytes: of a weight, and for a node of the weights that it reads directly.
        origins: lines of the model's source: a node's own, or those of the nodes that read the weight.
        weights: of a node: the weights it reads, with their types.
        readers: of a weight: the nodes that read it.
        passes: (pass, "made", "changed" or "removed"), in order; "lift" made what was there from the start.
        places: where generated code has it.
        notes: tied names, and the weight that it is a part of.
    """

    name: str
    kind: str
    line: str = ""
    type: str = ""
    nbytes: int | None = None
    origins: list[Origin] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)
    passes: list[tuple[str, str]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(f"{title:<8} {text}".rstrip() for title, text in self._rows())

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield self.kind, self.line or (f"{self.name}: {self.type}" if self.type else self.name)
        if self.nbytes is not None:
            yield "bytes", f"{self.nbytes:,}"
        yield from _listed("source", self.origins)
        yield from _listed("reads", [f"{name}: {kind}" for name, kind in self.weights.items()])
        yield from _listed("read by", self.readers)
        yield from _listed("passes", [f"{text} {verb} it" for text, verb in self.passes])
        yield from _listed("runs", self.places)
        yield from _listed("note", self.notes)


def _listed(title: str, items: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for index, item in enumerate(items):
        yield title if index == 0 else "", str(item)


def explain(
    program: Program, report: PipelineReport | None, stages: Mapping[str, Sequence[Stage]], name: str | fx.Node
) -> Explanation:
    """What became of ``name``.

    Args:
        report: of the pipeline that made ``program``; None where there was none.
        stages: the regions of each executable that was made of it.
        name: of a node or a weight (by any of its names), also one that a pass removed; or a node.

    Raises:
        BadInput: for a name that never was, with those like it; for what is no name.
    """
    name = name.name if isinstance(name, fx.Node) else name
    if not isinstance(name, str):
        raise errors.BadInput(argument="node", reason=f"it is a node or the name of one, not {name!r:.40}")
    name = program.facts.tied.get(name, name)
    nodes = {node.name: node for node in program.graph.nodes if node.op in ("call_function", "placeholder")}
    weights = {str(node.target): node for node in weight_nodes(program)}
    reports = [] if report is None else report.passes
    if name in weights:
        found = _weight(program, weights[name])
    elif name in nodes:
        found = _node(program, nodes[name])
    elif any(item.changes.weights.verb(name) for item in reports):
        found = Explanation(name, "weight")
    elif any(item.changes.nodes.verb(name) for item in reports):
        found = Explanation(name, "node")
    else:
        raise _unknown(name, [*weights, *nodes, *program.facts.tied])
    is_weight = found.kind == "weight"
    for item in reports:
        verb = (item.changes.weights if is_weight else item.changes.nodes).verb(name)
        if verb is not None:
            found.passes.append((item.text, verb))
    if not any(verb == "made" for _, verb in found.passes):
        found.passes.insert(0, ("lift", "made"))
    for form, made in stages.items():
        for number, stage in enumerate(made, 1):
            if name in (stage.weights if is_weight else stage.nodes):
                found.places.append(Place(form, number, len(made), stage))
    return found


def _node(program: Program, node: fx.Node) -> Explanation:
    kind = show_type(node.meta["val"], program.dims)
    if node.op == "placeholder":
        return Explanation(node.name, "node", type=kind, notes=["it is an input"])
    read = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    return Explanation(
        node.name,
        "node",
        line=print_node(program, node),
        type=kind,
        nbytes=sum(program.weights.nbytes(name) for name in read) if read else None,
        origins=_origins([node]),
        weights={name: _held(program, name) for name in read},
    )


def _weight(program: Program, node: fx.Node) -> Explanation:
    name, facts = str(node.target), program.facts
    notes = [f"{other} is the same weight" for other, first in facts.tied.items() if first == name]
    if name in facts.parts:
        notes.append(f"it is a part of {facts.parts[name].base}")
    return Explanation(
        name,
        "weight",
        type=_held(program, name),
        nbytes=program.weights.nbytes(name),
        origins=_origins(list(node.users)),
        readers=[print_node(program, user) for user in node.users if user.op == "call_function"],
        notes=notes,
    )


def _held(program: Program, name: str) -> str:
    return show_shape(program.weights.dtype(name), program.weights.shape(name))


def _origins(nodes: Sequence[fx.Node]) -> list[Origin]:
    found = {(node.meta.get("module", ""), node.meta.get("where", "")): None for node in nodes}
    return [Origin(module, where, source_line(where)) for module, where in found if module or where]


def _unknown(name: str, known: Sequence[str]) -> errors.BadInput:
    near = difflib.get_close_matches(name, known, n=_NEAR, cutoff=0.5)
    parts = difflib.get_close_matches(name, {part for other in known for part in other.split(".")}, n=_NEAR, cutoff=0.7)
    near += [other for part in parts for other in known if part in other.split(".")]
    near += [other for other in known if name and name in other]
    near = list(dict.fromkeys(near))[:_NEAR]
    hint = f"; near it are {', '.join(near)}" if near else ""
    return errors.BadInput(argument="node", reason=f"there is no node and no weight '{name}'{hint}")
