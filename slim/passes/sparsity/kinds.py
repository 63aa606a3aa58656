"""The published patterns, by name: their options, with defaults, and the terms they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slim.compiler.patterns.terms import (
    Blocks,
    Columns,
    Random,
    Rows,
    Stride,
    Summary,
    Term,
    Top,
    VerticalSlash,
    Window,
)  # fmt: skip

Options = Mapping[str, int]


@dataclass(frozen=True)
class Kind:
    """A published pattern: the options it has, with their defaults, and the terms it is made of."""

    options: Options
    made_of: Callable[[Options], tuple[Term, ...]]

    def terms(self, given: Mapping[str, int | None]) -> tuple[Term, ...]:
        """The terms, with defaults where an option is absent or None."""
        return self.made_of({**self.options, **{n: v for n, v in given.items() if n in self.options and v is not None}})


def _columns(tokens: int) -> tuple[Term, ...]:
    return (Columns(tokens),) if tokens else ()


KINDS: dict[str, Kind] = {
    "window": Kind({"window": 1024, "sinks": 4}, lambda o: (Window(o["window"]), *_columns(o["sinks"]))),
    "strided": Kind({"window": 128, "stride": 128}, lambda o: (Window(o["window"]), Stride(o["stride"]))),
    "fixed": Kind({"block": 128, "summary": 8}, lambda o: (Blocks(o["block"], 1), Summary(o["block"], o["summary"]))),
    "longformer": Kind(
        {"window": 512, "global_tokens": 16},
        lambda o: (Window(o["window"]), Columns(o["global_tokens"]), Rows(o["global_tokens"])),
    ),
    "bigbird": Kind(
        {"block": 64, "neighbours": 2, "global_tokens": 64, "random_blocks": 3, "seed": 0},
        lambda o: (
            Blocks(o["block"], o["neighbours"]), Columns(o["global_tokens"]), Rows(o["global_tokens"]),
            Random(o["block"], o["random_blocks"], o["seed"]),
        ),
    ),
    "vertical_slash": Kind(
        {"columns": 256, "slashes": 256, "sinks": 4},
        lambda o: (VerticalSlash(o["columns"], o["slashes"]), *_columns(o["sinks"])),
    ),
    "block_topk": Kind(
        {"block": 16, "share": 8, "sinks": 4},
        lambda o: (Top(o["block"], o["share"]), *_columns(o["sinks"])),
    ),
}  # fmt: skip
