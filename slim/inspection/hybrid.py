"""One Program out of two: here and there what a pass made of it, elsewhere what it was before.

The Program before a pass and the one after it name their nodes alike. A node that both have, with the same type, is a
joint: its value may come from either, whatever its neighbours do. What only one of them has belongs to the joint that
reads it. So the sites of a pass can be taken in one by one, without a word from the pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from slim.compiler.difference import changes
from slim.compiler.program import Program
from slim.compiler.text import print_node
from slim.compiler.types import show_type

BEFORE, AFTER = 0, 1
_OUTPUT = "output"

Place = tuple[int, fx.Node]  # a side, and a node of its graph


class Hybrid:
    """Two Programs, and which of their nodes can be exchanged.

    Attributes:
        joints: names of the nodes that both have with one type, in order.
        touched: those among them that the pass changed, or that read what it changed; the output where that differs.
    """

    def __init__(self, before: Program, after: Program) -> None:
        self.programs = (before, after)
        self._nodes = tuple({node.name: node for node in program.graph.nodes} for program in self.programs)
        self._constant = tuple(_constants(program) for program in self.programs)
        self.joints = [node.name for node in before.graph.nodes if node.op == "call_function" and self._fits(node.name)]
        self._joint = set(self.joints)
        self._weights = set(changes(before, after).weights.changed)
        self.touched = [name for name in self.joints if self._is_touched(name)]
        if self._names(_OUTPUT, BEFORE) != self._names(_OUTPUT, AFTER):
            self.touched.append(_OUTPUT)
        self._modules = {node.name: node.meta.get("module") for node in before.graph.nodes}

    def _fits(self, name: str) -> bool:
        """Whether both sides compute ``name``, neither from weights alone, with one type."""
        if any(name not in nodes for nodes in self._nodes):
            return False
        if any(nodes[name] in constant for nodes, constant in zip(self._nodes, self._constant, strict=True)):
            return False
        a, b = (
            show_type(nodes[name].meta["val"], program.dims)
            for nodes, program in zip(self._nodes, self.programs, strict=True)
        )
        return a == b

    def _is_touched(self, name: str) -> bool:
        a, b = (print_node(self.programs[side], self._nodes[side][name]) for side in (BEFORE, AFTER))
        return a != b or any(self._reads_changes(side, self._nodes[side][name]) for side in (BEFORE, AFTER))

    def _reads_changes(self, side: int, node: fx.Node) -> bool:
        return any(
            str(source.target) in self._weights if source.op == "get_attr" else source.name not in self._joint
            for source in node.all_input_nodes
            if source.op != "placeholder"
        )

    def _names(self, name: str, side: int) -> list[str]:
        return [source.name for source in self._nodes[side][name].all_input_nodes]

    # -- who belongs together ------------------------------------------------------------------------------------------

    def readers(self, name: str) -> set[str]:
        """The touched joints of a node, weight or module: itself, or the nearest behind it on either side."""
        if name in self.touched:
            return {name}
        found = {joint for joint in self.touched if self._modules.get(joint) == name}  # a site named by its module
        for side in (BEFORE, AFTER):
            starts = [
                n for n in self._nodes[side].values() if name == (str(n.target) if n.op == "get_attr" else n.name)
            ]
            waiting, seen = list(starts), set(starts)
            while waiting:
                for user in waiting.pop().users:
                    if user.name in self.touched:
                        found.add(user.name)
                    elif user not in seen and user.name not in self._joint:
                        seen.add(user)
                        waiting.append(user)
        return found

    def neighbours(self, name: str) -> Iterator[str]:
        """The touched joints that touch this one: one reads the other, or what is computed of it on one side alone."""
        touched = set(self.touched)
        for side in (BEFORE, AFTER):
            node = self._nodes[side][name]
            waiting, seen = [*node.all_input_nodes, *node.users], {node}
            while waiting:
                other = waiting.pop()
                if other in seen or other in self._constant[side] or other.op in ("placeholder", "get_attr"):
                    continue
                seen.add(other)
                if other.name in touched:
                    yield other.name
                elif other.name not in self._joint and other.op != "output":
                    waiting += [*other.all_input_nodes, *other.users]

    def origins(self, name: str) -> list[str]:
        """What makes a joint one that is touched, by name.

        New nodes and changed weights that it reads, directly or through nodes that are no joints, and itself where
        it does something else than before; where there is none of these, the nodes before it that are gone.
        """
        made, gone = (self._sources(name, side) for side in (AFTER, BEFORE))
        found = [_called(node) for node in made if self._is_new(node)]
        return found + [name] * self.does_another_thing(name) or [_called(node) for node in gone] or [name]

    def does_another_thing(self, name: str) -> bool:
        """Whether a joint has another operation, or other numbers for it, whatever it reads."""
        a, b = (self._nodes[side][name] for side in (BEFORE, AFTER))
        return (a.target, *map(_without_nodes, (a.args, a.kwargs))) != (
            b.target, *map(_without_nodes, (b.args, b.kwargs)),
        )  # fmt: skip

    def inserted(self, name: str) -> list[str]:
        """The nodes that only the Program after has and that a joint reads; not those made of weights alone."""
        return [
            node.name
            for node in self._sources(name, AFTER)
            if node.op == "call_function" and node.name not in self._nodes[BEFORE] and node not in self._constant[AFTER]
        ]

    def _is_new(self, node: fx.Node) -> bool:
        changed = str(node.target) in self._weights if node.op == "get_attr" else False
        return changed or node.name not in self._nodes[BEFORE]

    def _sources(self, name: str, side: int) -> list[fx.Node]:
        """What a joint reads that only this side has: weights too, in the order of the graph."""
        waiting, seen = list(self._nodes[side][name].all_input_nodes), set[fx.Node]()
        while waiting:
            node = waiting.pop()
            if node in seen or node.name in self._joint or node.op == "placeholder":
                continue
            seen.add(node)
            waiting += node.all_input_nodes
        return [node for node in self.programs[side].graph.nodes if node in seen]

    # -- running -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, inputs: Sequence[Any], chosen: Collection[str]) -> tuple[Any, ...]:
        """The flat outputs where the touched joints ``chosen`` are those of the Program after, all else before."""
        return _Run(self, inputs, frozenset(chosen)).outputs()

    def place(self, side: int, node: fx.Node, chosen: Collection[str]) -> Place:
        """Where the value of ``node``, read by something on ``side``, is computed."""
        if node.name not in self._joint:
            return side, node
        side = AFTER if node.name in chosen else BEFORE
        return side, self._nodes[side][node.name]

    def node(self, side: int, name: str) -> fx.Node:
        return self._nodes[side][name]

    def is_constant(self, place: Place) -> bool:
        """Whether it is made of weights alone: computed anew at each use, since all of them may not fit into memory."""
        return place[1] in self._constant[place[0]]


class _Run:
    """The values of one evaluation."""

    def __init__(self, hybrid: Hybrid, inputs: Sequence[Any], chosen: frozenset[str]) -> None:
        self.hybrid = hybrid
        self.chosen = chosen
        names = (item.name for item in hybrid.programs[BEFORE].inputs)
        self.inputs: Mapping[str, Any] = dict(zip(names, inputs, strict=True))
        self.values: dict[Place, Any] = {}

    def outputs(self) -> tuple[Any, ...]:
        hybrid = self.hybrid
        for name in hybrid.joints:  # in order, so that no chain of calls gets deep
            self.value(BEFORE, hybrid.node(BEFORE, name))
        side = AFTER if _OUTPUT in self.chosen else BEFORE
        results = hybrid.node(side, _OUTPUT).args[0]
        flat = results if isinstance(results, (tuple, list)) else (results,)
        return tuple(self.value(side, item) if isinstance(item, fx.Node) else item for item in flat)

    def value(self, side: int, node: fx.Node) -> Any:
        place = self.hybrid.place(side, node, self.chosen)
        if place in self.values:
            return self.values[place]
        value = self._computed(*place)
        if not self.hybrid.is_constant(place):
            self.values[place] = value
        return value

    def _computed(self, side: int, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.inputs[str(node.target)]
        if node.op == "get_attr":
            return self.hybrid.programs[side].weights[str(node.target)]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: self.value(side, source))
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _without_nodes(value: Any) -> Any:
    return fx.map_arg(value, lambda node: None)


def _called(node: fx.Node) -> str:
    """As reports name it: a weight by its own name."""
    return str(node.target) if node.op == "get_attr" else node.name


def _constants(program: Program) -> set[fx.Node]:
    """Weights, and what is computed of weights alone."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and sources and all(s in found for s in sources)):
            found.add(node)
    return found
