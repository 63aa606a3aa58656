"""Rows rounded to int8, each in steps of its own: normalised, measured and rounded by one program."""

from __future__ import annotations

from slim.codegen.regions.products import Linear
from slim.codegen.regions.scalars import Load
from slim.codegen.regions.views import View
from slim.codegen.triton.kernel import Kernel
from slim.codegen.triton.loops import STATISTICS, normalised, over_rows, rows_over
from slim.codegen.triton.text import Index, ScalarText, number
from slim.codegen.triton.writer import Target, Writer

LEAST = 1.1754943508222875e-38  # the step of a row of zeros, as slim.token_scale has it


def step_of(largest: str) -> str:
    """The step of rows whose largest magnitudes are ``largest``."""
    return f"tl.maximum({largest} / 127.0, {LEAST!r})"


def round_rows(region: Linear, out: View, steps: View, target: Target) -> Kernel:
    """The rows of ``region``'s source into ``out``, int8, and their steps."""
    source = region.source
    writer = Writer(region, target)
    x, norm = Load(source.view), source.norm
    rows = rows_over(writer, source.view.shape, [x], [out], norm)
    text = ScalarText(writer, rows.index)
    lines = list(rows.begin)
    if norm is not None:
        lines += STATISTICS[norm.kind](over_rows(rows, text, x), writer.size(rows.width), number(norm.eps))

    def numbers() -> list[str]:
        """``lane``: what is rounded."""
        text.fresh()
        held = text.write(x).text
        lane = held if norm is None else normalised(text, norm, held)
        return [*text.lines, f"lane = {lane}"]

    place = ScalarText(writer, Index(rows.index.axes[:-1], rows.index.groups[:-1])).address(steps).text
    lines += [
        "largest = tl.zeros((BLOCK,), tl.float32)",
        *rows.loop([*numbers(), "largest = tl.maximum(largest, tl.where(inside, tl.abs(lane), 0.0))"]),
        f"step = {step_of('tl.max(largest, 0)')}", f"tl.store({place}, step)",
    ]  # fmt: skip
    body = [*numbers(), f"whole = {writer.function('round_even')}(lane / step)"]
    store = text.store(out, "tl.minimum(tl.maximum(whole, -128.0), 127.0).to(tl.int8)")
    lines += rows.loop([*body, store])
    return writer.kernel("round_rows", lines, rows.configs, rows.grid)


__all__ = ["round_rows", "step_of"]
