"""What of a Program is trained: weights whole, or products beside those of large models, and scales by a factor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.report import Skip
from slim.compiler.uses import DEQUANTIZE, Role, stored_in, uses, weight_nodes

_QUANTIZE = torch.ops.slim.quantize.default
_WHOLE = 1 << 26  # numbers of linears and tables that are trained whole; each is held four times, as float32
_RANK = 16  # of the products of larger models
_LEAST = 1e-3  # the size of a weight that is all zeros, as biases begin


class Trained(ABC):
    """A weight on its way; nothing of the Program is touched before ``merged`` is put in its place.

    Attributes:
        name: of the weight.
        weight: as it was.
        parameters: the float32 tensors that are optimised; as they begin, the weight is unchanged.
        is_matrix: whether its one parameter is all of a linear's weight.
        size: the root of the weight's mean square. Changes are counted in it, so that one learning rate is right for
            weights of every size (Shazeer and Stern, Adafactor, 2018, section 8).
    """

    is_matrix = False

    def __init__(self, name: str, weight: Tensor, parameters: Sequence[Tensor]) -> None:
        self.name, self.weight = name, weight
        self.size = max(_LEAST, float(weight.float().square().mean().sqrt()))
        self.parameters = [parameter.requires_grad_() for parameter in parameters]

    @abstractmethod
    def value(self) -> Tensor:
        """The weight as changed so far, in float32, differentiable."""

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight as changed, in its own type."""
        return self.value().to(self.weight.dtype)


class Product(Trained):
    """W [m, n] + size up [m, r] down [r, n]; while it is trained, the product runs beside W."""

    def __init__(self, name: str, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        m, n = weight.shape
        down = torch.randn(rank, n, generator=generator) * rank**-0.5  # a step of up changes W as one of a whole weight
        super().__init__(name, weight, [down.to(weight.device), torch.zeros(m, rank, device=weight.device)])

    def value(self) -> Tensor:
        down, up = self.parameters
        return self.weight.float() + self.size * (up @ down)

    def beside(self, rows: Tensor) -> Tensor:
        """What the product adds to the linear's output."""
        down, up = self.parameters
        return (self.size * ((rows.float() @ down.T) @ up.T)).to(rows.dtype)


class Sum(Trained):
    """A weight and a change of its own shape, in its size."""

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__(name, weight, [torch.zeros(weight.shape, device=weight.device)])

    def value(self) -> Tensor:
        return self.weight.float() + self.size * self.parameters[0]


class Matrix(Sum):
    """A linear's weight [m, n], trained whole."""

    is_matrix = True


class Factor(Trained):
    """A scale and a relative change: however small a scale is, one step is right for all."""

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__(name, weight, [torch.zeros(weight.shape, device=weight.device)])

    def value(self) -> Tensor:
        return self.weight.float() * (1 + self.parameters[0])


def find_trained(program: Program, rank: int | None, seed: int) -> tuple[list[Trained], list[Skip]]:
    """What is trained, in the order of the graph, and the float weights that are left as they are, with the reason.

    Args:
        rank: of the products beside linears' weights; None: weights and tables whole, or 16 where they hold too much.
    """
    rank = rank or _rank_for(program)
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


def _rank_for(program: Program) -> int | None:
    """None where whole weights, their gradients and the optimiser's state are no burden."""
    numbers = sum(node.meta["val"].numel() for node in weight_nodes(program) if _is_read(node, Role.LINEAR, Role.TABLE))
    return None if numbers <= _WHOLE else _RANK


def _is_read(node: fx.Node, *roles: Role) -> bool:
    """Whether a float weight is read in these roles alone."""
    found = {use.role for use in uses(node)}
    return node.meta["val"].dtype.is_floating_point and bool(found) and found <= set(roles)


def _trained(program: Program, node: fx.Node, rank: int | None, generator: torch.Generator) -> Trained | str | None:
    """How a float weight is trained; the reason why not; None for what is no weight of its own."""
    name, shape = str(node.target), tuple(node.meta["val"].shape)
    readers = list(node.users)
    if any(reader.target is _QUANTIZE for reader in readers):
        return None  # a static step of activations
    if any(reader.target is DEQUANTIZE for reader in readers):
        scales = all(reader.args[1] is node and stored_in(reader.args[0]) for reader in readers)
        return Factor(name, program.weights[name]) if scales else None
    roles = {use.role for use in uses(node)}
    if _is_read(node, Role.LINEAR):
        m, n = shape
        weight = program.weights[name]
        if rank is None or rank * (m + n) >= m * n:
            return Matrix(name, weight)
        return Product(name, weight, rank, generator)
    if roles == {Role.OTHER} and len(shape) == 1:
        return Sum(name, program.weights[name])
    if Role.TABLE in roles:
        if rank is None and roles <= {Role.TABLE, Role.LINEAR}:
            return Sum(name, program.weights[name])
        return "a table of embeddings is not trained" + (" (nor the head tied to it)" if Role.LINEAR in roles else "")
    return "experts are not trained" if Role.EXPERTS in roles else "it is neither a linear's weight nor a vector"
