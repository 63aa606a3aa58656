"""What a user can put into ``passes=[...]``: one file a pass, found by being in this folder.

slim.compile(model, passes=[FoldNorms(), Quantize("int8")])
slim.compile(model, passes='fold_norms, quantize("int8")')
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from slim import errors
from slim.compiler.passes_base import Pass
from slim.compiler.pipeline import check_order
from slim.compiler.pipeline_text import read_pipeline


def _discovered() -> Iterator[type[Pass]]:
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Pass) and value.__module__.endswith(f".{module.name}"):
                yield value


PASSES: dict[str, type[Pass]] = {kind.name: kind for kind in _discovered()}
globals().update({kind.__name__: kind for kind in PASSES.values()})

if TYPE_CHECKING:  # what the line above makes, for type checkers and editors
    from slim.passes.fold_norms import FoldNorms as FoldNorms
    from slim.passes.gqa import GQA as GQA
    from slim.passes.heal import Heal as Heal
    from slim.passes.low_rank import LowRank as LowRank
    from slim.passes.prune import Prune as Prune
    from slim.passes.quantize import Quantize as Quantize
    from slim.passes.quantize_kv import QuantizeKV as QuantizeKV
    from slim.passes.smooth_quant import SmoothQuant as SmoothQuant
    from slim.passes.sparse_attention import SparseAttention as SparseAttention


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes a pipeline text names: ``'fold_norms, quantize("int8", exclude=["lm_head*"])'``.

    The text is read and never executed; it may span lines and hold ``#`` comments.

    Raises:
        BadPipelineText, UnknownPass, BadPassOption, ContradictoryOptions.
    """
    return read_pipeline(text, PASSES)


def as_passes(passes: str | Pass | Sequence[str | Pass]) -> tuple[Pass, ...]:
    """Passes however a user writes them: one, several, as objects or as text; in an order that may be right.

    Raises:
        What parse_pipeline raises of a text. BadInput: for what is no pass. PassOrder: where one cannot follow another.
    """
    pipeline = tuple(_each(passes))
    check_order(pipeline)
    return pipeline


def _each(passes: str | Pass | Sequence[str | Pass]) -> Iterator[Pass]:
    if isinstance(passes, str):
        yield from parse_pipeline(passes)
    elif isinstance(passes, Pass):
        yield passes
    elif isinstance(passes, type) and issubclass(passes, Pass):
        raise errors.BadInput(argument="passes", reason=f"{passes.__name__} is a class: write {passes.__name__}()")
    elif isinstance(passes, Sequence):
        for item in passes:
            yield from _each(item)
    else:
        raise errors.BadInput(argument="passes", reason=f"{passes!r} is not a pass, a pipeline text, or a list of them")


__all__ = ["PASSES", "Pass", "as_passes", "parse_pipeline", *sorted(kind.__name__ for kind in PASSES.values())]
