"""Which region computes which node, for people who look from a model into its kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from slim.codegen.regions.describe import line
from slim.codegen.regions.scalars import Op, walk
from slim.codegen.regions.schedule import Foreign, Region, Schedule


@dataclass(frozen=True)
class Kernel:
    """A function of generated code: its name, and the file (of the executable's ``code``) that it is in."""

    name: str
    file: str


@dataclass(frozen=True)
class Stage:
    """One region of an executable, in the order that they run.

    Attributes:
        text: the region in a line.
        nodes: names of the nodes that it computes, those among them that take no work (views) last.
        weights: names of the weights that it reads.
        kernels: what runs it: one for each form that it has; none where PyTorch does.
    """

    text: str
    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    kernels: tuple[Kernel, ...]

    @property
    def form(self) -> str:
        """What kind of region it is: "linear", "attention", "rms", "pointwise", "torch", ..."""
        return self.text.split(maxsplit=1)[0]


def stages(schedule: Schedule, kernels: Callable[[int, Region], Sequence[Kernel]]) -> list[Stage]:
    """The regions of ``schedule``, each with its nodes; a node that is computed in two regions is in both.

    Args:
        kernels: what runs a region, given its number and itself. It is not asked for foreign ones.
    """
    own = [list(dict.fromkeys(_computed(region))) for region in schedule.regions]
    held: dict[str, list[int]] = defaultdict(list)
    for number, nodes in enumerate(own):
        for name in nodes:
            held[name].append(number)
    for name, numbers in _free(schedule, held).items():
        for number in numbers:
            own[number].append(name)
    return [
        Stage(
            line(region),
            tuple(own[number]),
            tuple(dict.fromkeys(buffer.name for buffer in region.reads() if buffer.kind == "weight")),
            () if isinstance(region, Foreign) else tuple(kernels(number, region)),
        )
        for number, region in enumerate(schedule.regions)
    ]


def program_names(node: fx.Node) -> list[str]:
    """As the Program calls it: in a step over a cache a node stands for others, the first above all."""
    return list(node.meta.get("stands_for", [node.name]))


def _computed(region: Region) -> list[str]:
    scalars = [scalar for body in region.bodies() for scalar in walk(body)]
    anchors = [name for node in region.anchors() for name in program_names(node)]
    return anchors + [scalar.node for scalar in scalars if isinstance(scalar, Op) and scalar.node]


def _free(schedule: Schedule, held: dict[str, list[int]]) -> dict[str, list[int]]:
    """Nodes that no region computes by a step of its own: views, rotations, restored weights; by who reads them."""
    found: dict[str, list[int]] = {}
    if not schedule.regions:
        return found
    graph: fx.Graph = schedule.regions[0].node.graph
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and program_names(node)[0] not in held:
            numbers = [n for user in node.users for n in held.get(program_names(user)[0], found.get(user.name, ()))]
            found[node.name] = list(dict.fromkeys(numbers)) or _writers(node, held)
    return found


def _writers(node: fx.Node, held: dict[str, list[int]]) -> list[int]:
    """Of a view that only the output reads: the regions of what it is a view of."""
    for source in node.all_input_nodes:
        numbers = held.get(program_names(source)[0]) or (_writers(source, held) if source.op == "call_function" else [])
        if numbers:
            return numbers
    return []
