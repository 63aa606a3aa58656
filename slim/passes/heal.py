"""Trains a compressed model to say again what the original said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NoReturn

from slim import errors
from slim.compiler.objective import Objective
from slim.compiler.passes_base import Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report, Skip
from slim.compiler.statistics import calibration_of
from slim.passes.healing.student import Student, teacher_of
from slim.passes.healing.train import Plan, train
from slim.passes.healing.trained import find_trained

_NO_BETTER = "nothing it learned scored better than what was there; more data or a lower learning_rate may help"


@dataclass(frozen=True)
class Heal(Pass):
    """Distils from the original model what the passes before this one lost.

    The compressed model learns to give the original's outputs on the calibration data: for a language model the
    distribution of every next token, for others the values themselves. Trained are the float weights of linears, the
    gains of norms, and biases; the scales of quantised weights, whose numbers stay. Of large models' linears a product
    of two thin matrices beside each weight is trained, and added to it at the end. Where rows or keys are rounded,
    gradients pass as if they were not.

    An eighth of the data is held out. It is scored every 25 steps, the state that scored best is kept, and training
    ends early where it stops getting better. A run of more than half a minute leaves a checkpoint in the cache, from
    which the same run, started again, goes on.

    Memory: the original beside the model, and of one batch what the backward pass needs.

    Args:
        steps: updates at most; 0 is refused.
        rank: of the products; more learns more, and wants more memory. None: weights are trained whole, or products of
            rank 16 where linears hold more than 67 million numbers. A weight that is no larger than its product is
            trained whole.
        loss: "forward" is KL(original || model), which covers all that the original thinks possible; "reverse" is
            KL(model || original), which keeps to what it thinks likely. This, temperature and mix are for language
            models; of others the outputs themselves are compared.
        temperature: what both logits are divided by first.
        mix: the share of the loss that is cross-entropy on the data's own next tokens, 0 to 1.
        learning_rate: at its highest, as a share of each weight's size (the root of its mean square); it rises for a
            twentieth of the steps, and falls like a cosine. None: a 32nd of the divergence that is to be healed (of the
            error, for other models), 0.01 at most: what has lost little is a short way from where it was.
        tokens: of a step, at least; batches are taken until there are as many.
        patience: how many scorings in a row may bring nothing before training ends.
        seed: of the order of the data and of the products' first values.

    Matrices that are trained whole take orthogonal steps, all else AdamW's; see ``slim.passes.healing.steps``.

    Sources: Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Hu et al., LoRA, 2021;
    Shazeer and Stern, Adafactor, 2018 (rates relative to a weight's size).

    Example:
        >>> slim.compile(model, passes=[Prune(0.2), Heal(200)], calibration=texts)
    """

    steps: int = 200
    rank: int | None = None
    loss: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    mix: float = 0.0
    learning_rate: float | None = None
    tokens: int = 2048
    patience: int = 4
    seed: int = 0

    def check(self) -> None:
        """Refuses options that train nothing."""
        for option in ("steps", "rank", "tokens", "patience"):
            given = getattr(self, option)
            if given is not None and given < 1:
                self._refuse(option, "it is one at the least")
        for option in ("temperature", "learning_rate"):
            given = getattr(self, option)
            if given is not None and not given > 0:
                self._refuse(option, "it is greater than zero")
        if not 0 <= self.mix <= 1:
            self._refuse("mix", f"it is a share, from 0 to 1, not {self.mix}")

    def _refuse(self, option: str, reason: str) -> NoReturn:
        raise errors.BadPassOption(pass_name=self.name, option=option, reason=reason)

    def _check_output(self, program: Program) -> None:
        """Refuses what says how distributions are compared where the model gives none."""
        if program.facts.kind == "causal_lm":
            return
        for option, default in (("loss", "forward"), ("temperature", 1.0), ("mix", 0.0)):
            if getattr(self, option) != default:
                self._refuse(option, "it is for language models; of others the values are compared as they are")

    def run(self, program: Program, ctx: Context) -> Report:
        """Changes float weights, gains, biases and scales; no shape, no node."""
        report = Report()
        self._check_output(program)
        calibration = calibration_of(program, ctx, repr(self), most=self.steps * self.tokens)
        trained, report.skipped = find_trained(program, self.rank, self.seed)
        objective = Objective.of(program, self.loss, self.temperature, self.mix)
        plan = Plan(repr(self), self.steps, self.learning_rate, self.tokens, self.patience, self.seed)
        outcome = train(Student(program, trained), teacher_of(ctx, program), objective, calibration.batches, plan, ctx)
        for each in trained:
            if outcome.changed:
                program.weights[each.name] = each.merged()
                report.matched.append(each.name)
            else:
                report.skipped.append(Skip(each.name, _NO_BETTER))
        report.notes += [*calibration.notes, *outcome.notes]
        return report
