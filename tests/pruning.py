"""What tests of Prune share: calibration, one run of the pass alone, and how far two Programs are apart."""

import torch

from slim.compiler.passes_base import Context
from slim.compiler.probe import make_probe
from slim.compiler.program import Program
from slim.compiler.report import Report
from slim.compiler.verify import verify
from slim.passes import Prune


def tokens() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 96, (2, 24), generator=generator) for _ in range(4)]


def pruned(program: Program, pass_: Prune) -> tuple[Program, Report]:
    """``program`` itself, rewritten and verified, and the report."""
    report = pass_.run(program, Context(calibration=tokens()))
    program.clean()
    verify(program, repr(pass_))
    return program, report


def error(before: Program, after: Program) -> float:
    probe = make_probe(before)
    return probe.error(probe.run(before), probe.run(after))
