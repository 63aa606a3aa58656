"""Options of Prune that make no sense together, or that nothing would read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

_OF_UNITS = ("criterion", "units", "multiple", "refit", "bias", "reload", "scope", "rounds")
_PLAIN = ("obs", "magnitude", "random")  # what experts, and channels of the stream, are chosen by
_COMPARED = ("obs", "taylor", "fisher")  # criteria whose scores are changes of the model's loss

Faults = Iterator[tuple[str, str]]  # an option, and why not


class Options(Protocol):
    """What ``Prune`` was told."""

    @property
    def criterion(self) -> str: ...
    @property
    def units(self) -> str: ...
    @property
    def scope(self) -> str: ...
    @property
    def blocks(self) -> str: ...
    @property
    def fits(self) -> bool: ...
    @property
    def ratio(self) -> float | None: ...
    @property
    def multiple(self) -> int | None: ...
    @property
    def rounds(self) -> int | None: ...
    @property
    def flops(self) -> int | None: ...
    @property
    def latency(self) -> float | None: ...
    @property
    def depth(self) -> int | float | None: ...
    @property
    def context(self) -> int: ...
    @property
    def refit(self) -> bool | None: ...
    @property
    def bias(self) -> bool: ...
    @property
    def protect(self) -> tuple[str, ...]: ...


def faults(asked: Options) -> Faults:
    """The first is enough to refuse."""
    yield from _numbers(asked)
    if asked.depth is not None:
        yield from _depth(asked, asked.depth)
        return
    if asked.blocks != "loss":
        yield "blocks", "it says which whole blocks go, and without depth= none do"
    yield from _units(asked)
    yield from _fit(asked)
    if asked.scope == "global" and asked.criterion not in _COMPARED:
        known = " and ".join(_COMPARED)
        yield "scope", f"scores of {asked.criterion} say nothing across layers; those of {known} do"


def _numbers(asked: Options) -> Faults:
    if asked.ratio is not None and not 0.0 < asked.ratio < 1.0:
        yield "ratio", f"a share of the parameters lies between 0 and 1, and {asked.ratio} does not"
    for name in ("parameters", "bytes", "flops", "latency", "context"):
        if (value := getattr(asked, name)) is not None and value <= 0:
            yield name, f"it is greater than zero, and {value} is not"
    if asked.context != 512 and asked.flops is None and asked.latency is None:
        yield "context", "what is to go does not depend on how many tokens there are: flops= and latency= do"
    if asked.multiple is not None and asked.multiple < 1:
        yield "multiple", f"a number is divisible by 1 at least, and not by {asked.multiple}"


def _depth(asked: Options, depth: int | float) -> Faults:
    if isinstance(depth, int) and depth < 1:
        yield "depth", f"one block at least goes, and not {depth}"
    if isinstance(depth, float) and not 0.0 < depth < 1.0:
        yield "depth", f"it is a number of blocks, or a share of them between 0 and 1, and not {depth}"
    declared: Any = asked
    for option in dataclasses.fields(declared):
        if option.name in _OF_UNITS and getattr(asked, option.name) != option.default:
            yield option.name, "it is for neurons and heads, and depth= takes whole blocks"


def _units(asked: Options) -> Faults:
    if asked.units in ("experts", "channels"):
        if asked.criterion not in _PLAIN:
            yield "criterion", f"{asked.units} are chosen by {', '.join(_PLAIN)}, and not by {asked.criterion}"
        if asked.scope == "global":
            yield "scope", f"every layer loses as many {asked.units} as the others"
    if asked.units == "experts":
        for option in ("refit", "bias"):
            if getattr(asked, option):
                yield option, "nothing reads one expert alone, so that nothing could be fitted"
    if asked.units == "channels":
        if asked.bias:
            yield "bias", "linears that read the residual stream keep the biases they have"
        if asked.protect:
            yield "protect", "every layer reads and writes the residual stream, and all lose the same channels"
        for option in ("flops", "latency"):
            if getattr(asked, option) is not None:
                yield option, "how many channels go is said by ratio, parameters or bytes"


def _fit(asked: Options) -> Faults:
    if asked.multiple is not None and asked.units in ("heads", "query heads"):
        yield "multiple", "it is for neurons, experts and channels, and none go"
    if asked.rounds is None:
        return
    if asked.rounds < 0:
        yield "rounds", f"it is a number of rounds, none at least, and {asked.rounds} is not"
    if not asked.fits:
        yield "rounds", "they fit what is left, and nothing is fitted without refit=True"
    if asked.rounds and asked.units not in ("both", "neurons"):
        yield "rounds", "they are for neurons, and none go"
