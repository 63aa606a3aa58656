"""What each layer of a Program holds and costs, in numbers that can be drawn."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from slim.compiler.cost import node_work, number
from slim.compiler.probe import make_probe
from slim.compiler.program import Program
from slim.compiler.rules import argument
from slim.compiler.uses import ATTENTION, EMBEDDING, EXPERTS, LINEAR, stored_in, weight_nodes
from slim.inspection.hybrid import Hybrid
from slim.runtime.binding import head_of

_NUMBERED = re.compile(r"(?:^|.*?\.)(\d+)(?:\.|$)")
REST = "rest"  # what belongs to no numbered layer: embeddings, the last norm, the head


@dataclass
class Layers:
    """Numbers by layer.

    Attributes:
        names: of the layers in order, "0", "1", ..., and "rest".
        metrics: what is measured, with its unit -> a number a layer; None where a layer has none.
    """

    names: list[str]
    metrics: dict[str, list[float | None]] = field(default_factory=dict)


def layer_of(path: str) -> str:
    """The number of the layer in a path of modules or the name of a weight: the first in it, or "rest"."""
    found = _NUMBERED.match(path)
    return found[1] if found else REST


def names_of(programs: Sequence[Program]) -> list[str]:
    """The layers of any of them, in order."""
    found = {layer_of(name) for program in programs for name in program.weights}
    return [*sorted(found - {REST}, key=int), REST]


def old_layers(first: Program, last: Program) -> dict[str, str]:
    """Where whole blocks are gone the later ones have other numbers: layer of ``last`` -> what it was in ``first``."""
    old = {node.name: layer_of_node(node) for node in first.nodes()}
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for node in last.nodes():
        if node.name in old:
            votes[layer_of_node(node)][old[node.name]] += 1
    return {layer: counts.most_common(1)[0][0] for layer, counts in votes.items()}


def calls(program: Program, tokens: int) -> dict[str, dict[str, int]]:
    """What costs are for, of one row: of a language model reading ``tokens`` tokens, and writing the last of as many.

    What writes nothing is called once, with as many tokens if it takes any.
    """
    whole = {"B": 1, "S": tokens, "T": tokens}
    if program.facts.kind == "causal_lm":
        return {f"to read {tokens} tokens": whole, "to write one": {**whole, "S": 1}}
    return {f"to read {tokens} tokens" if "S" in program.dims.values() else "of a call": whole}


def measure_layers(program: Program, names: Sequence[str], tokens: int) -> Layers:
    """Sizes, and costs of one row: FLOPs of the first of the calls, and bytes moved by the last."""
    layers = Layers(list(names))
    add = _Adder(layers)
    for weight in weight_nodes(program):
        name = str(weight.target)
        add("weights, bytes", layer_of(name), program.weights.nbytes(name))
    made = list(calls(program, tokens).items())
    (reading, prefill), (writing, decode) = made[0], made[-1]
    heads = ", logits of the last" if len(made) > 1 else ""
    for node, flops, _ in generation_work(program, prefill):
        add(f"FLOPs {reading}{heads}", layer_of_node(node), flops)
    for node, _, nbytes in generation_work(program, decode):
        add(f"bytes moved {writing}", layer_of_node(node), nbytes)
    _formats(program, add)
    for node in program.nodes(*ATTENTION):
        layer = layer_of_node(node)
        query, key = (argument(node, name).meta["val"] for name in ("q", "k"))
        add("query heads", layer, int(query.shape[1]))
        add("key and value heads", layer, int(key.shape[1]))
    return layers


def generation_work(program: Program, sizes: dict[str, int]) -> Iterator[tuple[fx.Node, int, int]]:
    """(node, FLOPs, bytes moved) of a call as ``generate`` makes it: the head runs on the last token alone."""
    head = head_of(program) if program.facts.kind == "causal_lm" else None
    for node, work in node_work(program):
        own = {**sizes, "S": 1} if node is head else sizes
        yield node, number(work.flops, own), number(work.nbytes, own)


class _Adder:
    """Sums numbers into metrics."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.place = {name: index for index, name in enumerate(layers.names)}

    def __call__(self, metric: str, layer: str, value: float) -> None:
        values = self.layers.metrics.setdefault(metric, [None] * len(self.place))
        index = self.place.get(layer, len(values) - 1)
        values[index] = (values[index] or 0) + value


def _formats(program: Program, add: _Adder) -> None:
    """Bits a number of what linears and tables read, and the lowest rank of a product of two linears."""
    bits: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    ranks: dict[str, list[int]] = defaultdict(list)
    seen: set[fx.Node] = set()
    for node in program.nodes(LINEAR, EXPERTS, EMBEDDING):
        weight: Any = node.args[0 if node.target is EMBEDDING else 1]
        held = stored_in(weight)
        if weight in seen or not held:
            continue
        seen.add(weight)
        layer = layer_of(str(held[0].target))
        bits[layer] += 8 * sum(program.weights.nbytes(str(part.target)) for part in held)
        numbers[layer] += int(weight.meta["val"].numel())
        if (rank := _rank(node)) is not None:
            ranks[layer].append(rank)
    for layer, count in numbers.items():
        add("bits a number", layer, bits[layer] / count)
    for layer, found in ranks.items():
        add("rank of products, the lowest", layer, min(found))


def _rank(node: fx.Node) -> int | None:
    """How wide the step between two linears is, where one reads the other alone and it is narrower than both ends."""
    inner = node.args[0]
    if not (node.target is LINEAR and isinstance(inner, fx.Node) and inner.target is LINEAR):
        return None
    (m, rank), (_, n) = (linear.args[1].meta["val"].shape[-2:] for linear in (node, inner))  # type: ignore[union-attr]
    return int(rank) if rank < min(m, n) else None


def layer_of_node(node: fx.Node) -> str:
    """The number of the layer that a node was lifted from."""
    return layer_of(str(node.meta.get("module", "")))


def sensitivity(before: Program, after: Program, names: Sequence[str], tokens: int = 0) -> list[float | None]:
    """How far the output of ``before`` moves where one layer alone is as in ``after``; a run of a probe each."""
    hybrid, probe = Hybrid(before, after), make_probe(before, tokens=tokens)
    outputs = probe.run(before)
    held: Mapping[str, set[str]] = defaultdict(set)
    gone = {*map(layer_of_node, before.nodes())} - {*old_layers(before, after).values()}
    for name in hybrid.touched:
        held[_blamed(hybrid.node(0, name), gone)].add(name)
    return [probe.error(outputs, hybrid.run(probe.inputs, held[name])) if name in held else None for name in names]


def _blamed(node: fx.Node, gone: set[str]) -> str:
    """The layer of a node that changed; or the one that is gone, where the node read its result."""
    read = [layer for layer in map(layer_of_node, node.all_input_nodes) if layer in gone]
    return read[0] if read else layer_of_node(node)
