"""Running a compiled model."""

from collections.abc import Collection

from slim.errors.base import SlimError, StrPath, did_you_mean


class BadInput(SlimError, ValueError):
    """An argument has the wrong type, shape or value."""

    message = "bad {argument}: {reason}"
    hint = "{call} says what it takes."

    argument: str
    reason: str
    of: str | None = None  # what was called, where that is known: "slim.CompiledModel.explain"

    @property
    def call(self) -> str:
        return f"help({self.of})" if self.of else "help() of what was called, or --help of the command,"


class BackendOption(SlimError, ValueError):
    """torch.compile was given an option that slim's backend does not have."""

    message = "the backend 'slim' has no option '{option}'.{suggestion}"
    hint = "options may hold: {known}; dynamic= and fullgraph= are torch.compile's own; slim has no modes."

    option: str
    known: Collection[str]

    @property
    def suggestion(self) -> str:
        return did_you_mean(self.option, self.known)


class NeedsNoGrad(SlimError, RuntimeError):
    """A graph that gradients would be asked of: slim compiles for inference."""

    message = "slim compiles for inference, and this call records gradients"
    hint = "call the model under torch.no_grad() or torch.inference_mode(), or set requires_grad_(False) on it."


class WeightsChanged(SlimError, RuntimeError):
    """A weight that was frozen into compiled code is another now."""

    message = "a weight of the model changed after torch.compile froze it"
    hint = "call torch.compiler.reset(), so that the next call compiles the model as it is now."


class UnreadableFile(SlimError, OSError):
    """A file that was named on the command line cannot be used."""

    message = "cannot use '{path}' for {option}: {reason}"
    hint = "give the path of a UTF-8 text file; `slim COMMAND --help` says what it should hold."

    option: str
    path: StrPath
    reason: str


class MissingPackage(SlimError, ImportError):
    """Something was asked for that needs a package which slim does without otherwise."""

    message = "{what} needs {package}, which is not installed"
    hint = "pip install 'slim-compiler[{extra}]'."

    what: str
    package: str
    extra: str


class EmptyPrompt(SlimError, ValueError):
    """There is no token to continue from."""

    message = "the prompt is empty"
    hint = "give at least one token, the beginning-of-sequence token for instance."


class PromptTooLong(SlimError, ValueError):
    """Prompt and new tokens together do not fit the KV cache, or the positions that the model has."""

    message = "{length} tokens do not fit {room} {capacity}"
    hint = (
        "shorten the prompt or lower max_new_tokens; a cache holds KVCacheConfig(max_tokens=...), a scheduler "
        "Scheduler(max_tokens=...), and a model's positions are what they are."
    )

    length: int
    capacity: int
    room: str = "a cache of"


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
    """A cache was handed to a model, or to a batch, that it was not made for."""

    message = "the KV cache is not one for this call: it must be {expected}, and is {got}"
    hint = "take it from new_cache(batch) of the same CompiledModel, and do not share it between models."

    expected: object
    got: object


class CacheFull(SlimError, RuntimeError):
    """Every page of a KV cache is taken."""

    message = "all {pages} pages of the KV cache are taken: it holds {tokens:,} tokens"
    hint = "finish or cancel a sequence, or give the cache more room."

    pages: int
    tokens: int
