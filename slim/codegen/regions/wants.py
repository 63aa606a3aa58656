"""What the kernels of a target take, as its emitter says it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wants:
    """What an emitter's kernels take.

    Attributes:
        wide: memory between regions holds any float as float32; otherwise as the type that the Program says.
        packed: quantised weights come in a layout of the kernels' own, with the scales of groups inside.
        formats: of weights that a product reads as they are stored.
        int8_rows: whether a product multiplies rows that the Program quantised as integers.
        requantises: whether what linears store is rounded to int8 at once, where linears alone read it so, in one step.
        own_steps: whether it finds the step of such a row, where that is slim.token_scale of the row, as it loads it.
        pitched: masks among the inputs, bool [B, T], are read where they lie, rows as far apart as they are.
    """

    wide: bool = True
    packed: bool = True
    formats: frozenset[str] = frozenset({"f32", "bf16", "f16", "int8", "int4"})
    int8_rows: bool = False
    requantises: bool = False
    own_steps: bool = False
    pitched: bool = False
