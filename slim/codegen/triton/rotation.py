"""Rotary position embedding inside a kernel: text that turns a tile [rows, channels] by its rows' angles."""

from __future__ import annotations

from collections.abc import Sequence

from slim.codegen.regions.views import View
from slim.codegen.triton.attention_parts import TYPES, across, address, masked
from slim.codegen.triton.writer import Writer


class Turn:
    """Loads tiles whose channels are the variable ``d``, and turns them.

    Channel p is turned together with p + R/2, or 2p with 2p + 1; channels from R on pass through, by angles of 0.

    Args:
        rope: (cos, sin, interleaved), the views over [B, S, R/2]; None where nothing turns.
        channels: the variable that says which of ``d`` there are; None where all are.
        padded: how many channels ``d`` has.
    """

    def __init__(self, writer: Writer, rope: tuple[View, View, bool] | None, channels: str | None, padded: int) -> None:
        self._writer, self._rope, self._channels = writer, rope, channels
        self._width = 2 * int(rope[0].shape[-1]) if rope else 0
        self._partial = self._width < padded

    def begin(self) -> list[str]:
        """Of each channel: whether it ``turns``, its ``partner``, the ``angle`` it takes, its ``side`` of the pair."""
        if self._rope is None:
            return []
        half = self._width // 2
        if self._rope[2]:
            partner, angle, first = "d ^ 1", "d // 2", "d % 2 == 0"
        else:
            first = f"d < {half}"
            partner, angle = f"tl.where({first}, d + {half}, d - {half})", f"tl.where({first}, d, d - {half})"
        lines = []
        if self._partial:
            lines.append(f"turns = d < {self._width}")
            partner = f"tl.where(turns, {partner}, d)"
        return [*lines, f"partner = {partner}", f"angle = {angle}", f"side = tl.where({first}, -1.0, 1.0)"]

    def angles(self, token: str | None, mask: str | None = None) -> list[str]:
        """``cos_of`` and ``sin_of`` [rows or 1, channels] of ``token``, a column of numbers; None is token 0."""
        if self._rope is None:
            return []
        turns = "turns[None, :]" if self._partial else None
        lines = []
        for name, view, rest in (("cos", self._rope[0], "1.0"), ("sin", self._rope[1], "0.0")):
            place = address(self._writer, view, name, ["b", token, "angle[None, :]"])
            lines.append(f"{name}_of = tl.load({place}{masked(turns, mask, other=rest)}).to(tl.float32)")
        return [*lines, "sin_of = sin_of * side[None, :]"]

    def load(self, target: str, view: View, name: str, indices: Sequence[str | None], mask: str | None) -> list[str]:
        """``target``: the turned tile in the type of ``view``, of which ``indices`` are all but the channels.

        Args:
            name: what a parameter for ``view`` is called.
            mask: which rows there are, as a column.
        """
        held = masked(mask, across(self._channels), other="0.0")
        x, y = (
            f"tl.load({address(self._writer, view, name, [*indices, f'{channel}[None, :]'])}{held})"
            for channel in ("d", "partner")
        )
        if self._rope is None:
            return [f"{target} = {x}"]
        turned = f"{x}.to(tl.float32) * cos_of + {y}.to(tl.float32) * sin_of"
        return [f"{target} = ({turned}).to({TYPES[view.buffer.dtype]})"]
