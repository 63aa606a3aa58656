"""A pass of your own: numbers of linears that are next to nothing become nothing."""

from dataclasses import dataclass

import slim
from slim import errors
from slim.compiler.passes_base import Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report, Skip
from slim.compiler.uses import LINEAR


@dataclass(frozen=True)
class Sparsify(Pass):
    """Zeroes the smallest numbers of every linear's weight; shapes stay as they are.

    Args:
        share: of the numbers of each weight, between 0 and 1.
    """

    share: float = 0.25

    def check(self) -> None:
        """Refuses shares that leave nothing, or everything."""
        if not 0.0 < self.share < 1.0:
            raise errors.BadPassOption(pass_name=self.name, option="share", reason="it lies between 0 and 1")

    def run(self, program: Program, ctx: Context) -> Report:
        """Changes weights alone."""
        report = Report()
        for name in dict.fromkeys(program.weight_of(node.args[1]) for node in program.nodes(LINEAR)):
            if name is None:  # a weight that is computed: quantised, for instance
                report.skipped.append(Skip("a linear", "its weight is computed, and not held"))
                continue
            weight = program.weights[name]
            least = weight.abs().flatten().kthvalue(max(1, int(self.share * weight.numel()))).values
            program.weights[name] = weight.masked_fill(weight.abs() <= least, 0.0)
            report.matched.append(name)
        return report


if __name__ == "__main__":
    compiled = slim.compile("examples/demo_model", passes=[Sparsify(0.1), "fold_norms", 'quantize("int8")'])
    print(compiled.report)
