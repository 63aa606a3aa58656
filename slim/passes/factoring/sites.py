"""Which linears are factored, and what each is on its way: its rank, what it was to lose, what it lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.report import Report, Skip
from slim.compiler.uses import Role, uses
from slim.compiler.weights import Deferred
from slim.passes.factoring.directions import Importance
from slim.passes.factoring.forms import Storage, numbers
from slim.passes.rounding.select import Choice, chosen_weights

_FEW = 2  # ranks to choose from, at least

# The side of a matrix from which on its rank is a multiple, and of what: kernels and groups of quantised numbers.
_MULTIPLES = ((256, 32), (128, 16), (32, 8), (0, 4))


@dataclass(eq=False)
class Site:
    """A linear to factor.

    Attributes:
        name: of its weight. weight: the weight as it was, [m, n]. bias: the name of its bias, if it has one.
        rank: what it keeps; None leaves it whole.
        importance: of errors of its results.
        predicted, measured: the share of the results' energy that is lost: by the directions left out, and in the end,
            on what its input had become by then, against the original. Both in the measure of ``importance``.
    """

    name: str
    linear: fx.Node
    weight: Tensor | Deferred
    bias: str | None
    importance: Importance
    rank: int | None = None
    predicted: float | None = None
    measured: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.weight.shape
        return m, n

    @property
    def size(self) -> int:
        m, n = self.shape
        return m * n

    @property
    def rows(self) -> fx.Node:
        """What enters."""
        value = self.linear.args[0]
        assert isinstance(value, fx.Node)
        return value

    def load(self) -> Tensor:
        """The weight as it was, float64."""
        value = self.weight if isinstance(self.weight, Tensor) else self.weight.load()
        return value.double()

    def cost(self, storage: Storage, rank: int | None) -> int:
        """Numbers that it holds with a rank; whole, for None."""
        return self.size if rank is None else numbers(storage, rank, *self.shape, self.weight.dtype.itemsize)

    def ranks(self, storage: Storage, multiple: int, least: int, saving: int) -> list[int]:
        """The ranks that may be chosen: multiples that save something, from ``least`` numbers on.

        Args:
            saving: bytes that a factored form must save.
        """
        most = self.size - saving / self.weight.dtype.itemsize
        every = range(multiple, min(self.shape), multiple)
        fitting = [rank for rank in every if self.cost(storage, rank) < min(most, self.size)]
        enough = [rank for rank in fitting if self.cost(storage, rank) >= least]
        return enough or fitting[-1:]

    def __str__(self) -> str:
        kept = f"{self.name}: rank {self.rank} of {min(self.shape)}"
        if self.predicted is None:
            return kept
        measured = "" if self.measured is None else f"; measured: {self.measured:.2%}"
        return f"{kept}; predicted: {self.predicted:.2%} of its results is lost{measured}"


def multiple_for(m: int, n: int) -> int:
    """What ranks of a matrix [m, n] are rounded to, where the user does not say."""
    return next(multiple for side, multiple in _MULTIPLES if min(m, n) >= side)


def find_sites(program: Program, choice: Choice, report: Report, least: int | None) -> Iterator[Site]:
    """The linears to factor; the others go into ``report`` with the reason.

    Args:
        least: what ranks are multiples of; None is ``multiple_for``.

    Raises:
        BadPassOption: a pattern that matches no weight. ContradictoryOptions: a tied head wanted and not wanted.
    """
    for node in chosen_weights(program, choice, report):
        name = str(node.target)
        reason = _refused(node, least)
        if reason is not None:
            report.skipped.append(Skip(name, reason))
            continue
        (linear,) = node.users
        bias = program.weight_of(linear.args[2]) if len(linear.args) > 2 else None
        yield Site(name, linear, program.weights.raw(name), bias, Importance())


def _refused(node: fx.Node, multiple: int | None) -> str | None:
    """Why the linears of a weight stay as they are; None where they do not."""
    found = uses(node)
    if any(use.role is Role.EXPERTS for use in found):
        return "its experts are chosen a token, and factors of experts have no kernel"
    if any(use.role is Role.TABLE for use in found):
        return "it is looked up as a table too"
    if len(found) > 1:
        return f"{len(found)} linears share it"
    linear = found[0].node
    if len(linear.args) > 2 and isinstance(linear.args[2], fx.Node) and linear.args[2].op != "get_attr":
        return "its bias is computed"
    m, n = node.meta["val"].shape
    step = multiple or multiple_for(m, n)
    if min(m, n) < _FEW * step:
        return f"a matrix of {m} x {n} has no rank to choose from (multiples of {step})"
    return None
