"""Models and artifacts on disk, and the way from a model to a Program."""

from slim.errors.base import SlimError, StrPath


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


class BadIR(SlimError, ValueError):
    """A text is not slim IR."""

    message = "line {line} is not slim IR: {reason}"
    hint = "IR text is written by print(program); an edited one must keep one typed assignment a line."

    line: int
    reason: str
