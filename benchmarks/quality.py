"""Quality of quantised models: slim beside llm-compressor and torchao, on the same model, calibration and text.

    python -m benchmarks.quality --install        # the peers' environments, once
    python -m benchmarks.quality                  # every model and row; results/quality.json and .md
    python -m benchmarks.quality --models demo --only 'int4*' --only 'float*'

Each row says how many nats a held-out token costs, how many more than in floating point, and how many bits a quantised
weight takes on disk, scales and zero points included. The head stays in floating point everywhere, as the peers leave
it. Rows are measured one after another, and what was measured is kept: a run with ``--only`` or one that was cut off
adds to the file.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

import slim
from benchmarks.kept import read_kept, write_kept
from benchmarks.peers import install
from benchmarks.quality_peers import report
from benchmarks.quality_peers.cases import CASES, Case
from benchmarks.quality_peers.rows import AO, COMPRESSOR, ROWS, SLIM, Row
from slim.compiler.lift import lift_path
from slim.compiler.program import Program
from slim.passes import parse_pipeline
from slim.runtime.perplexity import score

ROOT = Path(__file__).resolve().parents[1]
PEERS = {COMPRESSOR: ("llmcompressor", "compressor"), AO: ("pytorch", "ao")}  # engine -> environment, file
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if options.install:
        for environment, _ in PEERS.values():
            install.install(environment)
        return
    rows = [row for row in ROWS if not options.only or any(fnmatchcase(row.key, text) for text in options.only)]
    with tempfile.TemporaryDirectory(prefix="slim-quality-") as scratch:
        for name in options.models:
            case = CASES[name]()
            for row, found in _measured(case, rows, Path(scratch), options.threads):
                print(report.line(name, row, found), flush=True)
                _keep(name, row, found, options.output)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="make the peers' environments, and do nothing else")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", action="append", help="rows to measure, by pattern of 'table | engine | name'")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def _keep(model: str, row: Row, found: dict[str, Any], output: Path) -> None:
    """Adds a row to what the file holds, and writes the tables anew."""
    results = read_kept(output)
    results.setdefault(model, {})[row.key] = found
    write_kept(output, results, report.tables(results))


def _measured(case: Case, rows: list[Row], scratch: Path, threads: int) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Each row and what was found, or the error that kept it from being found."""
    data = scratch / f"{case.name}.json"
    case.write(data)
    for engine in (SLIM, *PEERS):
        chosen = [row for row in rows if row.engine == engine]
        if not chosen:
            continue
        with _engine(engine, case, data, threads) as measure:
            for row in chosen:
                start = time.perf_counter()
                found = measure(row, _planted(case, row.planted, scratch))
                yield row, {**found, "seconds": round(time.perf_counter() - start, 1)}


def _planted(case: Case, factor: float, scratch: Path) -> Path:
    """The model with outliers at its norms' outputs, in a directory that all engines read."""
    if not factor:
        return case.model
    directory = scratch / f"{case.name}-{factor:g}"
    if not directory.exists():
        from benchmarks.outliers import PlantOutliers

        slim.compile(case.model, passes=[PlantOutliers(factor)], target="eager").export(directory)
    return directory


@contextmanager
def _engine(engine: str, case: Case, data: Path, threads: int) -> Iterator[Any]:
    if engine == SLIM:
        yield lambda row, model: _slim(case, row, model)
        return
    environment, file = PEERS[engine]
    python = install.interpreter(environment)
    if not python.exists():
        yield lambda row, model: {"error": f"{engine} is not installed (--install)"}
        return
    with _worker(python, file, data, threads) as worker:
        yield lambda row, model: _ask(worker, case, row, model)


# -- slim --------------------------------------------------------------------------------------------------------------


def _slim(case: Case, row: Row, model: Path) -> dict[str, Any]:
    text = row.recipe.replace("{odd}", repr(case.odd))
    try:
        passes = parse_pipeline(text) if text else []
        before = _lifted(model)
        compiled = slim.compile(model, passes, calibration=case.tensors(), target="eager", verify=False)
    except slim.errors.SlimError as error:
        return {"error": str(error).partition("\n")[0]}
    found = score(compiled, case.passages)
    return {
        "nats": found.nats, "tokens": found.tokens, "bits": bits(before, compiled.program),
        "versions": {"slim": slim.__version__}, "pipeline": text,
    }  # fmt: skip


@functools.cache
def _lifted(model: Path) -> Program:
    return lift_path(model)


def bits(before: Program, after: Program) -> float | None:
    """Bits of a weight that ``after`` holds otherwise than ``before``, with all that was added; None without any."""
    old, new = before.weights, after.weights
    same = {
        name
        for name in old
        if name in new and new.dtype(name) == old.dtype(name) and new.shape(name) == old.shape(name)
    }
    numbers = sum(old.numel(name) for name in old if name not in same)
    held = sum(new.nbytes(name) for name in new if name not in same)
    return 8 * held / numbers if numbers else None


# -- peers -------------------------------------------------------------------------------------------------------------


@contextmanager
def _worker(python: Path, file: str, data: Path, threads: int) -> Iterator[subprocess.Popen[str]]:
    """A peer in its own environment, with slim's sources to score by; what it prints goes to a log beside the data."""
    kept = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    command = [str(python), "-m", "benchmarks.quality_peers.worker", file, str(data), str(threads)]
    with data.with_suffix(f".{file}.log").open("w") as log:
        worker = subprocess.Popen(
            command, env=kept, cwd=data.parent, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log,
        )  # fmt: skip
        try:
            yield worker
        finally:
            worker.kill()
            worker.wait()


def _ask(worker: subprocess.Popen[str], case: Case, row: Row, model: Path) -> dict[str, Any]:
    assert worker.stdin
    assert worker.stdout
    try:
        worker.stdin.write(json.dumps({"model": str(model), "odd": case.odd, "recipe": row.recipe}) + "\n")
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    return json.loads(line) if line else {"error": "the peer's process ended"}


if __name__ == "__main__":
    main()
