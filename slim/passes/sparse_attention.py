"""Lets attention look at fewer keys: windows, strides, blocks, or what queries, prompts or calibration data choose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from slim import errors
from slim.compiler.passes_base import KNOWN_HEADS, Context, Pass
from slim.compiler.patterns import by_head, read_pattern
from slim.compiler.patterns.picture import picture, shown
from slim.compiler.patterns.terms import Top, VerticalSlash
from slim.compiler.program import Program
from slim.compiler.report import Report, Skip
from slim.compiler.rules import argument
from slim.compiler.statistics import calibration_of
from slim.compiler.statistics.batches import first_batches
from slim.passes.sparsity.auto import SETTINGS, cheapest
from slim.passes.sparsity.kinds import KINDS

_PROBED = 256  # tokens of the probe at most: it runs after every pass
_TOKENS = 8192  # of calibration that "auto" looks at
_NUMBERS = tuple(dict.fromkeys(option for kind in KINDS.values() for option in kind.options))
_MAY_BE_ZERO = ("sinks", "seed")
_AUTO = {"sinks": 4}
_MASS = 0.95


@dataclass(frozen=True)
class SparseAttention(Pass):
    """Has every query of attention look at the keys that a pattern keeps, and at no others.

    The pattern becomes an attribute of each ``slim.attention``, as text; kernels visit the blocks of keys it keeps.
    Weights stay as they are. Print ``SparseAttention("bigbird").picture()`` to see one.

    Args:
        pattern: "window" (window, sinks), "strided" (window, stride), "fixed" (block, summary), "longformer" (window,
            global_tokens), "bigbird" (block, neighbours, global_tokens, random_blocks, seed), "vertical_slash"
            (columns, slashes, sinks), "block_topk" (block, share, sinks), "auto" (mass, among, sinks), "dense", or a
            text as the IR has it: "window(64) | columns(4)".
        window: newest tokens that a query keeps, its own among them.
        sinks: first tokens that all queries keep.
        stride: every so many keys back from the query one is kept.
        block: tokens of a block. summary: last tokens of each block that later queries keep.
        global_tokens: first tokens that see and are seen by all. neighbours: blocks around a query's own, it included.
        random_blocks: earlier blocks drawn for each head and block of queries, by ``seed``.
        columns, slashes: keys, and distances, that the last 64 queries of a prompt choose; decoding is dense.
        share: of the blocks before its own a query keeps the best 1 in so many.
        mass: with "auto", the share of its attention that each head must keep on the calibration data. Of the
            patterns that do, in sequences as long as the data's, the head gets the one that reads fewest keys; heads
            that need more stay dense.
        among: with "auto", the kinds that are tried; None for all but vertical_slash.
        skip: let kernels leave out keys that together hold no more than this share of a row's attention, where that
            saves work: with "dense" the only change. What a row gives is then off by at most twice as much, relative
            to its largest value.
        layers: numbers of the layers to change; None for all.

    Sources: window and sinks, Xiao et al. 2023 (StreamingLLM); strided and fixed, Child et al. 2019; Beltagy et al.
    2020 (Longformer); Zaheer et al. 2020 (BigBird); vertical_slash, Jiang et al. 2024 (MInference); block_topk, Tang
    et al. 2024 (Quest); skip, Yuan et al. 2025 (BLASST).

    Raises:
        BadPassOption: for an option that the pattern does not have. NeedsCalibration: "auto" without data.

    Example:
        >>> slim.compile(model, passes=[SparseAttention("window", window=256)])
    """

    pattern: str = "window"
    window: int | None = None
    sinks: int | None = None
    stride: int | None = None
    block: int | None = None
    summary: int | None = None
    global_tokens: int | None = None
    neighbours: int | None = None
    random_blocks: int | None = None
    seed: int | None = None
    columns: int | None = None
    slashes: int | None = None
    share: int | None = None
    mass: float | None = None
    among: tuple[str, ...] | None = None
    skip: float | None = None
    layers: tuple[int, ...] | None = None

    invalidates: ClassVar[frozenset[str]] = frozenset({KNOWN_HEADS})

    def check(self) -> None:
        """Options that the pattern does not have, and values that make no pattern, are refused."""
        for option in _NUMBERS:
            if getattr(self, option) is not None:
                self._check_number(option, getattr(self, option))
        for option, value in (("mass", self.mass), ("skip", self.skip)):
            if value is not None and not 0.0 < value < 1.0:
                raise self._bad(option, f"{value} is not between 0 and 1")
        for option in ("mass", "among"):
            if getattr(self, option) is not None and option not in self._known():
                raise self._bad(option, f"the pattern {self.pattern!r} has no such option", self._known())
        if self.among is not None and not (self.among and set(self.among) <= set(SETTINGS)):
            raise self._bad("among", f"it names one or more of these, not {self.among}", list(SETTINGS))
        if self.layers is not None and not self.layers:
            raise self._bad("layers", "it names no layer; leave it out for all")
        if self.pattern != "auto":
            self._check_text()

    def _check_number(self, option: str, value: Any) -> None:
        known, least = self._known(), int(option not in _MAY_BE_ZERO)
        if option not in known:
            raise self._bad(option, f"the pattern {self.pattern!r} has no such option", known)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 31:
            raise self._bad(option, f"it is a whole number from {least} to 2**31 - 1, not {value!r}")

    def _check_text(self) -> None:
        try:
            pattern = read_pattern(self.text())
        except errors.BadInput as error:
            raise self._bad("pattern", str(error.reason), [*KINDS, "auto", "dense"]) from None
        if pattern.is_dense and self.skip is None:
            raise self._bad("pattern", f"{self.pattern!r} changes nothing without skip")
        if self.pattern == "fixed":
            block, summary = (getattr(self, name) or KINDS["fixed"].options[name] for name in ("block", "summary"))
            if summary > block:
                raise self._bad("summary", f"{summary} tokens are more than the block's {block}")

    def _bad(self, option: str, reason: str, known: Sequence[str] = ()) -> errors.BadPassOption:
        return errors.BadPassOption(pass_name=self.name, option=option, reason=reason, known=known)

    def _known(self) -> list[str]:
        if self.pattern == "auto":
            return ["mass", "among", *_AUTO]
        return list(KINDS[self.pattern].options) if self.pattern in KINDS else []

    def text(self) -> str:
        """The pattern as the IR has it."""
        if self.pattern not in KINDS:
            return str(read_pattern(self.pattern))
        kind = KINDS[self.pattern]
        return kind.text({name: getattr(self, name) for name in kind.options})

    def picture(self, tokens: int | None = None, head: int = 0) -> str:
        """What queries (rows) keep of the keys (columns); see ``slim.compiler.patterns.picture``.

        Args:
            tokens: how many, each a character; None for as many as show what is left out, several a character.

        Raises:
            BadInput: for no tokens, or a head that there is not. BadPassOption: for "auto".
        """
        if self.pattern == "auto":
            raise self._bad("pattern", "auto chooses on calibration data: print(compiled.program) tells what")
        text = self.text()
        tokens, step = shown(text, head) if tokens is None else (tokens, 1)
        title = f"{step} queries and {step} keys a character: █ all kept, ▒ some, · none" if step > 1 else ""
        if any(isinstance(term, (Top, VerticalSlash)) for term in read_pattern(text).terms):
            title += "; " * bool(title) + "chosen for random queries and keys"
        title += "\n" * bool(title)
        return title + picture(text, tokens, head, step=step)

    @property
    def probe_tokens(self) -> int:
        """As many as show what is left out, within reason; of "auto" it is not known yet."""
        return _PROBED if self.pattern == "auto" else shown(self.text(), longest=_PROBED)[0]

    def run(self, program: Program, ctx: Context) -> Report:
        """Writes the pattern into each attention node."""
        report = Report()
        nodes = list(self._choose(program, report))
        texts = (
            self._found(program, ctx, nodes, report) if self.pattern == "auto" else dict.fromkeys(nodes, self.text())
        )
        for node, text in texts.items():
            if text == "dense" and self.skip is None:
                reason = f"nothing that reads fewer keys keeps {self.mass or _MASS:.0%} of any head's attention"
                report.skipped.append(Skip(_name(node), reason))
                continue
            if text != "dense":
                node.update_kwarg("pattern", text)
            if self.skip is not None:
                node.update_kwarg("skip", self.skip)
            report.matched.append(_name(node))
        return report

    def _choose(self, program: Program, report: Report) -> Any:
        absent = set(self.layers or ()) - {node.kwargs["layer"] for node in program.attention_nodes()}
        if absent:
            reason = f"the model has no attention of layer {', '.join(map(str, sorted(absent)))}"
            raise errors.BadPassOption(pass_name=self.name, option="layers", reason=reason)
        for node in program.attention_nodes():
            if self.layers is not None and node.kwargs["layer"] not in self.layers:
                continue
            objection = self._objection(node)
            if objection:
                report.skipped.append(Skip(_name(node), objection))
            else:
                yield node

    def _heads_named(self) -> int | None:
        """How many heads the pattern tells apart; None where it is the same for all."""
        if self.pattern == "auto":
            return None
        return read_pattern(self.text()).heads

    def _objection(self, node: fx.Node) -> str | None:
        if argument(node, "pattern") is not None:
            return f"it keeps {argument(node, 'pattern')} already"
        heads, named = int(argument(node, "q").meta["val"].shape[1]), self._heads_named()
        if named not in (None, heads):
            return f"it has {heads} heads, and the pattern names {named}"
        looks_back = self.pattern != "auto" and any(term.looks_back for term in read_pattern(self.text()).terms)
        if looks_back and not argument(node, "causal"):
            return "it looks at later tokens, and the pattern chooses among earlier ones alone"
        if argument(node, "q").meta["val"].shape[2] != argument(node, "k").meta["val"].shape[2]:
            return "its keys are not those of its own tokens"
        return None

    # -- auto --------------------------------------------------------------------------------------------------------

    def _found(self, program: Program, ctx: Context, nodes: list[fx.Node], report: Report) -> dict[fx.Node, str]:
        """For each node the pattern of each head that reads fewest keys and keeps enough of its attention."""
        batches = first_batches(calibration_of(program, ctx, self.name).batches, _TOKENS)
        sinks = _AUTO["sinks"] if self.sinks is None else self.sinks
        wanted = self.mass or _MASS
        found = cheapest(program, nodes, batches, self.among or tuple(SETTINGS), sinks, wanted)
        kinds = Counter(head.kind for heads in found.values() for head in heads)
        named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        report.notes.append(
            f"each head keeps {wanted:.0%} of its attention over {sum(batch.tokens for batch in batches):,} tokens, in "
            f"sequences of up to {max(int(batch.inputs[0].shape[1]) for batch in batches)}: {named}"
        )
        texts = {node: str(by_head([head.terms for head in heads])) for node, heads in found.items()}
        report.notes += [f"{_name(node)}, heads {text}" for node, text in texts.items() if text != "dense"]
        return texts


def _name(node: fx.Node) -> str:
    return f"attention of layer {node.kwargs['layer']}"
