"""What a pass is: a frozen dataclass whose fields are its options and whose repr is its pipeline text."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from slim import errors
from slim.compiler import options
from slim.compiler.dump import Dump
from slim.compiler.probe import Probe
from slim.compiler.program import Program
from slim.compiler.report import PipelineReport, Report

# What may be true of a Program and taken away for good: the vocabulary of requires and invalidates.
FLOAT_WEIGHTS = "float weights"
WHOLE_WEIGHTS = "linears that are in one piece"
FLOAT_KV = "keys and values in floating point"
KNOWN_HEADS = "heads that no pattern tells apart"
UNSMOOTHED = "norm gains that hold no smoothing"  # to fold them would undo it

# What may be collected from a Program, once, and handed from pass to pass: the vocabulary of preserves.
STATISTICS = "statistics"

Progress = Callable[[str, int, int], None]  # what is being done, how many steps are done, of how many
T = TypeVar("T")


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of a Program; a subclass is a frozen dataclass whose fields are its options.

    Field types are bool, int, float, str, None, Literal, ``tuple[X, ...]`` and unions of them; a value of another
    type is refused when the pass is made. The first field may be given by position.

    Attributes:
        name: what pipeline texts call it, made from the class's name: FoldNorms is ``fold_norms``.
        lossless: the pass promises the same function; the pipeline holds it to that.
        requires: facts without which it cannot run: the order of passes is refused where an earlier one took it away.
        invalidates: facts that hold no longer after it, and cannot be made to hold again.
        preserves: what was collected before it and is still right after it; all else is collected anew.

    Example:
        >>> @dataclass(frozen=True)
        ... class Halve(Pass):
        ...     weights: str = "*"
        ...     def run(self, program: Program, ctx: Context) -> Report: ...
        >>> Halve("lm_head.*")
        halve("lm_head.*")
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()
    preserves: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        cls.name = snake_case(cls.__name__)
        cls.__repr__ = Pass.__repr__  # type: ignore[method-assign]  # or @dataclass would write its own

    def __post_init__(self) -> None:
        for option, kind in option_types(type(self)).items():
            try:
                fitted = options.fit(getattr(self, option), kind)
            except options.Unfit as error:
                raise errors.BadPassOption(
                    pass_name=self.name, option=option, reason=str(error), known=error.known
                ) from None
            object.__setattr__(self, option, fitted)
        self.check()

    def check(self) -> None:  # noqa: B027  a hook that most passes have no use for
        """Raises BadPassOption or ContradictoryOptions where well-typed options make no sense together."""

    @property
    def probe_tokens(self) -> int:
        """How many tokens it takes to see what the pass does; 0 where it shows in any input."""
        return 0

    @abstractmethod
    def run(self, program: Program, ctx: Context) -> Report:
        """Rewrites ``program`` in place; the pipeline hands it a copy, and throws that away if this raises.

        Returns:
            A Report with the sites it changed and those it left alone, and why. The pipeline fills in the rest.
        """
        ...

    def __repr__(self) -> str:
        """The pipeline text: the first option by position, if it is given, then those that are not at their default."""
        parts: list[str] = []
        for index, option in enumerate(dataclasses.fields(self)):
            value = getattr(self, option.name)
            if index == 0 and value is not None:
                parts.append(options.literal(value))
            elif option.default is dataclasses.MISSING or value != option.default:
                parts.append(f"{option.name}={options.literal(value)}")
        return f"{self.name}({', '.join(parts)})"


def snake_case(name: str) -> str:
    """FoldNorms -> fold_norms, GQA -> gqa, QuantizeKV -> quantize_kv."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def option_types(kind: type[Pass]) -> dict[str, Any]:
    """The options of a pass and their declared types, in order."""
    hints = get_type_hints(kind)
    return {option.name: hints[option.name] for option in dataclasses.fields(kind)}


def _silent(what: str, done: int, total: int) -> None:
    pass


def _unseen(program: Program) -> None:
    pass


@dataclass
class Context:
    """What passes and the pipeline share while they run.

    Attributes:
        strict: a pass that matches nothing is an error.
        verify: check the IR and measure the output's change around every pass.
        dump: where to write the IR after each pass; None means the environment's SLIM_DUMP, if that is set.
        probe: what the change is measured on; None means a probe made for the Program.
        progress: told of every step of anything that may take long.
        calibration: what the user gave, for passes that need activations.
        batches: the calibration data as read for the Program, once a pass has asked.
        collected: what passes collected, by name; the pipeline drops what a pass does not preserve.
        original: the Program before any pass, for passes that hold a later one against it.
        watch: shown the lifted Program and that after each pass; they are not to be changed.
        probed: the probe and what the Program makes of it after the last pass, where the pipeline measured that.
        report: what the pipeline has done so far.
        dumped: where the pipeline wrote the stages, for what is made after it.
    """

    strict: bool = True
    verify: bool = True
    dump: Path | None = None
    probe: Probe | None = None
    progress: Progress = _silent
    calibration: Any = None
    batches: Any = None
    collected: dict[str, Any] = field(default_factory=dict)
    original: Program | None = None
    watch: Callable[[Program], None] = _unseen
    probed: tuple[Probe, Any] | None = None
    report: PipelineReport = field(default_factory=PipelineReport)
    dumped: Dump = field(default_factory=lambda: Dump(None))

    def track(self, what: str, items: Iterable[T]) -> Iterator[T]:
        """Yields ``items``, telling ``progress`` of each as it is done."""
        items = items if isinstance(items, Sized) else list(items)
        for done, item in enumerate(items):
            self.progress(what, done, len(items))
            yield item
        self.progress(what, len(items), len(items))
