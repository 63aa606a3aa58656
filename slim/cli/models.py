"""Opening what a command is given: an artifact, a transformers directory, or a hub id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slim.cli.progress import Steps

if TYPE_CHECKING:
    from slim.runtime.compiled import CompiledModel


def open_model(path: str, target: str, steps: Steps, tune: float | None = None) -> CompiledModel:
    """A compiled model: loaded, or lifted as it is, without passes.

    Raises:
        ModelNotFound and what else ``slim.compile`` and ``slim.load`` raise.
    """
    from slim.api import compile
    from slim.runtime.artifact import is_artifact, load

    if is_artifact(path):
        steps.stage(f"loading {path}")
        return load(path, target=target, tune=tune)
    steps.stage(f"lifting {path}")
    return compile(path, target=target, progress=steps, tune=tune)


def open_original(path: str, steps: Steps) -> Any:
    """The model as transformers runs it; an artifact as slim does.

    Raises:
        ModelNotFound, CheckpointCorrupt.
    """
    from slim.runtime.artifact import is_artifact, load

    steps.stage(f"loading {path}")
    if is_artifact(path):
        return load(path)
    return load_original(path)


def require_there(path: str) -> None:
    """Raises ModelNotFound where there is neither an artifact nor a model."""
    from slim.compiler.lift.checkpoint import locate
    from slim.runtime.artifact import is_artifact

    if not is_artifact(path):
        locate(path)


def load_original(path: str) -> Any:
    """transformers' own model at ``path``, in evaluation mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from slim import errors
    from slim.compiler.lift.checkpoint import locate

    directory = locate(path)
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise errors.CheckpointCorrupt(file=directory, reason=str(error).strip().splitlines()[0]) from error


def require_generative(model: CompiledModel, path: str) -> None:
    """Raises NotGenerative for anything but a causal language model."""
    from slim import errors

    if not model.can_generate():
        raise errors.NotGenerative(model=path, reason=f"its kind is {model.program.facts.kind}")
