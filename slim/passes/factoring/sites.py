"""Which linears are factored, alone or together, and what each is on its way: its rank, and what it loses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.report import Report, Skip
from slim.compiler.selection import Choice, chosen_weights
from slim.compiler.uses import Role, uses
from slim.compiler.weights import Deferred
from slim.passes.factoring.directions import Importance
from slim.passes.factoring.forms import Storage, numbers

_FEW = 2  # ranks to choose from, at least

# The side of a matrix from which on its rank is a multiple, and of what: kernels and groups of quantised numbers.
_MULTIPLES = ((256, 32), (128, 8), (0, 4))


@dataclass(eq=False)
class Linear:
    """A linear to factor.

    Attributes:
        name: of its weight. weight: the weight as it was, [m, n]. bias: the name of its bias, if it has one.
        importance: of errors of its results.
    """

    name: str
    node: fx.Node
    weight: Tensor | Deferred
    bias: str | None
    importance: Importance = field(default_factory=Importance)

    @property
    def rows(self) -> fx.Node:
        """What enters."""
        value = self.node.args[0]
        assert isinstance(value, fx.Node)
        return value

    @property
    def results(self) -> int:
        """How many numbers it puts out: m."""
        return int(self.weight.shape[0])


@dataclass(eq=False)
class Site:
    """What becomes one matrix of lower rank: a linear, or several that read the same rows, one below the other.

    Attributes:
        linears: all with a bias, or none.
        rank: what it keeps; None leaves it whole.
        predicted, measured: the share of the results' energy that is lost: by the directions left out, and in the end,
            on what its input had become by then, against the original. Both in the measure of ``importance``.
        lost: what every rank from 0 on was predicted to lose, in the same measure.
    """

    linears: tuple[Linear, ...]
    rank: int | None = None
    predicted: float | None = None
    measured: float | None = None
    lost: Tensor | None = None

    @property
    def name(self) -> str:
        """What the names of its new weights begin with."""
        return self.linears[0].name + "_joint" * (len(self.linears) > 1)

    @property
    def rows(self) -> fx.Node:
        return self.linears[0].rows

    @property
    def importance(self) -> Importance:
        return Importance(tuple(moments for linear in self.linears for moments in linear.importance.moments))

    @property
    def has_bias(self) -> bool:
        return self.linears[0].bias is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.linears[0].weight.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return sum(linear.results for linear in self.linears), int(self.linears[0].weight.shape[1])

    @property
    def size(self) -> int:
        m, n = self.shape
        return m * n

    def load(self) -> Tensor:
        """The weight as it was, [m, n], float64."""
        held = [linear.weight for linear in self.linears]
        return torch.cat([(value if isinstance(value, Tensor) else value.load()).double() for value in held])

    def load_bias(self, program: Program) -> Tensor | None:
        """The bias, [m], float64."""
        if not self.has_bias:
            return None
        return torch.cat([program.weights[str(linear.bias)].double() for linear in self.linears])

    def cost(self, storage: Storage, rank: int | None) -> int:
        """Numbers that it holds with a rank; whole, for None."""
        return self.size if rank is None else numbers(storage, rank, *self.shape, self.dtype.itemsize)

    def __str__(self) -> str:
        names = ", ".join(linear.name for linear in self.linears)
        kept = f"{names}: rank {self.rank} of {min(self.shape)}"
        if self.predicted is None:
            return kept
        measured = "" if self.measured is None else f"; measured: {self.measured:.2%}"
        return f"{kept}; predicted: {self.predicted:.2%} of the results' energy is lost{measured}"


@dataclass(eq=False)
class Table(Site):
    """A table to factor; as a site it is W = E^T [n, V], whose results are rows.

    Attributes:
        lookups: the nodes that pick rows. heads: the linears that multiply with the table.
        often: [V], how much an error of each row counts; ``importance`` says by which directions.
    """

    lookups: tuple[fx.Node, ...] = ()
    heads: tuple[fx.Node, ...] = ()
    often: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def shape(self) -> tuple[int, int]:
        rows, n = self.linears[0].weight.shape
        return int(n), int(rows)

    @property
    def importance(self) -> Importance:
        return self.linears[0].importance

    def load(self) -> Tensor:
        return super().load().T

    def cost(self, storage: Storage, rank: int | None) -> int:
        """Rows of r numbers, what widens them, and what narrows the rows of a head; ``storage`` is for linears."""
        n, rows = self.shape
        return self.size if rank is None else rank * (rows + n * (1 + bool(self.heads)))


def multiple_for(m: int, n: int) -> int:
    """What ranks of a matrix [m, n] are rounded to, where the user does not say."""
    return next(multiple for side, multiple in _MULTIPLES if min(m, n) >= side)


def by_rows(linears: Sequence[Linear]) -> list[list[Linear]]:
    """Those that may become one matrix: they read the same rows, in one type, and all or none have a bias."""
    found: dict[tuple[fx.Node, bool, torch.dtype], list[Linear]] = {}
    for linear in linears:
        found.setdefault((linear.rows, linear.bias is None, linear.weight.dtype), []).append(linear)
    return list(found.values())


def find_sites(program: Program, choice: Choice, report: Report, multiple: int | None) -> Iterator[Site]:
    """The linears and tables to factor, each alone; the others go into ``report`` with the reason.

    Args:
        multiple: what ranks are multiples of; None is ``multiple_for``.

    Raises:
        BadPassOption: a pattern that matches no weight. ContradictoryOptions: a tied head wanted and not wanted.
    """
    for node in chosen_weights(program, choice, report):
        name = str(node.target)
        reason = _refused(node, multiple)
        if reason is not None:
            report.skipped.append(Skip(name, reason))
            continue
        first, weight = next(iter(node.users)), program.weights.raw(name)
        lookups, heads = (
            tuple(use.node for use in uses(node) if use.role is role) for role in (Role.TABLE, Role.LINEAR)
        )
        if lookups:
            yield Table((Linear(name, first, weight, None),), lookups=lookups, heads=heads)
        else:
            bias = program.weight_of(first.args[2]) if len(first.args) > 2 else None
            yield Site((Linear(name, first, weight, bias),))


def _refused(node: fx.Node, multiple: int | None) -> str | None:
    """Why the linears of a weight stay as they are; None where they do not."""
    found = uses(node)
    if any(use.role is Role.EXPERTS for use in found):
        return "its experts are chosen a token, and factors of experts have no kernel"
    linear = found[0].node
    if any(use.role is Role.TABLE for use in found):
        return _no_rank(node, multiple)
    if len(found) > 1:
        return f"{len(found)} linears share it"
    if len(linear.args) > 2 and isinstance(linear.args[2], fx.Node) and linear.args[2].op != "get_attr":
        return "its bias is computed"
    return _no_rank(node, multiple)


def _no_rank(node: fx.Node, multiple: int | None) -> str | None:
    m, n = node.meta["val"].shape
    step = multiple or multiple_for(m, n)
    if min(m, n) < _FEW * step:
        return f"a matrix of {m} x {n} has no rank to choose from (multiples of {step})"
    return None
