"""A head that shares the table of embeddings, and goes on sharing it in a narrower residual stream.

Logits are E diag(g) n(x), with the last norm n, its gain g, and the table E that begins the stream. In another basis P,
E becomes E P and what stands between it and n becomes P^T diag(g) P: a symmetric matrix. So does the one that fits best
if fewer channels stay. A symmetric matrix is diagonal in the basis of its eigenvectors, and norms do not know one
orthonormal basis from another: turned once more, it is a gain again, and the table serves both ends as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.residual import Stream, turn
from slim.compiler.rows import leaves_rows_whole
from slim.compiler.rules import argument
from slim.compiler.statistics.paired import DAMPING, Paired
from slim.compiler.uses import EMBEDDING, LINEAR
from slim.passes.pruning.directions import Seen

slim = torch.ops.slim

_ROWS = 8192  # of a table that are multiplied at once
_FLOOR = 1e-6  # of the mean diagonal of E^T E


@dataclass
class Tie:
    """A tied head, and the matrix between it and its norm, which holds the norm's gain while the stream is narrowed.

    Attributes:
        square: the linear [width, width]. gain: the weight that it becomes again. kwargs: of the norm that has it.
        dtype: of the gain.
    """

    norm: fx.Node
    gain: str
    kwargs: dict[str, object]
    square: fx.Node
    dtype: torch.dtype

    @property
    def weight(self) -> str:
        """The name of the matrix."""
        return str(self.square.args[1].target)  # type: ignore[union-attr]


# -- between norm and head ---------------------------------------------------------------------------------------------


def part(program: Program) -> Tie | None:
    """Puts the unit matrix between a tied head and its norm, whose gain can then be folded into it.

    None where no head is tied, or where something else than a root mean square norm with a gain stands before it: a
    LayerNorm takes a mean out, which no basis but its own knows.
    """
    head = _tied_head(program)
    norm = None if head is None else _norm_of(head)
    gain = None if norm is None else argument(norm, "weight")
    if head is None or norm is None or gain is None or gain.op != "get_attr" or len(gain.users) > 1:
        return None
    table, width = str(head.args[1].target), int(norm.meta["val"].shape[-1])  # type: ignore[union-attr]
    name = f"{gain.target}.square"
    program.weights[name] = torch.eye(width, dtype=program.weights.dtype(table))
    square = program.insert(head, LINEAR, head.args[0], program.weight_node(name), like=head)
    head.replace_input_with(head.args[0], square)  # type: ignore[arg-type]
    return Tie(norm, str(gain.target), dict(norm.kwargs), square, program.weights.dtype(str(gain.target)))


def join(program: Program, stream: Stream, tie: Tie) -> None:
    """Turns the stream so that the matrix is diagonal, and makes it the norm's gain."""
    square = program.weights[tie.weight].double()
    found = torch.linalg.eigh((square + square.T) / 2)
    turn(program, stream, found.eigenvectors.T, found.eigenvectors)
    stream.readers.remove(tie.square)
    stream.squares.remove(tie.square)
    tie.square.replace_all_uses_with(tie.square.args[0])  # type: ignore[arg-type]
    offset = float(tie.kwargs.get("offset", 0.0))  # type: ignore[arg-type]
    program.weights[tie.gain] = (found.eigenvalues - offset).to(tie.dtype)
    tie.norm.args, tie.norm.kwargs = (tie.norm.args[0], program.weight_node(tie.gain)), tie.kwargs  # type: ignore[assignment]
    program.facts.retired.pop(tie.gain, None)
    program.clean()
    program.infer()


def _tied_head(program: Program) -> fx.Node | None:
    """The one linear whose matrix is a table."""
    tables = {table.args[0] for table in program.nodes(EMBEDDING)}
    heads = [node for node in program.nodes(LINEAR) if node.args[1] in tables]
    return heads[0] if len(heads) == 1 else None


def _norm_of(head: fx.Node) -> fx.Node | None:
    """The norm whose rows a head reads, and nothing else does."""
    user, value = head, head.args[0]
    while isinstance(value, fx.Node) and list(value.users) == [user]:
        if value.target is slim.rms_norm.default:
            return value
        if not value.all_input_nodes or not leaves_rows_whole(value.all_input_nodes[0], value):
            return None
        user, value = value, value.all_input_nodes[0]
    return None


# -- what fits best ----------------------------------------------------------------------------------------------------


def metric(table: Tensor) -> Tensor:
    """float64 [width, width]: E^T E, by which the head sees what it reads."""
    width = table.shape[-1]
    total = torch.zeros(width, width, dtype=torch.float64)
    for rows in table.split(_ROWS):
        wide = rows.double()
        total += wide.T @ wide
    return total + _FLOOR * total.diagonal().mean() * torch.eye(width).double()


def seen(square: Tensor, table: Tensor, moments: Tensor) -> list[Seen]:
    """What the head needs of both ends: of what it reads, and of the table itself.

    Of h = G x the head makes E h. Where of E only E P is left, what can best be made of that is the projection of h
    onto P in the metric E^T E: the form is that of readers, with the moments of h and the metric in each other's place.
    """
    form, wide = metric(table), square.double()
    root = torch.linalg.cholesky(form).T
    made = wide @ moments.double() @ wide.T
    eye = _FLOOR * made.diagonal().mean() * torch.eye(len(made)).double()
    return [Seen.of(moments, [root @ wide]), Seen.of(form, [torch.linalg.cholesky(made + eye).T])]


def fit(old: Tensor, table: Tensor, paired: Paired, kept: int) -> tuple[Tensor, float]:
    """The symmetric G' [kept, kept] for which E_kept G' x is nearest to E G x_dense, and the share of that it misses.

    Least squares: with M = E_kept^T E_kept, C = E[x x^T] and B = E_kept^T E G E[x_dense x^T],
    M G' C + C G' M = B + B^T, which is diagonal in the common basis of M and C.

    Args:
        old: G, [width, width], symmetric. table: E, [entries, width]. paired: of all channels; the first ``kept`` stay.
    """
    wide, form = old.double(), metric(table)
    left = paired.only(torch.arange(kept))
    inner, start = form[:kept, :kept], wide[:kept, :kept]
    damping = DAMPING * left.gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    moments = left.gram + damping * torch.eye(kept).double()
    aim = form[:kept] @ wide @ left.cross
    new = _symmetric(inner, moments, aim + damping * inner @ start)
    energy = float((wide.T @ form @ wide * left.dense).sum())
    lost = energy - 2 * float((new * aim).sum()) + float((new @ inner @ new * left.gram).sum())
    return new, max(lost, 0.0) / energy if energy > 0.0 else 0.0


def _symmetric(left: Tensor, right: Tensor, aim: Tensor) -> Tensor:
    """The symmetric X with left X right + right X left = aim + aim^T; ``left`` and ``right`` are positive definite."""
    root = torch.linalg.cholesky(left)
    turned = _between(root, right)
    values, vectors = torch.linalg.eigh((turned + turned.T) / 2)
    wanted = vectors.T @ _between(root, aim + aim.T) @ vectors
    found = vectors @ (wanted / (values[:, None] + values)) @ vectors.T
    inverse = torch.linalg.solve_triangular(root, torch.eye(len(root)).double(), upper=False)
    return inverse.T @ found @ inverse


def _between(root: Tensor, value: Tensor) -> Tensor:
    """L^-1 V L^-T."""
    half = torch.linalg.solve_triangular(root, value, upper=False)
    return torch.linalg.solve_triangular(root, half.T, upper=False).T
