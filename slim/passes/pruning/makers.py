"""The linears that make the neurons of a site, and what lies between them and the linear that reads these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from slim.compiler.dependencies import Kind
from slim.compiler.dependencies.moving import is_pointwise
from slim.compiler.gauss_newton import Layer
from slim.compiler.program import Program
from slim.compiler.rules import argument
from slim.compiler.uses import LINEAR
from slim.passes.pruning.sites import Site


@dataclass(frozen=True)
class Makers:
    """Of one site.

    Attributes:
        source: what all of ``linears`` read. between: what makes the site's value of their results, in order.
    """

    site: Site
    source: fx.Node
    linears: tuple[fx.Node, ...]
    between: tuple[fx.Node, ...]

    def layer(self, program: Program, reader: Tensor, shift: Tensor | None, kept: Tensor) -> Layer:
        """What is to be fitted: all makers, and the reader [m, k] of the neurons ``kept`` with its bias."""
        biases = {weight_of(n): bias for n in self.linears if (bias := argument(n, "bias")) is not None}
        return Layer(
            lambda results: self._run(program, results)[:, kept],
            {weight_of(n): program.weights[weight_of(n)].float() for n in self.linears},
            {name: program.weights[str(bias.target)].float() for name, bias in biases.items()},
            reader,
            shift,
        )

    def written(self, program: Program, layer: Layer) -> dict[str, Tensor]:
        """The weights and biases of the makers as the Program keeps them."""
        found = dict(layer.weights)
        found |= {
            str(argument(n, "bias").target): layer.biases[name]
            for n in self.linears
            if (name := weight_of(n)) in layer.biases
        }
        return {name: value.to(program.weights[name].dtype) for name, value in found.items()}

    def _run(self, program: Program, results: Mapping[str, Tensor]) -> Tensor:
        """[r, n]: the site's value of what the makers return, [r, each]."""
        values: dict[fx.Node, Tensor] = {}
        for node in self.linears:
            rows = results[weight_of(node)]
            values[node] = rows.reshape(*(1,) * (node.meta["val"].dim() - 2), *rows.shape)

        def value(node: fx.Node) -> Tensor:
            return program.weights[str(node.target)] if node.op == "get_attr" else values[node]

        for node in self.between:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        found = values[self.site.value]
        return found.reshape(-1, found.shape[-1]).float()


def weight_of(linear: fx.Node) -> str:
    return str(linear.args[1].target)  # type: ignore[union-attr]


def find_makers(site: Site, after: fx.Node | None) -> Makers | None:
    """The makers of a site of neurons whose linears stand behind the node ``after`` in the graph.

    None where the way from them to the site is not row by row, or where their weights serve others too.
    """
    if site.kind is not Kind.NEURON or site.linear.target is not LINEAR:
        return None
    linears, between, waiting = set[fx.Node](), set[fx.Node](), [site.value]
    while waiting:
        node = waiting.pop()
        if node in linears or node in between or node.op == "get_attr":
            continue
        if node.target is LINEAR:
            linears.add(node)
        elif node.op == "call_function" and _is_by_row(node):
            between.add(node)
            waiting += node.all_input_nodes
        else:
            return None
    sources = {node.args[0] for node in linears}
    order = {node: index for index, node in enumerate(site.linear.graph.nodes)}
    since = -1 if after is None else order[after]
    if len(sources) != 1 or not all(_is_own(node) and order[node] > since for node in linears):
        return None
    (source,) = sources
    assert isinstance(source, fx.Node)
    return Makers(site, source, tuple(sorted(linears)), tuple(sorted(between)))


def _is_by_row(node: fx.Node) -> bool:
    """Whether each number of the result depends on what the node reads at the same place, or in the same row, alone."""
    return is_pointwise(node.target) and all(isinstance(n.meta["val"], Tensor) for n in node.all_input_nodes)


def _is_own(linear: fx.Node) -> bool:
    """Whether its weight and bias are floats as they are stored, which nothing else reads."""
    stored = [n for n in (linear.args[1], argument(linear, "bias")) if n is not None]
    return all(isinstance(n, fx.Node) and n.op == "get_attr" and len(n.users) == 1 for n in stored)
