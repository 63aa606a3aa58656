"""Which transformers architectures slim compiles exactly: every model of the zoo beside its own transformers self.

    python benchmarks/coverage.py                  # all of them, into docs/coverage.md
    python benchmarks/coverage.py llama gpt2 bert  # these alone, to the screen
    python benchmarks/coverage.py --cache runs.jsonl --jobs 2

Claimed of a causal language model, on a left-padded batch of three (of an encoder, right-padded: the first three):

1. its float32 outputs are the model's own within 1e-4 of their largest value, at real tokens;
2. there is exactly one attention node for each attention that the model's own code computes;
3. the printed IR, run as Python, and read back and printed again, is the same program;
4. 32 greedy tokens are those of transformers' ``generate``;
5. decoding token by token over slim's KV cache gives the logits of the whole sequence at once, within 1e-4.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import inspect
import itertools
import json
import multiprocessing
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import zoo  # noqa: E402
from slim import errors  # noqa: E402
from slim.compiler.lift import lift  # noqa: E402
from slim.compiler.program import Program  # noqa: E402
from slim.compiler.text import parse  # noqa: E402
from slim.runtime.compiled import CompiledModel  # noqa: E402

TOLERANCE = 1e-4
LENGTH, PADDED, NEW = 23, (0, 5, 11), 32
NO_SOFTMAX = ("Lightning", "Rwkv")
"""What modules that are called attention, and are recurrences, have in their names."""
TWO_IN_ONE = ("DiffLlama",)
"""Modules that compute two attentions, and subtract one from the other."""


@dataclass
class Result:
    """What was found of one model; ``failures`` is empty where every claim holds."""

    name: str
    kind: str
    architecture: str = ""
    error: float | None = None
    greedy: bool | None = None
    cached: float | None = None
    attention: int | None = None
    expected: int = 0
    rope: int = 0
    norms: int = 0
    linears: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def claim(self, what: str, check: Callable[[], str | None]) -> None:
        """Runs ``check``; what it returns or raises is why the claim fails."""
        try:
            reason = check()
        except Exception as error:  # one model's trouble is a line of the table, not the end of the table
            reason = _first_line(error)
        if reason:
            self.failures.append(f"{what}: {reason}")


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    whose = "" if isinstance(error, errors.SlimError) else " (not an error of slim's own)"
    return f"{type(error).__name__}{whose}: {line}"


# -- one model ---------------------------------------------------------------------------------------------------------


def measure(name: str) -> Result:
    """Checks every claim about the zoo's ``name``."""
    began = time.perf_counter()
    encoder = name in zoo.ENCODERS
    result = Result(name, "encoder" if encoder else "causal")
    result.claim("model", lambda: _measure(result, zoo.build_encoder(name) if encoder else zoo.build(name), encoder))
    result.seconds = time.perf_counter() - began
    return result


def _measure(result: Result, model: Any, encoder: bool) -> None:
    result.architecture = type(model).__name__
    batch = _batch(model, right=encoder)
    own, result.expected = _own(model, batch)
    programs: list[Program] = []
    result.claim("lift", lambda: programs.append(lift(model)))
    if not programs:
        return
    program = programs[0]
    _count(result, program)
    result.claim("attention", lambda: _attention(result))
    result.claim("text", lambda: _text(program, batch))
    compiled = CompiledModel(program, "eager")
    result.claim("outputs", lambda: _outputs(result, compiled, own, batch))
    if not encoder:
        result.claim("greedy", lambda: _greedy(result, model, compiled, batch))
        result.claim("cache", lambda: _cache(result, compiled, batch))


def _batch(model: Any, right: bool) -> dict[str, Tensor]:
    """Three rows of random tokens, two of them padded."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, config.vocab_size, (len(PADDED), LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate(PADDED):
        mask[row, LENGTH - padding if right else 0 : LENGTH if right else padding] = 0
    tokens = torch.where(mask.bool(), tokens, config.pad_token_id or 0)
    batch = {"input_ids": tokens, "attention_mask": mask}
    return batch if right else {**batch, "position_ids": _positions(mask)}


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def _taken(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What of the batch the model's forward takes."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in batch.items() if name in known}


@torch.no_grad()
def _own(model: Any, batch: dict[str, Tensor]) -> tuple[Any, int]:
    """The model's own outputs, and how many softmax attentions it computed on the way."""
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
        for module in model.modules()
        if _is_attention(module) and not any(_is_attention(child) for child in module.modules() if child is not module)
    ]
    own = model(**_taken(model, {**batch, "use_cache": False}))
    for hook in hooks:
        hook.remove()
    return own, sum(2 if name.startswith(TWO_IN_ONE) else 1 for name in calls)


def _is_attention(module: Any) -> bool:
    name = type(module).__name__
    return bool(re.search(r"Attention$|SdpaAttention$|MLA$", name)) and not any(part in name for part in NO_SOFTMAX)


def _count(result: Result, program: Program) -> None:
    slim, aten = torch.ops.slim, torch.ops.aten
    result.attention = len(program.attention_nodes())
    result.rope = len(list(program.nodes(slim.rope.default)))
    result.norms = len(list(program.nodes(slim.rms_norm.default, slim.layer_norm.default)))
    result.linears = len(list(program.nodes(aten.linear.default, slim.expert_linear.default)))


# -- the claims --------------------------------------------------------------------------------------------------------


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def _attention(result: Result) -> str | None:
    same = result.attention == result.expected
    return None if same else f"{result.attention} nodes for {result.expected} attentions"


def _text(program: Program, batch: dict[str, Tensor]) -> str | None:
    text = str(program)
    if str(parse(text, program.weights, program.facts)) != text:
        return "the text does not read back as itself"
    scope: dict[str, Any] = {}
    exec(compile(text, "<ir>", "exec"), scope)
    inputs = [_input(batch, value.name) for value in program.inputs]
    with torch.no_grad():
        executed = scope["forward"](program.weights, *inputs)[0]
    return None if torch.equal(executed, program.run(*inputs)[0]) else "the text computes something else"


def _input(batch: dict[str, Tensor], name: str) -> Tensor:
    return torch.zeros_like(batch["input_ids"]) if name == "token_type_ids" else batch[name]


def _outputs(result: Result, compiled: CompiledModel, own: Any, batch: dict[str, Tensor]) -> str | None:
    found, real = (
        compiled(**batch) if result.kind == "causal" else _encoded(compiled, batch),
        batch["attention_mask"].bool(),
    )
    result.error = 0.0
    for name in [n for n in ("logits", "last_hidden_state", "pooler_output") if getattr(own, n, None) is not None]:
        a, b = found[name], own[name]
        result.error = max(result.error, _relative(a[real], b[real]) if a.dim() == 3 else _relative(a, b))
    return None if result.error <= TOLERANCE else f"they differ by {result.error:.1e}"


def _encoded(compiled: CompiledModel, batch: dict[str, Tensor]) -> Any:
    names = {value.name for value in compiled.program.inputs}
    return compiled(**{name: value for name, value in batch.items() if name in names})


def _greedy(result: Result, model: Any, compiled: CompiledModel, batch: dict[str, Tensor]) -> str | None:
    prompt: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options: dict[str, Any] = dict(max_new_tokens=NEW, do_sample=False)
    found = compiled.generate(**prompt, **options)
    try:
        wanted, reference = model.generate(**prompt, **options), None
    except Exception as error:  # transformers' own trouble, which says nothing about slim
        wanted, reference = None, _first_line(error)
    result.greedy = wanted is not None and torch.equal(found, wanted)
    if result.greedy:
        return None
    return _disagreement(result, model, found, wanted, prompt | options, reference)


def _disagreement(
    result: Result, model: Any, found: Tensor, wanted: Tensor | None, call: dict[str, Any], raised: str | None
) -> str | None:
    """Why the tokens differ; a note instead where transformers contradicts itself and slim agrees with one side."""
    what = f"transformers' generate raises {raised}" if wanted is None else _first_difference(found, wanted)
    plain = model.generate(**call, use_cache=False)
    if wanted is not None and torch.equal(plain, wanted):
        return what
    if torch.equal(found, plain):
        result.notes.append(f"greedy: as transformers without its cache; with it, {what}")
        result.greedy = True
        return None
    return f"{what}; without its cache transformers gives a third answer, {_first_difference(found, plain)}"


def _first_difference(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape:
        return f"{list(found.shape)} tokens, not {list(wanted.shape)}"
    step = int((found != wanted).any(0).nonzero()[0]) - LENGTH
    rows = (found != wanted).any(1).nonzero().flatten().tolist()
    return f"differs from new token {step} on, in rows {rows}"


@torch.no_grad()
def _cache(result: Result, compiled: CompiledModel, batch: dict[str, Tensor]) -> str | None:
    """Prefill, a chunk of five, then one token at a time, beside the whole at once."""
    rows = len(PADDED)
    more = torch.randint(3, compiled.vocabulary or 2, (rows, NEW), generator=torch.Generator().manual_seed(8))
    tokens = torch.cat([batch["input_ids"], more], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], 1)
    whole = compiled(tokens, attention_mask=mask, position_ids=_positions(mask)).logits
    parts, cache = [], compiled.new_cache(rows)
    for start, stop in _chunks():
        step = compiled(
            tokens[:, start:stop], attention_mask=mask[:, :stop], position_ids=_positions(mask)[:, start:stop],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        parts.append(step.logits)
    real = mask.bool()
    result.cached = _relative(torch.cat(parts, 1)[real], whole[real])
    return None if result.cached <= TOLERANCE else f"cached logits differ from the whole's by {result.cached:.1e}"


def _chunks() -> Iterator[tuple[int, int]]:
    edges = [0, LENGTH, LENGTH + 5, *range(LENGTH + 6, LENGTH + NEW + 1)]
    return itertools.pairwise(edges)


# -- all models, a process each ----------------------------------------------------------------------------------------


def _child(name: str, connection: Any) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    connection.send(dataclasses.asdict(measure(name)))


def measure_all(names: Sequence[str], jobs: int, timeout: float) -> Iterator[Result]:
    """One result a name, as they come; a model that takes longer than ``timeout`` seconds fails for that."""
    context = multiprocessing.get_context("fork")  # so that torch and transformers are imported once
    waiting = list(names)
    running: dict[str, tuple[ForkProcess, Connection, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, theirs), daemon=True)
            process.start()
            theirs.close()
            running[name] = (process, ours, time.perf_counter())
        for name, (process, ours, began) in list(running.items()):
            late = time.perf_counter() - began > timeout
            if ours.poll(0.05) or late or not process.is_alive():
                yield _received(name, ours, began, timeout)
                process.kill()
                process.join()
                del running[name]


def _received(name: str, connection: Any, began: float, timeout: float) -> Result:
    seconds = time.perf_counter() - began
    try:
        if connection.poll(0):
            return Result(**connection.recv())
    except EOFError:
        pass
    reason = f"not done after {timeout:.0f} s" if seconds > timeout else "the process died (out of memory?)"
    return Result(name, "encoder" if name in zoo.ENCODERS else "causal", seconds=seconds, failures=[reason])


def fingerprint() -> str:
    """Of everything a result depends on: it tells which lines of a cache are still true."""
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    for file in [*sorted((ROOT / "slim").rglob("*.py")), ROOT / "benchmarks/zoo.py", Path(__file__)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def cached(file: Path | None, key: str, stale: bool) -> dict[str, Result]:
    """Results of earlier runs, of this very slim unless ``stale`` are wanted too."""
    if file is None or not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["result"]["name"]: Result(**line["result"]) for line in lines if stale or line["key"] == key}


# -- the page ----------------------------------------------------------------------------------------------------------


def page(results: Iterable[Result]) -> str:
    """The Markdown of docs/coverage.md."""
    results = list(results)
    causal = [r for r in results if r.kind == "causal"]
    encoders = [r for r in results if r.kind == "encoder"]
    return "\n".join([
        "# Coverage", "",
        _summary(causal, encoders), "",
        _claims(), "",
        "## Causal language models", "", *_table(causal), "",
        "## Encoders", "", *_table(encoders), "",
        "## What fails, and the reason slim gives", "", *_failures(results), "",
        "## Remarks", "", *_remarks(results), "",
    ])  # fmt: skip


def _summary(causal: list[Result], encoders: list[Result]) -> str:
    def good(results: list[Result]) -> int:
        return sum(not r.failures for r in results)

    families = {zoo.ZOO[r.name].model_type for r in causal if not r.failures}
    return (
        f"**{good(causal)} of {len(causal)}** causal language models ({len(families)} architectures and variants) "
        f"and **{good(encoders)} of {len(encoders)}** encoders pass every check below. "
        f"transformers {transformers.__version__}, torch {torch.__version__}, {platform.machine()}, "
        f"{datetime.date.today().isoformat()}; written by `benchmarks/coverage.py`."
    )


def _claims() -> str:
    return f"""\
Each is a small random model of `benchmarks/zoo.py`, in float32, on a batch of three padded to {LENGTH} tokens
(on the left; encoders on the right).

- **error**: largest difference from the model's own outputs at real tokens, relative to the largest; {TOLERANCE:.0e}
  allowed.
- **greedy**: {NEW} new tokens are those of transformers' `generate`.
- **cached**: largest difference of logits decoded over slim's KV cache (a prompt, a chunk of five, then one by one)
  from those of the whole sequence at once; {TOLERANCE:.0e} allowed.
- **attention**: attention nodes in the IR / attentions the model computes.
- **rope, norms, linears**: nodes that rotary embeddings, norms and matrix products with a weight were raised to.
- Every printed IR was run as Python, and read back and printed again; both gave the same program.
- **seconds**: building, lifting and all checks together, on one core of a busy machine."""


_HEAD = ("model", "architecture", "error", "greedy", "cached", "attention", "rope", "norms", "linears", "seconds", "")


def _table(results: list[Result]) -> list[str]:
    rows = [_HEAD, tuple(":--" if i < 2 else "--:" for i in range(len(_HEAD))), *map(_row, results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]


def _row(r: Result) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "-" if value is None else "0" if value == 0 else f"{value:.0e}"

    greedy = "-" if r.greedy is None else "same" if r.greedy else "differs"
    nodes = "-" if r.attention is None else f"{r.attention}/{r.expected}"
    counts = (str(r.rope), str(r.norms), str(r.linears)) if r.attention is not None else ("-",) * 3
    verdict = "fails" if r.failures else "ok"
    return (
        r.name,
        r.architecture,
        number(r.error),
        greedy,
        number(r.cached),
        nodes,
        *counts,
        f"{r.seconds:.0f}",
        verdict,
    )


def _failures(results: list[Result]) -> list[str]:
    lines = [f"- **{r.name}** ({_note(r)}): {'; '.join(r.failures)}" for r in results if r.failures]
    return lines or ["Nothing."]


def _note(result: Result) -> str:
    return {**zoo.ZOO, **zoo.ENCODERS}[result.name].note or result.architecture


def _remarks(results: list[Result]) -> list[str]:
    lines = [f"- **{r.name}**: {'; '.join(r.notes)}" for r in results if r.notes]
    return lines or ["None."]


# -- the command -------------------------------------------------------------------------------------------------------


def main() -> int:
    """Runs what the command line asks for; the exit status says whether every model passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models of the zoo (default: all)")
    parser.add_argument("--list", action="store_true", help="print their names")
    parser.add_argument("--out", type=Path, help="write the page here (default: docs/coverage.md, for a run of all)")
    parser.add_argument("--cache", type=Path, help="a file of JSON lines: results are added, and not measured twice")
    parser.add_argument("--stale", action="store_true", help="take cached results of an older slim too")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one model (default 120)")
    options = parser.parse_args()
    every = [*zoo.names(), *zoo.encoder_names()]
    if options.list:
        print("\n".join(every))
        return 0
    unknown = sorted(set(options.names) - set(every))
    if unknown:
        parser.error(f"the zoo has no {', '.join(unknown)}; --list says what it has")
    names = options.names or every
    results = _run(names, options)
    out = options.out or (None if options.names else ROOT / "docs" / "coverage.md")
    if out is not None:
        out.write_text(page(results[name] for name in names))
    return int(any(r.failures for r in results.values()))


def _run(names: list[str], options: argparse.Namespace) -> dict[str, Result]:
    key = fingerprint()
    results = {name: r for name, r in cached(options.cache, key, options.stale).items() if name in names}
    missing = [name for name in names if name not in results]
    for result in measure_all(missing, options.jobs, options.timeout):
        results[result.name] = result
        if options.cache is not None:
            with options.cache.open("a") as file:
                file.write(json.dumps({"key": key, "result": dataclasses.asdict(result)}) + "\n")
        said = "; ".join([*result.failures, *result.notes]) or "ok"
        print(f"[{len(results)}/{len(names)}] {result.name} ({result.seconds:.0f} s): {said}", flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
