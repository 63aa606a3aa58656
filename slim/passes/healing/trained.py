"""What of a Program is trained: products beside weights, small weights whole, and scales by a factor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.report import Skip
from slim.compiler.uses import DEQUANTIZE, Role, stored_in, uses, weight_nodes

_QUANTIZE = torch.ops.slim.quantize.default


class Trained(ABC):
    """A weight on its way; nothing of the Program is touched before ``merged`` is put in its place.

    Attributes:
        name: of the weight.
        weight: as it was.
        parameters: the float32 tensors that are optimised; as they begin, the weight is unchanged.
    """

    def __init__(self, name: str, weight: Tensor, parameters: Sequence[Tensor]) -> None:
        self.name, self.weight = name, weight
        self.parameters = [parameter.requires_grad_() for parameter in parameters]

    @abstractmethod
    def value(self) -> Tensor:
        """The weight as changed so far, in float32, differentiable."""

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight as changed, in its own type."""
        return self.value().to(self.weight.dtype)


class Product(Trained):
    """W [m, n] + up [m, r] down [r, n]; while it is trained, the product runs beside W."""

    def __init__(self, name: str, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        m, n = weight.shape
        down = torch.randn(rank, n, generator=generator) * n**-0.5
        super().__init__(name, weight, [down.to(weight.device), torch.zeros(m, rank, device=weight.device)])

    def value(self) -> Tensor:
        down, up = self.parameters
        return self.weight.float() + up @ down

    def beside(self, rows: Tensor) -> Tensor:
        """What the product adds to the linear's output."""
        down, up = self.parameters
        return ((rows.float() @ down.T) @ up.T).to(rows.dtype)


class Sum(Trained):
    """A weight and a change of its own size."""

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__(name, weight, [torch.zeros(weight.shape, device=weight.device)])

    def value(self) -> Tensor:
        return self.weight.float() + self.parameters[0]


class Factor(Trained):
    """A scale and a relative change: however small a scale is, one step is right for all."""

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__(name, weight, [torch.zeros(weight.shape, device=weight.device)])

    def value(self) -> Tensor:
        return self.weight.float() * (1 + self.parameters[0])


def find_trained(program: Program, rank: int, seed: int) -> tuple[list[Trained], list[Skip]]:
    """What is trained, in the order of the graph, and the float weights that are left as they are, with the reason."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Trained] = []
    skipped: list[Skip] = []
    for node in weight_nodes(program):
        name = str(node.target)
        if name in program.facts.constants or not node.meta["val"].dtype.is_floating_point:
            continue
        made = _trained(program, node, rank, generator)
        if isinstance(made, str):
            skipped.append(Skip(name, made))
        elif made is not None:
            found.append(made)
    return found, skipped


def _trained(program: Program, node: fx.Node, rank: int, generator: torch.Generator) -> Trained | str | None:
    """How a float weight is trained; the reason why not; None for what is no weight of its own."""
    name, shape = str(node.target), tuple(node.meta["val"].shape)
    readers = list(node.users)
    if any(reader.target is _QUANTIZE for reader in readers):
        return None  # a static step of activations
    if any(reader.target is DEQUANTIZE for reader in readers):
        scales = all(reader.args[1] is node and stored_in(reader.args[0]) for reader in readers)
        return Factor(name, program.weights[name]) if scales else None
    roles = {use.role for use in uses(node)}
    if roles == {Role.LINEAR}:
        m, n = shape
        small = rank * (m + n) >= m * n
        weight = program.weights[name]
        return Sum(name, weight) if small else Product(name, weight, rank, generator)
    if roles == {Role.OTHER} and len(shape) == 1:
        return Sum(name, program.weights[name])
    if Role.TABLE in roles:
        return "a table of embeddings is not trained" + (" (nor the head tied to it)" if Role.LINEAR in roles else "")
    return "experts are not trained" if Role.EXPERTS in roles else "it is neither a linear's weight nor a vector"
