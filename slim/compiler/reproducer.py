"""Reproducers: one Python file a failure that runs the failing pass again, on random weights of the same shapes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import textwrap
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim.compiler.dump import cache_dir
from slim.compiler.facts_json import encode_facts
from slim.compiler.origin import Origin, origin_of
from slim.compiler.passes_base import Context, Pass
from slim.compiler.pipeline_text import write_pipeline
from slim.compiler.program import Program

_LITERAL = 4096  # numbers of a weight that is written out: indices, tables of frequencies

_WIDTH = 118

_TEMPLATE = '''\
"""{title}

Run it with the Python that slim is installed in: the pass runs again on the IR as it was before it, with random
weights of the same shapes. It says whether it fails again, and ends with 1 if so, else with 0: then the fault hangs
on the numbers of the weights, or of the calibration data. It ends with 2 where the pass cannot be made.
{remark}
The pipeline was: {pipeline}
slim.compiler.text.parse reads PROGRAM; nothing in it is executed.
"""

from slim.inspection.reproduce import reproduce

PASS = {pass_}

# What defines the pass; None where PASS says what it is imported from.
SOURCE = {source}

OPTIONS = {options}

FACTS = {facts}

WEIGHTS = {weights}

PROGRAM = {program}

if __name__ == "__main__":
    raise SystemExit(reproduce(PROGRAM, WEIGHTS, FACTS, PASS, SOURCE, OPTIONS))

{trace}
'''


@dataclass(frozen=True)
class Reproducer:
    """What was written.

    Attributes:
        file: its path, or why there is none: a reproducer that cannot be written must not hide the failure it is for.
        caveat: why it cannot run as it is, to be read behind the path; empty where it can.
    """

    file: str
    caveat: str = ""


def write_reproducer(
    program: Program,
    passes: Sequence[Pass],
    failed: Pass,
    ctx: Context,
    error: BaseException,
    folder: Path | None,
) -> Reproducer:
    """A file that sees ``failed`` fail again, without the weights of the model.

    Args:
        program: the Program as it was before the pass.
        passes: the whole pipeline.
        folder: where dumps go; the cache takes the reproducer where there is none.
    """
    trace = "".join(traceback.format_exception(error))
    origin = origin_of(type(failed))
    try:
        text = _text(program, passes, failed, ctx, error, trace, origin)
        mark = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{failed.name}-{mark}.py"
        file = (folder or cache_dir()) / "reproducers" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except Exception as reason:  # a full disk, or a Program too broken to print
        return Reproducer(f"(none: {reason})")
    return Reproducer(str(file), f" (it cannot run as it is: {origin.missing})" if origin.missing else "")


def _text(
    program: Program,
    passes: Sequence[Pass],
    failed: Pass,
    ctx: Context,
    error: BaseException,
    trace: str,
    origin: Origin,
) -> str:
    kind = type(failed)
    place = f"pass {list(passes).index(failed) + 1} of {len(passes)}"
    options = {field.name: getattr(failed, field.name) for field in dataclasses.fields(failed)}
    # as text of Python: the pass, and what the run was given beside the Program
    made = {
        "module": origin.module,
        "name": kind.__qualname__.rpartition("<locals>.")[2],
        "options": options,
        "paths": list(origin.paths),
    }
    given = {"strict": ctx.strict, "verify": ctx.verify, "calibrated": ctx.calibration is not None}
    return _TEMPLATE.format(
        title=_plain(f"slim: {failed!r}, {place}, raised {type(error).__name__}."),
        pipeline=_plain(write_pipeline(passes)),
        remark=_plain(_remark(origin)),
        pass_=repr(made),
        source="None" if origin.source is None else _quoted(origin.source),
        options=repr({**given, "raised": type(error).__name__}),
        facts=_quoted(json.dumps(encode_facts(dataclasses.replace(program.facts, source=None)))),
        weights=_quoted("\n".join(_weights(program))),
        program=_quoted(str(program)),
        trace="\n".join(f"# {line}" for line in trace.splitlines()),
    )


def _remark(origin: Origin) -> str:
    """What to know before it is run."""
    if origin.missing:
        told = f"It cannot run as it is: {origin.missing}. Put the class and its imports into SOURCE."
    elif origin.paths:
        told = f"The pass imports modules from {', '.join(origin.paths)}: it runs where those are."
    else:
        return ""
    return "\n" + textwrap.fill(told, _WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def _weights(program: Program) -> Iterator[str]:
    """A line of JSON a weight: name, type, shape, and its numbers where they are few and no parameters."""
    weights = program.weights
    for name in weights:
        few = weights.numel(name) <= _LITERAL
        exact = few and (name in program.facts.constants or not weights.dtype(name).is_floating_point)
        values: Any = weights[name].tolist() if exact else None
        yield json.dumps([name, str(weights.dtype(name)), list(weights.shape(name)), values])


def _plain(text: str) -> str:
    """Without what would end, or escape in, a docstring."""
    return text.replace("\\", "/").replace('"""', "'''")


def _quoted(text: str) -> str:
    """A literal of Python that people can read, over several lines."""
    return repr(text) if "'''" in text or text.endswith(("\\", "'")) else f"r'''{text}'''"
