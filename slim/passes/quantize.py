"""Quantises the weights of linears, and the rows that enter them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NoReturn

from torch import fx

from slim import errors
from slim.compiler.options import literal
from slim.compiler.passes_base import FLOAT_WEIGHTS, Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report, Skip
from slim.compiler.selection import Choice, chosen_weights, names_like
from slim.passes.rounding.budget import within_budget
from slim.passes.rounding.grid import Format, Grid
from slim.passes.rounding.rescale import move_scales
from slim.passes.rounding.work import Recipe, Work

_GROUPS = {"int4": 32, "int3": 32, "nf4": 64}  # where the user does not say; other formats have one scale a row
_ASYMMETRIC = frozenset({"int4", "int3"})


@dataclass(frozen=True)
class Quantize(Pass):
    """Holds the weights of linears in 8, 4 or 3 bits, and rounds what enters them to int8 where that is asked.

    A weight W [m, n] becomes numbers under W's name and a scale under ``<name>_scale``; what read W reads
    ``slim.dequantize(numbers, scale)`` in W's own type; docs/ir.md has the formats. With ``activations="int8"`` rows
    that enter become ``slim.dequantize(slim.quantize(x, s), s)``, and kernels multiply integers. Weights on disk are
    read, quantised and dropped one at a time; calibration goes through the model a block at a time, each seeing the
    blocks before it quantised.

    Args:
        weights: "int8", "int4", "int3", "nf4" (16 levels of a normal distribution) or "fp8" (E4M3).
        activations: "int8" rounds the rows that enter quantised linears too, one scale a token, found as it runs.
        group_size: numbers of a row that share a scale. None is one scale a row for int8 and fp8, 32 for int4 and int3,
            64 for nf4. A weight whose rows it does not divide is left alone, and the report says so.
        method: "rtn" rounds to nearest; "search" tries many scales a group, "hqq" fits them to the weights; "awq" makes
            columns that see large inputs finer, "gptq" makes later columns answer for the errors of earlier ones,
            "best" does that, makes up for what was rounded before, and then refines numbers and scales by turns: the
            last three from calibration data. None is "rtn" for int8 and fp8, which lose next to nothing; for the others
            "best", or "search" where there are no calibration data. docs/quantize.md has what each loses.
        symmetric: False gives every group a zero point of its own (int4 and int3): half a bit a group, less error.
        static: one scale for all rows of a site, from calibration data, in place of one a token.
        outliers: the share of columns, those with the largest inputs, that stay in the model's own type.
        correction: the rank of a product that is added to each linear to undo most of what rounding did to it.
        budget: bytes that all weights may take: each site gets the format (of int8, int4 and int3, or of ``weights``
            and wider) with which the least is lost in sum.
        formats: exceptions, "PATTERN=FORMAT" or "PATTERN=FORMAT/GROUP": ``["*.down_proj.weight=int8"]``.
        embeddings: quantise embedding tables too, one scale a token.
        head: quantise the head of a language model. A head tied to the embedding takes the embedding with it.
        exclude: patterns of weight names to leave alone (``"*.down_proj.weight"``); each must match one.

    Routers stay as they are: they hold few numbers, and a rounding there chooses another expert.
    Sources: Dettmers et al., LLM.int8(), 2022 (int8, outlier columns) and QLoRA, 2023 (nf4); Frantar et al., GPTQ,
    2022; Lin et al., AWQ, 2023; Badri and Shaji, HQQ, 2023; Zhang et al., QERA, 2024 (correction).

    Example:
        >>> slim.compile(model, passes=[Quantize("int4", group_size=32)], calibration=texts)
    """

    weights: Literal["int8", "int4", "int3", "nf4", "fp8"] = "int8"
    activations: Literal["int8"] | None = None
    group_size: int | None = None
    method: Literal["rtn", "search", "hqq", "awq", "gptq", "best"] | None = None
    symmetric: bool = True
    static: bool = False
    outliers: float = 0.0
    correction: int = 0
    budget: int | None = None
    formats: tuple[str, ...] = ()
    embeddings: bool = False
    head: bool = True
    exclude: tuple[str, ...] = ()

    requires = frozenset({FLOAT_WEIGHTS})
    invalidates = frozenset({FLOAT_WEIGHTS})

    def check(self) -> None:
        """Refuses options that mean nothing, alone or together."""
        if self.symmetric is False and self.weights not in _ASYMMETRIC:
            self._refuse("symmetric", f"{self.weights} has no zero point")
        if self.group_size is not None and self.group_size < 1:
            self._refuse("group_size", f"a group of {self.group_size} holds no number")
        if not 0 <= self.outliers < 0.5:
            self._refuse("outliers", f"it is a share of columns, of 0 to 0.5, not {self.outliers}")
        if self.correction < 0:
            self._refuse("correction", f"a rank of {self.correction} is none")
        if self.activations is not None and self.weights == "fp8":
            raise errors.ContradictoryOptions(
                a='weights="fp8"', b='activations="int8"', reason="integers are multiplied with integers"
            )
        if self.static and self.activations is None:
            raise errors.ContradictoryOptions(
                a="static=True", b="activations=None", reason="rows that are not rounded have no scale"
            )
        if self.budget is not None and self.budget < 1:
            self._refuse("budget", f"nothing fits into {self.budget} bytes")
        for text in self.formats:
            self._exception(text)

    def _refuse(self, option: str, reason: str) -> NoReturn:
        raise errors.BadPassOption(pass_name=self.name, option=option, reason=reason)

    def _grid(self, format: str, group: int | None) -> Grid:
        size = _GROUPS.get(format, 0) if group is None else group
        return Grid(format, size, self.symmetric or format not in _ASYMMETRIC)  # type: ignore[arg-type]

    def _exception(self, text: str) -> tuple[str, Grid]:
        """The pattern and the grid of one of ``formats``."""
        pattern, _, spec = text.rpartition("=")
        format, _, group = spec.partition("/")
        known = Format.__args__  # type: ignore[attr-defined]
        if not pattern or format not in known or not (group == "" or group.isdigit()):
            reason = f'{literal(text)} is not PATTERN=FORMAT or PATTERN=FORMAT/GROUP, such as "*.down_proj.weight=int8"'
            raise errors.BadPassOption(pass_name=self.name, option="formats", reason=reason, known=known)
        return pattern, self._grid(format, int(group) if group else None)

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self, program: Program, ctx: Context) -> Report:
        """Changes weights, and puts dequantize nodes behind them and around what enters."""
        report = Report()
        choice = Choice(self.name, self.embeddings, self.head, self.exclude)
        grids = self._grids(program, choice, report)
        if self.method == "awq":
            report.notes.append(move_scales(program, ctx, grids, repr(self)))
        if self.budget is not None:
            grids = within_budget(program, ctx, report, grids, self.budget, repr(self))
        recipe = Recipe(repr(self), self.method, self.activations, self.static, self.outliers, self.correction)
        Work(program, ctx, report, recipe, grids).run()
        return report

    def _grids(self, program: Program, choice: Choice, report: Report) -> dict[fx.Node, Grid]:
        """The weights to quantise, and how; the others go into the report."""
        special: dict[str, Grid] = {}
        for text in self.formats:
            pattern, grid = self._exception(text)
            special |= dict.fromkeys(names_like(program, pattern, choice, "formats"), grid)
        found = {}
        for node in chosen_weights(program, choice, report):
            name = str(node.target)
            grid = special.get(name, self._grid(self.weights, self.group_size))
            try:
                grid.groups(int(node.meta["val"].shape[-1]))
            except errors.BadInput as error:
                report.skipped.append(Skip(name, f"its {error.reason}"))
                continue
            found[node] = grid
        return found
