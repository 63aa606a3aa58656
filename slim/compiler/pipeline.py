"""The pipeline: runs passes in order and holds each one to its word.

Around every pass the IR is verified, the output's change on a probe is measured, and the Program is dumped if asked.
A pass works on a copy, so that one that fails leaves nothing behind but a reproducer.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from slim import errors
from slim.compiler.difference import changes, gone
from slim.compiler.dump import Dump
from slim.compiler.passes_base import FLOAT_KV, FLOAT_WEIGHTS, Context, Pass
from slim.compiler.probe import Outputs, Probe, make_probe, rounding_noise, tolerance
from slim.compiler.program import Program
from slim.compiler.report import PipelineReport, Report, Size, by_reason
from slim.compiler.reproducer import Reproducer, write_reproducer
from slim.compiler.rounded_kv import pair_bits
from slim.compiler.uses import DEQUANTIZE, stored_in
from slim.compiler.verify import verify

log = logging.getLogger(__name__)

_NOISES = 4  # a lossless pass may round every weight once: how often the effect of that, at most


def run_pipeline(program: Program, passes: Sequence[Pass], ctx: Context) -> tuple[Program, PipelineReport]:
    """Applies ``passes`` to ``program``, which is left as it is.

    Returns:
        The rewritten Program (``program`` itself where there are no passes), and what was done to it.

    Raises:
        PassOrder: before anything runs. PassFailed, NotLossless: with a reproducer. PassMatchedNothing: when strict.
        What a pass raises of slim's own errors about the user's model or options comes out as it is.
    """
    check_order(passes, program)
    report = PipelineReport(notes=list(program.facts.notes), rules=dict(program.raised))
    run = _Run(tuple(passes), ctx, Dump.to(ctx.dump), report)
    ctx.report, ctx.dumped = report, run.dump
    run.begin(program)
    try:
        for index, pass_ in enumerate(passes):
            ctx.progress("passes", index, len(passes))
            program = run.step(program, pass_)
        ctx.progress("passes", len(passes), len(passes))
        if ctx.calibration is not None and ctx.batches is None:
            report.notes.append("calibration was given, and no pass of this pipeline reads it")
    finally:
        run.dump.report(report)
    if run.probe is not None:
        ctx.probed = (run.probe, run.latest)
    return program, run.report


def check_order(passes: Sequence[Pass], program: Program | None = None) -> None:
    """Raises PassOrder where a pass requires what an earlier one, or the model itself if given, has taken away."""
    lost = {} if program is None else _lacking(program)
    for pass_ in passes:
        for fact in sorted(pass_.requires & lost.keys()):
            raise errors.PassOrder(pass_name=repr(pass_), reason=f"it needs {fact}, and {lost[fact]}")
        lost |= dict.fromkeys(pass_.invalidates, f"{pass_!r} before it takes them away")


def probe_tokens(passes: Sequence[Pass]) -> int:
    """How long a probe must be to show what each of ``passes`` does."""
    return max((pass_.probe_tokens for pass_ in passes), default=0)


def _lacking(program: Program) -> dict[str, str]:
    """What the model comes without -> the reason."""
    lost: dict[str, str] = {}
    if any(stored_in(node.args[0]) for node in program.nodes(DEQUANTIZE)):
        lost[FLOAT_WEIGHTS] = "the model comes without them: it is quantised already"
    if any(any(pair_bits(node)) for node in program.attention_nodes()):
        lost[FLOAT_KV] = "the model comes with rounded ones"
    return lost


@dataclass
class _Run:
    """One run of a pipeline: what is measured once and compared with after every pass."""

    passes: tuple[Pass, ...]
    ctx: Context
    dump: Dump
    report: PipelineReport
    probe: Probe | None = None
    lifted: Outputs = ()
    latest: Outputs = ()

    def begin(self, program: Program) -> None:
        self.ctx.original = program
        self.dump.stage("lift", program)
        self.ctx.watch(program)
        if self.passes and self.ctx.verify:
            with _timed(self.report.seconds, "probe"):
                self.probe = self.ctx.probe or make_probe(program, tokens=probe_tokens(self.passes))
                self.lifted = self.latest = self.probe.run(program)

    def step(self, before: Program, pass_: Pass) -> Program:
        """The Program after ``pass_``; ``before`` stays whole."""
        try:
            after, report, outputs = self._attempt(before, pass_)
        except errors.NotLossless as error:
            made = self._reproduce(before, pass_, error)
            raise dataclasses.replace(error, reproducer=made.file, caveat=made.caveat) from None
        except errors.VerificationFailed as error:
            raise self._failed(before, pass_, error) from error
        except errors.SlimError as error:
            spoilt = _left_by_pass(before, error)
            if spoilt is None:
                raise
            raise self._failed(before, pass_, spoilt) from error
        except Exception as error:  # a fault of the pass, whatever it is; KeyboardInterrupt is not one
            raise self._failed(before, pass_, error) from error
        self._keep(after, pass_, report, outputs)
        return after

    def _attempt(self, before: Program, pass_: Pass) -> tuple[Program, Report, Outputs]:
        seconds: dict[str, float] = {}
        with _timed(seconds, "run"):
            after = before.copy()
            report = pass_.run(after, self.ctx)
            if not isinstance(report, Report):
                raise TypeError(f"its run gave {report!r:.40} and no Report: end it with `return report`")
            after.clean()
        report.text, report.lossless, report.seconds = repr(pass_), pass_.lossless, seconds
        report.before, report.after = Size.of(before), Size.of(after)
        report.changes = changes(before, after)
        report.gone = gone(before, after, report.changes)
        self._check_matched(pass_, report)
        if not self.ctx.verify:
            return after, report, ()
        with _timed(seconds, "verify"):
            verify(after, repr(pass_))
        with _timed(seconds, "probe"):
            outputs = self._measure(before, after, pass_, report)
        return after, report, outputs

    def _check_matched(self, pass_: Pass, report: Report) -> None:
        if report.matched:
            return
        if self.ctx.strict:
            reasons = [f"{sites}: {reason}" for sites, reason in by_reason(report.skipped)]
            raise errors.PassMatchedNothing(pass_name=repr(pass_), tried=report.tried, reasons=reasons[:8])
        report.notes.append("it matched nothing, and changed nothing")

    def _measure(self, before: Program, after: Program, pass_: Pass, report: Report) -> Outputs:
        assert self.probe is not None
        try:
            outputs = self.probe.run(after)
        except errors.NonFiniteWeight as error:  # all weights were finite before the pass
            raise _spoilt(error) from error
        report.error = self.probe.error(self.latest, outputs)
        report.drift = self.probe.error(self.lifted, outputs)
        if pass_.lossless and report.error > tolerance(before):
            self._tell_from_rounding(before, pass_, report)
        if not math.isfinite(report.error):
            raise ArithmeticError("the output is no longer finite where it was before")
        if report.error == 0.0 and report.matched and not pass_.lossless:
            report.notes.append(f"the output did not move on the probe{_length(self.probe)}: other inputs may move it")
        return outputs

    def _tell_from_rounding(self, before: Program, pass_: Pass, report: Report) -> None:
        """Raises NotLossless where the output moved more than rounding alone can move it in this model."""
        assert self.probe is not None
        assert report.error is not None
        noise = rounding_noise(self.probe, before, self.latest)
        allowed = max(tolerance(before), _NOISES * noise)
        if not report.error <= allowed:
            raise errors.NotLossless(
                pass_name=repr(pass_), error=report.error, tolerance=allowed, reproducer="(not written yet)"
            )
        report.notes.append(f"rounding alone moves the output of this model by {noise:.1e}")

    def _keep(self, after: Program, pass_: Pass, report: Report, outputs: Outputs) -> None:
        self.latest = outputs
        self.report.passes.append(report)
        self.ctx.collected = {k: v for k, v in self.ctx.collected.items() if k in pass_.preserves}
        self.dump.stage(pass_.name, after)
        self.ctx.watch(after)
        took = ", ".join(f"{stage} {seconds:.3f} s" for stage, seconds in report.seconds.items())
        log.debug("%r: %d of %d sites; %s", pass_, len(report.matched), report.tried, took)

    def _failed(self, before: Program, pass_: Pass, error: Exception) -> errors.PassFailed:
        reason = str(error).strip().splitlines()
        told = f"{type(error).__name__}: {reason[0]}" if reason else type(error).__name__
        made = self._reproduce(before, pass_, error)
        return errors.PassFailed(pass_name=repr(pass_), reason=told, reproducer=made.file, caveat=made.caveat)

    def _reproduce(self, before: Program, pass_: Pass, error: Exception) -> Reproducer:
        return write_reproducer(before, self.passes, pass_, self.ctx, error, self.dump.folder)


def _length(probe: Probe) -> str:
    return "" if probe.real is None else f", of {probe.real.shape[1]} tokens"


def _left_by_pass(before: Program, error: errors.SlimError) -> ArithmeticError | None:
    """What to say of a pass that read a weight which it had itself made NaN or infinite."""
    if not isinstance(error, errors.NonFiniteWeight):
        return None
    if error.name in before.weights:
        try:
            before.weights[error.name]
        except errors.NonFiniteWeight:  # it came so
            return None
    return _spoilt(error)


def _spoilt(error: errors.NonFiniteWeight) -> ArithmeticError:
    return ArithmeticError(f"it left weight '{error.name}' with {error.count} {error.kind} values")


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the time of its block to ``seconds[stage]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
