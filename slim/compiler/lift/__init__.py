"""From a model to a Program: torch.export, then rules that raise every spelling to slim's dialect."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from slim import errors
from slim.compiler.lift.checkpoint import Checkpoint, locate
from slim.compiler.lift.export import export
from slim.compiler.program import Facts, Program
from slim.compiler.raising import raise_program
from slim.compiler.verify import verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lift_path(path: str | Path, example_inputs: Any = None) -> Program:
    """Lifts the transformers model at ``path`` (or with that hub id) without reading its weights.

    Raises:
        ModelNotFound, CheckpointCorrupt: where it cannot be read. Else as ``lift``.
    """
    checkpoint = Checkpoint(locate(path))
    model, deferred = checkpoint.skeleton()
    program = lift(model, example_inputs, checkpoint.directory)
    if deferred:
        checkpoint.attach(program)
    return program


def lift(model: nn.Module, example_inputs: Any = None, source: Path | None = None) -> Program:
    """Lifts a module into a verified Program; the module is left as it was, its weights are shared.

    Args:
        model: a transformers PreTrainedModel, or any nn.Module that torch.export takes.
        example_inputs: a tensor, a tuple of arguments, or a dict of keywords; needed for plain modules. All of their
            dimensions become symbolic where the model allows it.
        source: the directory the model came from, remembered for its tokenizer; None: the one that it names itself.

    Raises:
        LiftFailed: naming module and line. UnsupportedModel: with the reason.
    """
    from transformers import PreTrainedModel

    from slim.compiler.lift.pretrained import lift_pretrained

    if isinstance(model, PreTrainedModel):
        program = lift_pretrained(model, _as_keywords(example_inputs), source or _directory_of(model))
    else:
        program = _lift_module(model, example_inputs)
    program.raised = raise_program(program)
    verify(program, "lift")
    return program


def _directory_of(model: PreTrainedModel) -> Path | None:
    named = Path(model.name_or_path or "")
    return named.absolute() if model.name_or_path and named.is_dir() else None


def _as_keywords(example_inputs: Any) -> dict[str, Tensor] | None:
    if example_inputs is None or isinstance(example_inputs, dict):
        return example_inputs
    raise errors.BadInput(argument="example_inputs", reason="for a transformers model it must be a dict of keywords")


def _lift_module(model: nn.Module, example_inputs: Any) -> Program:
    if example_inputs is None:
        raise errors.BadInput(
            argument="example_inputs", reason=f"slim cannot guess what {type(model).__name__}.forward takes"
        )
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, dict):
        kwargs = example_inputs
    else:
        args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)

    def attempt(sizes: Callable[[Any], Any], *notes: str) -> Program:
        shapes = pytree.tree_map(sizes, (args, kwargs))
        facts = Facts(kind="module", architecture=type(model).__name__, notes=list(notes))
        return export(model, args, kwargs, _shapes(model, *shapes), facts)

    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        return attempt(_all_dynamic)
    except errors.LiftFailed as failure:
        try:
            return attempt(
                _first_dynamic, "it takes inputs of the sizes of example_inputs, but for their first dimension"
            )
        except errors.LiftFailed:
            raise failure from None
    finally:
        for module in training:
            module.training = True


def _all_dynamic(value: Any) -> Any:
    return dict.fromkeys(range(value.dim()), Dim.AUTO) if isinstance(value, torch.Tensor) else None


def _first_dynamic(value: Any) -> Any:
    """For models whose weights fix the sizes: a linear over a flattened picture."""
    if not isinstance(value, torch.Tensor):
        return None
    return {dim: Dim.STATIC if dim else Dim.AUTO for dim in range(value.dim())}


def _shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dynamic shapes by parameter, which is how torch.export takes them for *args and keywords too."""
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
