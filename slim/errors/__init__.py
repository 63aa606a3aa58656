"""The error catalogue: one class an error, and a text that says what, where, and what to do about it.

An error is raised with its facts as keywords, `raise PromptTooLong(length=600, capacity=512)`, and words them
itself; the facts stay on it as attributes. Where users expect a builtin, such as ValueError, it is one.
"""

from slim.errors.base import SlimError
from slim.errors.models import (
    ArtifactCorrupt,
    ArtifactVersion,
    BadIR,
    CheckpointCorrupt,
    ExportUnsupported,
    LiftFailed,
    ModelNotFound,
    NonFiniteWeight,
    NoTokenizer,
    SaveFailed,
    UnsupportedModel,
    VerificationFailed,
)
from slim.errors.passes import (
    BadPassOption,
    BadPipelineText,
    ContradictoryOptions,
    NeedsCalibration,
    NonFiniteActivation,
    NothingToHeal,
    NotLossless,
    PassFailed,
    PassMatchedNothing,
    PassOrder,
    UnknownPass,
)
from slim.errors.running import (
    BackendOption,
    BadInput,
    CacheFull,
    CacheMismatch,
    CacheUnsupported,
    EmptyPrompt,
    MissingPackage,
    NeedsNoGrad,
    NotGenerative,
    PromptTooLong,
    TokenOutOfRange,
    UnreadableFile,
    UnsupportedGenerateOption,
    WeightsChanged,
)
from slim.errors.targets import BadEnvironment, BuildFailed, KernelFailed, TargetUnavailable, UnknownTarget

__all__ = [
    "ArtifactCorrupt", "ArtifactVersion", "BackendOption", "BadEnvironment", "BadIR", "BadInput", "BadPassOption",
    "BadPipelineText", "BuildFailed", "CacheFull", "CacheMismatch", "CacheUnsupported", "CheckpointCorrupt",
    "ContradictoryOptions",
    "EmptyPrompt", "ExportUnsupported", "KernelFailed", "LiftFailed", "MissingPackage", "ModelNotFound",
    "NeedsCalibration", "NeedsNoGrad", "NoTokenizer", "NonFiniteActivation", "NonFiniteWeight", "NotGenerative",
    "NotLossless", "NothingToHeal", "PassFailed", "PassMatchedNothing", "PassOrder", "PromptTooLong", "SaveFailed",
    "SlimError", "TargetUnavailable", "TokenOutOfRange", "UnknownPass", "UnknownTarget", "UnreadableFile",
    "UnsupportedGenerateOption", "UnsupportedModel", "VerificationFailed", "WeightsChanged",
]  # fmt: skip
