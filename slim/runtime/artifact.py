"""Artifacts: a compiled model as a directory of safetensors, JSON and IR text. Nothing in it is ever executed.

slim.json              format version, facts, report, cache configuration, and a checksum of every other file
program.py             the IR, as text; runnable by people, only parsed by slim
weights*.safetensors   under their original names; not model*.safetensors, since transformers would misread them
config.json, generation_config.json, tokenizer files: for tokenizers and people
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slim import errors
from slim.codegen import Target, select
from slim.compiler.facts_json import decode_facts, encode_facts
from slim.compiler.program import Program
from slim.compiler.report import PipelineReport
from slim.compiler.text import parse, print_program
from slim.compiler.verify import verify
from slim.runtime import storage
from slim.runtime.cache import KVCacheConfig

if TYPE_CHECKING:
    from slim.runtime.compiled import CompiledModel

FORMAT = 1
MANIFEST, PROGRAM = "slim.json", "program.py"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def is_artifact(directory: str | Path) -> bool:
    """Whether a directory is a compiled artifact, of whatever version."""
    return (Path(directory) / MANIFEST).is_file()


def check_destination(directory: str | Path) -> None:
    """Raises SaveFailed where an artifact could not be saved to ``directory``: worth asking before a long compile."""
    storage.check_destination(directory, is_artifact)


# -- saving ------------------------------------------------------------------------------------------------------------


def save(compiled: CompiledModel, directory: str | Path) -> None:
    """Writes everything that ``load`` needs to ``directory``: all of it, or nothing.

    An artifact that lies there already is replaced; any other directory with files in it is refused.

    Raises:
        SaveFailed: with the reason, a full disk for instance; nothing is left behind.
    """
    with storage.written_directory(directory, is_artifact) as folder:
        facts = compiled.program.facts
        storage.write_text(folder / PROGRAM, print_program(compiled.program))
        storage.write_weights(compiled.program.weights, folder, "weights")
        for name, content in (("config.json", facts.config), ("generation_config.json", facts.generation)):
            if content is not None:
                storage.write_text(folder / name, json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
        copy_tokenizer(facts.source, folder)
        storage.write_text(folder / MANIFEST, json.dumps(_manifest(compiled, folder), indent=2) + "\n")


def _manifest(compiled: CompiledModel, folder: Path) -> dict[str, Any]:
    report = compiled.report
    return {
        "format": FORMAT,
        "slim": slim_version(),
        "torch": torch.__version__,
        "target": compiled.target.name,
        "pipeline": compiled.pipeline,
        "kv_cache": dataclasses.asdict(compiled.kv_cache),
        "facts": encode_facts(compiled.program.facts),
        "report": None if report is None else json.loads(report.to_json()),
        "files": {file.name: storage.checksum(file) for file in sorted(folder.iterdir())},
    }


def slim_version() -> str:
    """The installed version of slim; "unknown" where it runs from a checkout."""
    try:
        return version("slim-compiler")
    except PackageNotFoundError:
        return "unknown"


def copy_tokenizer(source: Path | None, folder: Path) -> None:
    """Copies the tokenizer files beside a model, if there are any."""
    if source is None or not Path(source).is_dir():
        return
    for pattern in TOKENIZER_FILES:
        for file in sorted(Path(source).glob(pattern)):
            shutil.copyfile(file, folder / file.name)


# -- loading -----------------------------------------------------------------------------------------------------------


def load(directory: str | Path, target: str | Target = "auto", *, tune: float | None = None) -> CompiledModel:
    """A compiled model as it was saved, lowered again for ``target``; ``tune`` is as ``slim.compile`` takes it.

    Raises:
        ModelNotFound. ArtifactVersion: saved by another slim. ArtifactCorrupt: a file is missing or damaged.
        UnknownTarget, TargetUnavailable.

    Example:
        >>> slim.load("small").generate(tokens, max_new_tokens=64)
    """
    from slim.runtime.compiled import CompiledModel

    folder = Path(directory)
    if not folder.is_dir():
        raise errors.ModelNotFound(path=directory)
    chosen = select(target, tune) if isinstance(target, str) else target
    try:
        manifest = _read_manifest(folder)
        program = _read_program(folder, manifest)
        report = manifest["report"]
        kv_cache = KVCacheConfig(**manifest["kv_cache"])
        return CompiledModel(
            program,
            chosen,
            report=None if report is None else PipelineReport.from_json(json.dumps(report)),
            kv_cache=None if kv_cache == KVCacheConfig() else kv_cache,
            pipeline=manifest["pipeline"],
        )
    except (
        errors.BadIR, errors.VerificationFailed, errors.CheckpointCorrupt, errors.NonFiniteWeight, errors.BadInput,
        errors.ContradictoryOptions,
    ) as error:  # fmt: skip
        raise errors.ArtifactCorrupt(path=directory, reason=str(error).partition("\n")[0]) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, errors.SlimError):
            raise
        reason = f"{MANIFEST} is not as slim writes it ({type(error).__name__}: {error})"
        raise errors.ArtifactCorrupt(path=directory, reason=reason) from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not is_artifact(folder):
        raise errors.ArtifactCorrupt(path=folder, reason=f"there is no {MANIFEST} in it")
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise errors.ArtifactCorrupt(path=folder, reason=f"{MANIFEST} cannot be read ({error})") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise errors.ArtifactVersion(path=folder, found=found, expected=FORMAT)
    for name, expected in manifest.get("files", {}).items():
        if not (folder / name).is_file():
            raise errors.ArtifactCorrupt(path=folder, reason=f"{name} is missing")
        if storage.checksum(folder / name) != expected:
            raise errors.ArtifactCorrupt(path=folder, reason=f"{name} is not what was saved: cut off or changed")
    return dict(manifest)


def _read_program(folder: Path, manifest: dict[str, Any]) -> Program:
    facts = decode_facts(manifest["facts"])
    facts.source = folder.absolute()  # its tokenizer lies here now
    files = [folder / name for name in manifest["files"] if name.endswith(".safetensors")]
    text = (folder / PROGRAM).read_text(encoding="utf-8")
    program = parse(text, storage.stored_weights(files), facts)
    verify(program, "load")
    return program
