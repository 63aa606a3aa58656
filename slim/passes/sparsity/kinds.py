"""The published patterns, by name: their options, with defaults, and the pattern that these make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A published pattern.

    Attributes:
        options: with their defaults.
        pattern: as the IR has it, with the names of options in braces.
    """

    options: Mapping[str, int]
    pattern: str

    def text(self, given: Mapping[str, int | None]) -> str:
        """The pattern, with defaults where an option is absent or None; no columns where none are kept."""
        values = {name: default if given.get(name) is None else given[name] for name, default in self.options.items()}
        terms = self.pattern.format(**values).split(" | ")
        return " | ".join(term for term in terms if term != "columns(0)")


_GLOBAL = "columns({global_tokens}) | rows({global_tokens})"

KINDS = {
    "window": Kind({"window": 1024, "sinks": 4}, "window({window}) | columns({sinks})"),
    "strided": Kind({"window": 128, "stride": 128}, "window({window}) | stride({stride})"),
    "fixed": Kind({"block": 128, "summary": 8}, "blocks({block}, 1) | summary({block}, {summary})"),
    "longformer": Kind({"window": 512, "global_tokens": 16}, "window({window}) | " + _GLOBAL),
    "bigbird": Kind(
        {"block": 64, "neighbours": 2, "global_tokens": 64, "random_blocks": 3, "seed": 0},
        f"blocks({{block}}, {{neighbours}}) | {_GLOBAL} | random({{block}}, {{random_blocks}}, {{seed}})",
    ),
    "vertical_slash": Kind(
        {"columns": 256, "slashes": 256, "sinks": 4}, "vertical_slash({columns}, {slashes}) | columns({sinks})"
    ),
    "block_topk": Kind({"block": 16, "share": 8, "sinks": 4}, "top({block}, {share}) | columns({sinks})"),
}
