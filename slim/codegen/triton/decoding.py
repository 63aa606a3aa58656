"""Greedy decoding without a word to the host: what happens between one step of a language model and the next.

Each step ends with a kernel that chooses the likeliest tokens and makes them the next step's inputs, so that a burst of
steps is a few replays of one graph, and the host reads the tokens once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch
from torch import Tensor

from slim.codegen.executables import Ends, Feedback
from slim.codegen.regions.matrices import FLOAT_FORMATS
from slim.codegen.triton import modules
from slim.codegen.triton.graphs import Replay
from slim.codegen.triton.kernel import Kernel, Pointer
from slim.codegen.triton.launching import Launch
from slim.codegen.triton.writer import DTYPES, power_of_two

if TYPE_CHECKING:
    from slim.codegen.triton.executable import BoundCall

B = sympy.Symbol("B", integer=True, positive=True)  # what the sizes of the kernel are stays open
_MOST = 64  # steps between two looks of the host

_BLOCK = 4096  # scores that a program looks at

_CHOOSE = """\
row, piece = tl.program_id(0), tl.program_id(1)
i = piece * BLOCK + tl.arange(0, BLOCK)
there = i < VOCABULARY
x = tl.load(logits + row.to(tl.int64) * VOCABULARY + i, mask=there, other=float("-inf")).to(tl.float32)
x = tl.where(x == x, x, float("inf"))
best = tl.max(x, 0)
tl.store(bests + row * PIECES + piece, best)
tl.store(places + row * PIECES + piece, tl.min(tl.where(there & (x == best), i, VOCABULARY - 1), 0))
tl.debug_barrier()
if tl.atomic_add(arrived + row, 1, sem="acq_rel") == PIECES - 1:  # the last of the row has all pieces to look at
    tl.store(arrived + row, 0)
    p = tl.arange(0, PIECES_BLOCK)
    found = tl.load(bests + row * PIECES + p, mask=p < PIECES, other=float("-inf"), cache_modifier=".cg")
    place = tl.load(places + row * PIECES + p, mask=p < PIECES, other=VOCABULARY - 1, cache_modifier=".cg")
    token = tl.min(tl.where(found == tl.max(found, 0), place, VOCABULARY - 1), 0).to(tl.int64)
    ended = tl.load(finished + row)
    token = tl.where(ended != 0, pad, token)
    step = tl.load(steps + row)
    tl.store(chosen + step * rows + row, token)
    tl.store(tokens + row, token)
    ending = tl.load(ends + tl.arange(0, ENDS)) == token
    tl.store(finished + row, ((ended != 0) | (tl.sum(ending.to(tl.int32), 0) > 0)).to(tl.int8))
    tl.store(steps + row, step + 1)
    {advance}
    if row == 0:
        tl.store(live + LENGTH, tl.load(live + LENGTH) + 1)
"""


class GreedyCall:
    """A bound step of a language model, to be repeated on the likeliest tokens."""

    def __init__(self, call: BoundCall, feedback: Feedback, ends: Ends, length: int) -> None:
        self._call = call
        self._length = length
        self._ends = ends
        self._tokens = call.inputs[feedback.tokens]
        self._positions = None if feedback.positions is None else call.inputs[feedback.positions]
        batch = self._tokens.shape[0]
        device = self._tokens.device
        self._chosen = torch.empty(_MOST, batch, dtype=torch.int64, device=device)
        self._steps = torch.zeros(batch, dtype=torch.int64, device=device)
        self._finished = ends.finished.to(torch.int8)
        self._end_tokens = _padded(ends.tokens.to(device))
        self._launch = self._choosing(call.outputs[feedback.logits])
        self._replay = Replay(self._run, call.executable.device.has_graphs)

    def __call__(self, steps: int, held: int) -> Tensor:
        """See ``GreedySteps``."""
        steps = min(steps, _MOST)
        self._steps.zero_()
        self._finished.copy_(self._ends.finished)
        self._call.live[self._length].fill_(held + 1)
        if self._positions is not None:
            self._positions += 1
        for _ in range(steps):
            self._replay()
        self._call.check()
        made = self._made(steps)
        if self._positions is not None:
            self._positions -= 1 + steps - made
        self._ends.finished.copy_(self._finished)
        return self._chosen[:made].clone()

    def _made(self, steps: int) -> int:
        """Steps up to the one at which every row had ended: those after it are not looked at."""
        if not bool(self._finished.all()):
            return steps
        ended = torch.isin(self._chosen[:steps], self._ends.tokens.to(self._chosen.device))
        was = self._ends.finished.to(ended.device)
        by_then = was | (ended.cumsum(0) > 0)
        return int(by_then.all(dim=1).int().argmax()) + 1

    def _run(self) -> None:
        self._call.run()
        self._launch()

    def _choosing(self, logits: Tensor) -> Launch:
        """The kernel that ends a step, on the memory it works on."""
        batch, vocabulary = self._tokens.shape[0], logits.shape[-1]
        kernel = choose(vocabulary, logits.dtype, self._end_tokens.numel(), self._length, self._positions is not None)
        pieces = kernel.configs[0]["PIECES"]
        new = self._tokens.new_empty
        memory: dict[str, Tensor] = {
            "logits": logits, "tokens": self._tokens, "chosen": self._chosen, "steps": self._steps,
            "finished": self._finished, "ends": self._end_tokens, "live": self._call.live,
            "bests": new(batch, pieces, dtype=torch.float32), "places": new(batch, pieces, dtype=torch.int32),
            "arrived": self._tokens.new_zeros(batch, dtype=torch.int32),
        }  # fmt: skip
        if self._positions is not None:
            memory["positions"] = self._positions
        pointers = [memory[pointer.name] for pointer in kernel.pointers]
        return Launch(modules.load(kernel), pointers, [batch, self._ends.pad], kernel.configs[0])


def choose(vocabulary: int, logits: torch.dtype, ends: int, length: int, positioned: bool) -> Kernel:
    """The kernel that chooses a token a row and makes it the next step's input.

    Args:
        ends: how many tokens end a row, a power of two.
        length: place of the number of keys among the live dimensions.
        positioned: whether the step takes positions.
    """
    types = {
        "logits": DTYPES[logits], "tokens": "i64", "chosen": "i64", "steps": "i64", "finished": "i8", "ends": "i64",
        "live": "i64", "bests": "fp32", "places": "i32", "arrived": "i32",
    }  # fmt: skip
    advance = ""
    if positioned:
        types["positions"] = "i64"
        advance = "tl.store(positions + row, tl.load(positions + row) + 1)"
    pieces = -(-vocabulary // _BLOCK)
    constants = {
        "BLOCK": _BLOCK, "VOCABULARY": vocabulary, "PIECES": pieces, "PIECES_BLOCK": power_of_two(pieces),
        "ENDS": ends, "LENGTH": length, "num_warps": 8,
    }  # fmt: skip
    title = ["the likeliest token of each row, which the next step begins with"]
    body = _CHOOSE.format(advance=advance).splitlines()
    pointers = [Pointer(name, dtype, "given") for name, dtype in types.items()]
    return Kernel("choose", title, body, pointers, {"rows": B, "pad": B}, [constants], ["rows", "PIECES"])


def _padded(ends: Tensor) -> Tensor:
    """The tokens that end a row, as many as a power of two; -1 is none."""
    padded = ends.new_full((power_of_two(max(1, ends.numel())),), -1)
    padded[: ends.numel()] = ends
    return padded


def greedy_call(call: BoundCall, feedback: Feedback, mask: Tensor | None, ends: Ends) -> GreedyCall | None:
    """None where a step has parts that PyTorch runs, or sizes that more than the mask decides."""
    executable = call.executable
    if mask is None or feedback.mask is None:
        return None
    live = executable.unit.live
    owners = {owner: name for name, owner in executable.schedule.dims.items()}
    length = owners.get((feedback.mask, 1))
    logits = executable.schedule.outputs[feedback.logits]
    if executable.schedule.foreign or logits.dtype not in FLOAT_FORMATS or length not in live:
        return None
    return GreedyCall(call, feedback, ends, live.index(length))
