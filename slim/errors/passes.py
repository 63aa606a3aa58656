"""Pipelines and passes."""

from collections.abc import Collection

from slim.errors.base import SlimError, StrPath, did_you_mean, readable


class UnknownPass(SlimError, ValueError):
    """A pipeline names a pass that does not exist."""

    message = "there is no pass '{name}'.{suggestion}"
    hint = "the passes are: {known} (`slim passes` explains them)."

    name: str
    known: Collection[str]

    @property
    def suggestion(self) -> str:
        return did_you_mean(self.name, self.known)


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
        value = self.reason.partition(" ")[0].strip('"')  # a reason may begin with the value, which is misspelt then
        return did_you_mean(self.option, self.known) or did_you_mean(value, self.known)

    @property
    def choices(self) -> str:
        return f" Accepted here: {readable(self.known)}." if self.known else ""


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


class NeedsCalibration(SlimError, ValueError):
    """A pass needs to see activations, and there is nothing to run the model on."""

    message = "{pass_name} needs calibration data, and there is none"
    hint = (
        "pass calibration=[...] to slim.compile (texts, token ids [B, S] or a DataLoader), or --calibration FILE to "
        "`slim compile`: some ten thousand tokens of the kind that the model will read."
    )

    pass_name: str


class NonFiniteActivation(SlimError, ValueError):
    """A value inside the model is NaN or infinite on the calibration data, which every statistic would inherit."""

    message = "on the calibration data, channel {channel} of what enters '{site}' is not finite"
    hint = "the model overflows on this text: load it in float32 or bfloat16, or calibrate on other text."

    site: str
    channel: int


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


class NothingToHeal(SlimError, ValueError):
    """A model that is to be healed gives the original's outputs already."""

    message = "{pass_name} has nothing to learn: the model gives the same outputs as the original"
    hint = "put it behind the passes that lose something, such as prune or quantize."

    pass_name: str


class PassFailed(SlimError):
    """A pass raised; the program was rolled back to what it was before."""

    message = "{pass_name} failed and was rolled back: {reason}"
    hint = "please report it with the reproducer, which holds the IR and the pipeline: {reproducer}{caveat}"

    pass_name: str
    reason: str
    reproducer: StrPath
    caveat: str = ""  # why the reproducer cannot run as it is


class NotLossless(SlimError):
    """A pass that promises the same function changed it."""

    message = "{pass_name} must preserve the function and moved the output by {error:.3g} (allowed {tolerance:.3g})"
    hint = (
        "please report it with the reproducer, which holds the IR and the pipeline: {reproducer}{caveat}. "
        "verify=False lets it pass at your own risk."
    )

    pass_name: str
    error: float
    tolerance: float
    reproducer: StrPath
    caveat: str = ""  # why the reproducer cannot run as it is


class ContradictoryOptions(SlimError, ValueError):
    """Two options cannot both be meant."""

    message = "{a} and {b} contradict each other: {reason}"
    hint = "keep one of the two; slim does not choose for you."

    a: str
    b: str
    reason: str
