"""Where a node or a weight came from, and what became of it: the answer of ``CompiledModel.explain``."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from slim import errors
from slim.codegen.regions.provenance import Stage
from slim.compiler.difference import Gone, origins
from slim.compiler.program import Program
from slim.compiler.report import PipelineReport
from slim.compiler.sources import source_line
from slim.compiler.text import print_node
from slim.compiler.types import show_shape, show_type
from slim.compiler.uses import RESTORING, Role, stored_in, uses, weight_nodes

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
        stage: the region, with the kernels that run it; where there are none, PyTorch's call.
    """

    form: str
    number: int
    of: int
    stage: Stage

    def __str__(self) -> str:
        kernels = ", ".join(f"{kernel.name} in {self.form}/{kernel.file}" for kernel in self.stage.kernels)
        number = f"{'region' if self.stage.kernels else 'step'} {self.number} of {self.of}"
        return f"{self.form}, {number} by {kernels or 'PyTorch'}: {self.stage.text.removeprefix('torch ')}"


@dataclass
class Explanation:
    """What is known of one name; ``print`` it.

    Attributes:
        name, kind: "node" or "weight".
        line: of a node that is in the Program, its line of IR.
        type: "f32[B, S, 64]".
        nbytes: of a weight, and for a node of the weights that it reads.
        origins: lines of the model's source: a node's own, or those of the nodes that read the weight.
        weights: of a node: the weights it reads, with their types, also those that are restored for it.
        readers: of a weight: the nodes that read it, or what is restored of it, and what they do with it.
        passes: (pass, "made", "changed" or "removed"), in order; "lift" made what was there from the start.
        places: where generated code, or PyTorch, runs it.
        notes: tied names, the weight that it is a part of, and for what a pass removed what is there instead. Of that
            all else is as it was before that pass.
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
            yield "bytes", f"{self.nbytes:,}" + " of weights" * (self.kind == "node")
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
        raise errors.BadInput(
            argument="node",
            reason=f"it is a node or the name of one, not {name!r:.40}",
            of="slim.CompiledModel.explain",
        )
    name = next((str(node.target) for node in weight_nodes(program) if node.name == name), name)
    name = program.facts.tied.get(name, name)
    nodes = {node.name: node for node in program.graph.nodes if node.op in ("call_function", "placeholder")}
    weights = {str(node.target): node for node in weight_nodes(program)}
    reports = [] if report is None else report.passes
    if name in weights:
        found = _weight(program, weights[name])
    elif name in nodes:
        found = _node(program, nodes[name])
    elif any(item.changes.weights.verb(name) for item in reports):
        found = _removed(name, "weight", [(item.text, item.gone.weights) for item in reports])
    elif any(item.changes.nodes.verb(name) for item in reports):
        found = _removed(name, "node", [(item.text, item.gone.nodes) for item in reports])
    elif name in program.facts.bases:
        return _fused(program, name)
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
        readers = [print_node(program, user) for user in node.users if user.op == "call_function"]
        return Explanation(node.name, "node", type=kind, readers=readers, notes=["it is an input"])
    read = dict.fromkeys(str(weight.target) for source in node.all_input_nodes for weight in stored_in(source))
    return Explanation(
        node.name,
        "node",
        line=print_node(program, node),
        type=kind,
        nbytes=sum(program.weights.nbytes(name) for name in read) if read else None,
        origins=_known(origins([node])),
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
        origins=_known(origins(node.users)),
        readers=list(_readers(program, node)),
        notes=notes,
    )


def _fused(program: Program, name: str) -> Explanation:
    """A weight of the model that the lift took apart."""
    parts = [part for part, place in program.facts.parts.items() if place.base == name]
    return Explanation(name, "weight", notes=[f"the lift took it apart, into {', '.join(parts)}"])


# What a weight is to a node that reads it, where the operation leaves no doubt.
_ROLES = {
    Role.LINEAR: "multiplies by it",
    Role.EXPERTS: "multiplies each row by one of its matrices",
    Role.TABLE: "looks up rows of it",
}


def _readers(program: Program, weight: fx.Node) -> Iterator[str]:
    """The lines of what restores ``weight``, and then of those that read it, with its part in them."""
    restoring = [weight]
    for value in restoring:
        for user in value.users:
            if user.target in RESTORING:
                restoring.append(user)
                yield print_node(program, user)
    for use in uses(weight):
        if use.node.op == "call_function":
            part = _ROLES.get(use.role) if _is_numbers(weight, use.node) else None
            yield print_node(program, use.node) + (f"  # {part}" if part else "")


def _is_numbers(weight: fx.Node, reader: fx.Node) -> bool:
    """Whether ``weight`` holds the numbers that ``reader`` works with, and not their scales."""
    return any(stored_in(source)[:1] == [weight] for source in reader.all_input_nodes)


def _removed(name: str, kind: str, reports: Sequence[tuple[str, Mapping[str, Gone]]]) -> Explanation:
    """What was known of ``name`` when a pass last removed it: its text, and what each pass removed."""
    text, was = next(((text, gone[name]) for text, gone in reversed(reports) if name in gone), ("", None))
    if was is None:  # of an artifact that was saved before reports told it
        return Explanation(name, kind)
    notes = [f"it is not in the program any more; type and source are those before {text}"]
    if was.heirs:
        notes.append(f"where it was read there are now {', '.join(was.heirs)}")
    return Explanation(
        name, kind, line=was.line, type=was.type, nbytes=was.nbytes, origins=_known(was.origins), notes=notes
    )


def _held(program: Program, name: str) -> str:
    return show_shape(program.weights.dtype(name), program.weights.shape(name))


def _known(places: Sequence[tuple[str, str]]) -> list[Origin]:
    return [Origin(module, where, source_line(where)) for module, where in places]


def _unknown(name: str, known: Sequence[str]) -> errors.BadInput:
    within = [other for other in known if other.startswith(f"{name}.")]
    if within:
        more = f" and {len(within) - _NEAR} more" if len(within) > _NEAR else ""
        reason = f"'{name}' is no node and no weight; in it are {', '.join(within[:_NEAR])}{more}"
        return errors.BadInput(argument="node", reason=reason, of="slim.CompiledModel.explain")
    near = difflib.get_close_matches(name, known, n=_NEAR, cutoff=0.5)
    parts = difflib.get_close_matches(name, {part for other in known for part in other.split(".")}, n=_NEAR, cutoff=0.7)
    near += [other for part in parts for other in known if part in other.split(".")]
    near += [other for other in known if name and name in other]
    near = list(dict.fromkeys(near))[:_NEAR]
    hint = f"; near it are {', '.join(near)}" if near else ""
    return errors.BadInput(
        argument="node", reason=f"there is no node and no weight '{name}'{hint}", of="slim.CompiledModel.explain"
    )
