"""The error catalogue: one class an error, and a text that says what, where, and what to do about it.

An error is raised with its facts as keywords, `raise PromptTooLong(length=600, capacity=512)`, and words them
itself; the facts stay on it as attributes. Where users expect a builtin, such as ValueError, it is one.
"""

import dataclasses
import difflib
import functools
import os
from collections.abc import Collection
from string import Formatter
from typing import Any, ClassVar, dataclass_transform

StrPath = str | os.PathLike[str]


# A root of its own, because type checkers take no fields from the class that carries dataclass_transform.
@dataclass_transform(kw_only_default=True, eq_default=False)
class _Catalogued(Exception):
    """Makes every error below a dataclass: mypy, and Python itself, refuse a missing or unknown field."""

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(kw_only=True, eq=False)(cls)  # eq would take the hash away that tracebacks need


class SlimError(_Catalogued):
    """The base of every error slim raises on purpose; never raised itself."""

    message: ClassVar[str]  # what went wrong: a str.format template over the error's fields and properties
    hint: ClassVar[str]  # what to do about it: likewise

    where: str | None = None  # "node mul_3 (modeling_llama.py:120)", for errors that have a place in the graph

    def __post_init__(self) -> None:
        place = f"\n  at: {self.where}" if self.where else ""
        super().__init__(f"{self._fill(self.message)}{place}\n  hint: {self._fill(self.hint)}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own way calls the class with positional arguments, which these classes do not take.
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return functools.partial(type(self), **fields), (), self.__dict__

    def _fill(self, template: str) -> str:
        names = [name for _, name, _, _ in Formatter().parse(template) if name]
        return template.format_map({name: _readable(getattr(self, name)) for name in names})


# --- models and artifacts on disk -----------------------------------------------------------------


class ModelNotFound(SlimError, FileNotFoundError):
    """The path or hub id names no model on this machine."""

    message = "no model at '{path}'"
    hint = (
        "give an nn.Module, a directory with config.json and *.safetensors, or a hub id; "
        "with HF_HUB_OFFLINE=1 a hub id must already be in the local cache."
    )

    path: StrPath


class CheckpointCorrupt(SlimError, ValueError):
    """A checkpoint file is there and cannot be read."""

    message = "checkpoint file '{file}' cannot be read: {reason}"
    hint = "fetch or save the checkpoint again: it is truncated, or not what its name says."

    file: StrPath
    reason: str


class NonFiniteWeight(SlimError, ValueError):
    """A weight holds NaN or infinity, which every statistic and scale would inherit."""

    message = "weight '{name}' holds {count} {kind} values"
    hint = "repair the checkpoint: a model with such weights gives no meaningful output, compressed or not."

    name: str
    kind: str  # "NaN", "infinite"
    count: int


class NoTokenizer(SlimError):
    """Text was given, and there is no tokenizer to read it with."""

    message = "no tokenizer beside the model at '{path}'"
    hint = "pass token ids (tensors [B, S]) instead of text, or save the tokenizer into the model's directory."

    path: StrPath | None


class ArtifactVersion(SlimError, ValueError):
    """A compiled artifact was written in a format this slim does not read."""

    message = "artifact '{path}' has format version {found}; this slim reads {expected}"
    hint = "compile the model again with this slim, or install the slim that wrote the artifact."

    path: StrPath
    found: object
    expected: object


class ArtifactCorrupt(SlimError, ValueError):
    """A directory is not a compiled artifact, or a part of it is missing or damaged."""

    message = "artifact '{path}' cannot be loaded: {reason}"
    hint = "save it again with CompiledModel.save(dir), and copy the whole directory."

    path: StrPath
    reason: str


class SaveFailed(SlimError, OSError):
    """An artifact could not be written."""

    message = "cannot save to '{path}': {reason}"
    hint = "choose a directory that can be written to and has room."

    path: StrPath
    reason: str


class ExportUnsupported(SlimError, ValueError):
    """The export format is unknown, or cannot say what this program holds."""

    message = "cannot export to '{format}': {reason}"
    hint = "save(dir) keeps everything; or leave out the passes that this format cannot express."

    format: str
    reason: str


# --- from a model to a program --------------------------------------------------------------------


class LiftFailed(SlimError):
    """torch.export could not turn the model into a graph."""

    message = "cannot lift {module} at {line}: {reason}"
    hint = (
        "the line above leaves the graph: keep Python control flow on tensor values, .item() and "
        "in-place tricks out of forward, or pass example_inputs that take the path you mean."
    )

    module: str
    line: str  # file:line of the model's own source
    reason: str


class UnsupportedModel(SlimError):
    """The model was understood, and holds something slim has no meaning for."""

    message = "{model} is not supported: {reason}"
    hint = "compile the part of it that is a transformer on its own, or report the architecture as an issue."

    model: str
    reason: str


class VerificationFailed(SlimError):
    """The IR is ill-formed after a stage: types, shapes, or the dialect."""

    message = "the program is not valid after {stage}: {node}: {reason}"
    hint = "this is a fault in {stage}, not in your model: please report it with the SLIM_DUMP=<dir> files."

    stage: str
    node: str
    reason: str


# --- pipelines and passes -------------------------------------------------------------------------


class UnknownPass(SlimError, ValueError):
    """A pipeline names a pass that does not exist."""

    message = "there is no pass '{name}'.{suggestion}"
    hint = "the passes are: {known} (`slim passes` explains them)."

    name: str
    known: Collection[str]

    @property
    def suggestion(self) -> str:
        return _did_you_mean(self.name, self.known)


class BadPassOption(SlimError, ValueError):
    """A pass was given an option it does not have, or a value it cannot take."""

    message = "{pass_name} cannot take '{option}': {reason}.{suggestion}"
    hint = "`slim passes` lists every pass with its options and their defaults.{choices}"

    pass_name: str
    option: str
    reason: str
    known: Collection[str] = ()  # what would have been accepted, where that is a list

    @property
    def suggestion(self) -> str:
        return _did_you_mean(self.option, self.known)

    @property
    def choices(self) -> str:
        return f" Accepted here: {_readable(self.known)}." if self.known else ""


class BadPipelineText(SlimError, ValueError):
    """A pipeline text does not parse."""

    message = "cannot read the pipeline at character {position}: {reason}\n{marked}"
    hint = "write passes as calls with commas between: 'prune(0.2), gqa(kv_heads=2), quantize(\"int8\")'."

    text: str
    position: int  # 0-based offset into text
    reason: str

    @property
    def marked(self) -> str:
        """The offending line of the text with a caret under the position."""
        start = self.text.rfind("\n", 0, self.position) + 1
        line = self.text[start:].split("\n", 1)[0]
        return f"    {line}\n    {' ' * (self.position - start)}^"


class PassOrder(SlimError, ValueError):
    """The passes stand in an order that cannot be right."""

    message = "{pass_name} cannot run here: {reason}"
    hint = "reorder the pipeline; shapes change first, then scales, then number formats."

    pass_name: str
    reason: str


class PassMatchedNothing(SlimError, ValueError):
    """A pass found nothing to change, which is never what its user meant."""

    message = "{pass_name} matched none of the {tried} places it tried{listed}"
    hint = "drop the pass, change its options, or pass strict=False to go on without it."

    pass_name: str
    tried: int
    reasons: Collection[str]  # why the near misses were refused

    @property
    def listed(self) -> str:
        return "".join(f"\n    - {reason}" for reason in self.reasons)


class PassFailed(SlimError):
    """A pass raised; the program was rolled back to what it was before."""

    message = "{pass_name} failed and was rolled back: {reason}"
    hint = "please report it with the reproducer, which holds the IR and the pipeline: {reproducer}"

    pass_name: str
    reason: str
    reproducer: StrPath


class NotLossless(SlimError):
    """A pass that promises the same function changed it."""

    message = "{pass_name} must preserve the function and moved the output by {error:.3g} (allowed {tolerance:.3g})"
    hint = "please report it with the SLIM_DUMP=<dir> files; verify=False lets it pass at your own risk."

    pass_name: str
    error: float
    tolerance: float


class ContradictoryOptions(SlimError, ValueError):
    """Two options cannot both be meant."""

    message = "{a} and {b} contradict each other: {reason}"
    hint = "keep one of the two; slim does not choose for you."

    a: str
    b: str
    reason: str


# --- targets --------------------------------------------------------------------------------------


class UnknownTarget(SlimError, ValueError):
    """The target's name means nothing to slim."""

    message = "there is no target '{target}'.{suggestion}"
    hint = "the targets are: {known}."

    target: str
    known: Collection[str]

    @property
    def suggestion(self) -> str:
        return _did_you_mean(self.target, self.known)


class TargetUnavailable(SlimError, RuntimeError):
    """The target is known, and this machine cannot build for it or run it."""

    message = "target '{target}' is not available here: {reason}"
    hint = 'target="auto" takes the best that is there; target="eager" runs everywhere.'

    target: str
    reason: str


# --- running --------------------------------------------------------------------------------------


class BadInput(SlimError, ValueError):
    """An argument has the wrong type, shape or value."""

    message = "bad {argument}: {reason}"
    hint = "help() of what was called (slim.compile, CompiledModel, generate) says what each argument takes."

    argument: str
    reason: str


class UnreadableFile(SlimError, OSError):
    """A file that was named on the command line cannot be used."""

    message = "cannot use '{path}' for {option}: {reason}"
    hint = "give the path of a UTF-8 text file; `slim COMMAND --help` says what it should hold."

    option: str
    path: StrPath
    reason: str


class EmptyPrompt(SlimError, ValueError):
    """There is no token to continue from."""

    message = "the prompt is empty"
    hint = "give at least one token, the beginning-of-sequence token for instance."


class PromptTooLong(SlimError, ValueError):
    """Prompt and new tokens together do not fit the KV cache."""

    message = "{length} tokens do not fit a cache of {capacity}"
    hint = "shorten the prompt, lower max_new_tokens, or compile with a larger KVCacheConfig(max_tokens=...)."

    length: int
    capacity: int


class TokenOutOfRange(SlimError, IndexError):
    """A token id lies outside the embedding table."""

    message = "token {token} at position {position} is outside the vocabulary of {vocab}"
    hint = "use the tokenizer that belongs to this model; padding such as -100 is for labels, not for inputs."

    token: int
    vocab: int
    position: int | tuple[int, ...]


class UnsupportedGenerateOption(SlimError, ValueError):
    """generate() was given an option it does not honour, and will not ignore."""

    message = "generate() does not take {option}: {reason}"
    hint = "leave the option out; for this one call the original model's generate() still takes it."

    option: str
    reason: str


class NotGenerative(SlimError, TypeError):
    """generate() was called on a model that does not predict a next token."""

    message = "{model} cannot generate: {reason}"
    hint = "call it as compiled(input_ids); generate() needs a causal language model with logits as its output."

    model: str
    reason: str


class CacheUnsupported(SlimError, ValueError):
    """The KV cache that was asked for cannot serve this model."""

    message = "this KV cache cannot be used: {reason}"
    hint = "change the KVCacheConfig, or leave kv_cache out for the default one."

    reason: str


class CacheMismatch(SlimError, ValueError):
    """A cache was handed to a model it was not made for."""

    message = "the KV cache does not belong to this model: expected {expected}, got {got}"
    hint = "take the cache from the same CompiledModel, and do not share it between models."

    expected: object
    got: object


# --- wording --------------------------------------------------------------------------------------


def _readable(value: object) -> object:
    """Lists as words with commas; all else as it is, so that format specs still apply."""
    if isinstance(value, Collection) and not isinstance(value, str | bytes):
        return ", ".join(map(str, value))
    return value


def _did_you_mean(word: str, known: Collection[str]) -> str:
    spelled = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), spelled, n=1)
    return f" Did you mean '{spelled[close[0]]}'?" if close else ""


class BadIR(SlimError, ValueError):
    """A text is not slim IR."""

    message = "line {line} is not slim IR: {reason}"
    hint = "IR text is written by print(program); an edited one must keep one typed assignment a line."

    line: int
    reason: str
