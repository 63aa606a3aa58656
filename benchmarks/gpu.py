"""slim beside its peers on this machine's GPU: Llamas with random weights, in one interleaved run.

    python benchmarks/gpu.py                                             # everything: JSON, table, picture in results/
    python benchmarks/gpu.py --shapes 8b --formats int8 --batches 1,8 --prefill 0 --out $OUT/int8.json
    python benchmarks/gpu.py --shapes 8b --formats bf16,window,block_topk,vertical_slash,ring,h2o --prompt 16384 \\
        --prefill 16384 --batches 1 --out $OUT/sparse.json               # what attention gains that visits less
    python benchmarks/gpu.py --profile --shapes 8b --formats int8        # the kernels of one decode step, by time
    python benchmarks/gpu.py --join a.json b.json --out results/gpu.json # several runs as one; wants no GPU
    python benchmarks/gpu.py --dry-run --shapes tiny                     # on the CPU, to try this program

All engines live in one process and share one model in bfloat16. In every case (a decode step at a batch size, a
prompt) round 0 compiles and warms up and does not count; then all engines are timed in turns. Compare numbers of one
run only. A peer that is not at hand or fails, and what the time did not suffice for, is left out by name. The JSON
file is written anew after every measurement.

Decode is (time of N tokens - time of 1) / (N - 1) of ``generate`` for slim, host included; for PyTorch's loops, the
time of their N - 1 steps. Prefill ends when the next token is known. Shares are of what the same process measured just
before: the weights and the cache read once, over the bandwidth of a copy; the prompt's operations, over the rate of
bfloat16 cubes; both as if attention visited everything.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from benchmarks.gpu_peers import kernels, report  # noqa: E402
from benchmarks.gpu_peers.device import Ceilings, Device, Memory, ceilings, machine  # noqa: E402
from benchmarks.gpu_peers.engines import FORMATS, PEERS, USUAL, Engine, Kind, NotHere, Setup, kinds  # noqa: E402
from benchmarks.gpu_peers.models import SHAPES, build, cached_bytes, prompt, prompt_operations  # noqa: E402
from benchmarks.gpu_peers.report import DECODE, PREFILL, Case, Row  # noqa: E402
from benchmarks.peers import install  # noqa: E402


class OutOfTime(BaseException):
    """The run's seconds are spent; no ``except Exception`` on the way may take it for a failure."""


class Loaded:
    """An engine of this run, with what it holds."""

    def __init__(self, kind: Kind, setup: Setup) -> None:
        self.kind = kind
        self.memory = Memory(setup.device)
        self.engine: Engine = self.memory.watch(lambda: kind.make(setup))
        self.memory.held += self.engine.shared


class Run:
    """One call of this program: its options, and what it found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = Device("cpu" if options.dry_run else "cuda")
        self.started = datetime.now().isoformat(timespec="seconds")
        self.begin = time.perf_counter()
        self.rows: list[Row] = []
        self.left_out: dict[str, str] = {}
        self.ceilings: list[dict[str, float]] = []
        self.machine: dict[str, Any] = {}

    # -- measuring ---------------------------------------------------------------------------------------------------

    def shapes(self) -> None:
        """Measures every shape, until all is done or the seconds are spent."""
        self.machine = machine(self.device)
        try:
            with alarm(self.options.seconds):
                for shape in self.options.shapes:
                    self._shape(shape)
                    self._clear()
        except OutOfTime:
            self._note_unmeasured()

    def _shape(self, shape: str) -> None:
        say(f"\nLlama {shape}: {SHAPES[shape].parameters / 1e9:.2f}G parameters")
        setup = self._setup(shape)
        loaded = [each for kind in self._kinds() if (each := self._load(kind, shape, setup))]
        for case in self._cases():
            for each in loaded:
                each.engine.forget()
            self._clear()
            if engines := [each for each in loaded if case.batch == 1 or not each.kind.once]:
                self._case(shape, case, engines)

    def _setup(self, shape: str) -> Setup:
        options = self.options
        target = "cpu" if options.dry_run else "cuda"
        return Setup(build(SHAPES[shape], self.device), self.device, target, options.tune, options.mode)

    def _kinds(self) -> list[Kind]:
        return list(kinds(self.options.peers, self.options.formats))

    def _cases(self) -> list[Case]:
        """The most telling first: the time may not suffice for the others."""
        decodes = [Case(DECODE, batch, self.options.prompt) for batch in self.options.batches]
        length = self.options.prefill
        return decodes[:1] + [Case(PREFILL, 1, length)] * bool(length) + decodes[1:]

    def _load(self, kind: Kind, shape: str, setup: Setup) -> Loaded | None:
        """The engine, or None with the reason noted."""
        begin = time.perf_counter()
        loaded = self._attempt(f"{kind.name}, {shape}", lambda: Loaded(kind, setup))
        if loaded:
            held, peak = loaded.memory.held / 1e9, loaded.memory.peak / 1e9
            say(f"  {kind.name} is made: {time.perf_counter() - begin:.1f} s, {held:.2f} GB, {peak:.2f} on the way")
        return loaded

    def _attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """What ``call`` returns; None, with the reason noted, where it raises."""
        try:
            return call()
        except Exception as error:
            lines = str(error).strip().splitlines() or ["no message"]
            self.left_out[name] = f"{type(error).__name__}: {lines[0]}"
            if not isinstance(error, NotHere):
                traceback.print_exc(limit=-6)
            say(f"  left out: {name}: {self.left_out[name]}")
            self.write_json()
            return None

    def _case(self, shape: str, case: Case, engines: list[Loaded]) -> None:
        """All engines in turns, ``rounds`` times after one that does not count."""
        limit = ceilings(self.device)
        self.ceilings.append(asdict(limit))
        say(f"  {case}: {limit}")
        tokens = prompt(SHAPES[shape], case.batch, case.prompt, self.device)
        rows = {each.kind.name: self._row(shape, case, each, limit) for each in engines}
        for index in range(self.options.rounds + 1):
            for each in list(engines):
                name = each.kind.name
                seconds = self._attempt(f"{name}, {shape}, {case}", partial(self._turn, each, case, tokens))
                if seconds is None:
                    engines.remove(each)
                elif index:
                    self._keep(rows[name], seconds, each.memory.peak)
                else:
                    self._warm(f"{name}, {shape}, {case}")

    def _warm(self, name: str) -> None:
        """Says so; a compiled peer that PyTorch runs without CUDA graphs is slower than it should be."""
        skipped = counters["inductor"].pop("cudagraph_skips", 0)
        if skipped:
            self.left_out[f"{name}, CUDA graphs"] = (
                f"PyTorch skipped them {skipped} times; TORCH_LOGS=perf_hints says why"
            )
        say(f"    {name} is warm: {self._spent():.0f} s into the run")

    def _turn(self, loaded: Loaded, case: Case, tokens: torch.Tensor) -> float:
        """One measurement, in seconds."""
        engine = loaded.engine
        if case.kind == PREFILL:
            return float(loaded.memory.watch(lambda: engine.prefill(tokens)))
        return float(loaded.memory.watch(lambda: engine.decode(tokens, self.options.new)))

    def _row(self, shape: str, case: Case, loaded: Loaded, limit: Ceilings) -> Row:
        kind, sizes = loaded.kind, SHAPES[shape]
        cached = round(cached_bytes(sizes) * case.batch * (case.prompt + self.options.new / 2))
        return Row(
            self.started, shape, kind.peer, kind.format, case.kind, case.batch, case.prompt, loaded.engine.nbytes,
            cached, prompt_operations(sizes, case.prompt) * case.batch, limit.copy, limit.matmul,
        )  # fmt: skip

    def _keep(self, row: Row, seconds: float, peak: int) -> None:
        if not row.seconds:
            self.rows.append(row)
        row.seconds.append(seconds)
        row.peak = max(row.peak, peak)
        say(f"    {row.name:20} {1e3 * seconds:10.3f} ms {row.rate(seconds):12,.1f} tok/s {100 * row.share:4.0f} %")
        self.write_json()

    def _clear(self) -> None:
        """Frees what the last case or shape left behind, compiled code and its graphs included."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.is_cuda:
            torch.cuda.empty_cache()

    def _spent(self) -> float:
        return time.perf_counter() - self.begin

    def _note_unmeasured(self) -> None:
        """Names what this run meant to measure and did not come to."""
        measured = {(row.shape, row.name, row.case) for row in self.rows}
        for shape in self.options.shapes:
            for kind in self._kinds():
                for case in self._cases():
                    name = f"{kind.name}, {shape}, {case}"
                    known = {f"{kind.name}, {shape}", name} & set(self.left_out)
                    apart = kind.once and case.batch > 1
                    if not (apart or known or (shape, kind.name, case) in measured):
                        self.left_out[name] = f"the {self.options.seconds:.0f} seconds were spent"
        say(f"stopped after {self._spent():.0f} s")

    # -- one step, taken apart ---------------------------------------------------------------------------------------

    def profile(self) -> str:
        """Where the time of a decode step goes, for the first shape, format, peer and batch of the options."""
        self.machine = machine(self.device)
        shape, batch = self.options.shapes[0], (self.options.batches or [1])[0]
        kind = next(kinds(self.options.peers[:1], self.options.formats[:1]), None)
        if kind is None:
            sys.exit(f"{self.options.peers[0]} has no {self.options.formats[0]}")
        loaded = Loaded(kind, self._setup(shape))
        case = Case(DECODE, batch, self.options.prompt)
        tokens = prompt(SHAPES[shape], batch, case.prompt, self.device)
        floor = self._row(shape, case, loaded, ceilings(self.device)).floor
        title = f"### {kind.name}, Llama {shape}, {case}, {self.machine['device']}"
        return f"{title}\n\n{kernels.step_table(loaded.engine, self.device, tokens, floor)}"

    # -- what came of it ---------------------------------------------------------------------------------------------

    def join(self, path: Path) -> None:
        """Takes in what another run wrote."""
        data = json.loads(path.read_text())
        self.rows += report.rows_of(data)
        self.left_out |= data["left out"]
        self.ceilings += data["ceilings"]
        self.machine = data["machine"]

    def text(self) -> str:
        """Everything for a reader, in Markdown."""
        versions = ", ".join(f"{name} {text}" for name, text in self.machine["versions"].items())
        driver = f", driver {self.machine['driver']}" if "driver" in self.machine else ""
        about = f"{self.machine['device']}{driver}; {versions}; {self.started[:10]}"
        best = {name: max(each[name] for each in self.ceilings) for name in self.ceilings[0]} if self.ceilings else {}
        parts = [about, *([f"Measured: {Ceilings(**best)}"] if best else []), *report.tables(self.rows)]
        parts.append(report.goal_table(report.goals(self.rows)))
        if self.left_out:
            parts.append("\n".join(f"- left out: {name}: {reason}" for name, reason in self.left_out.items()))
        return "\n\n".join(parts)

    def data(self) -> dict[str, Any]:
        """Everything for a program."""
        options = {name: value for name, value in vars(self.options).items() if name not in ("out", "join")}
        return {
            "date": self.started, "seconds": self._spent(), "machine": self.machine, "options": options,
            "ceilings": self.ceilings, "rows": [report.as_data(row) for row in self.rows],
            "goals": [asdict(goal) | {"verdict": goal.verdict} for goal in report.goals(self.rows)],
            "left out": self.left_out,
        }  # fmt: skip

    def write_json(self) -> None:
        """Whole or not at all, whenever this process is killed."""
        path: Path = self.options.out
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.data(), indent=1) + "\n")
        part.replace(path)

    def write(self) -> None:
        """JSON, the tables beside it, and the picture where it can be drawn."""
        self.write_json()
        self.options.out.with_suffix(".md").write_text(self.text() + "\n")
        if not self.rows:
            return
        python = sys.executable if importlib.util.find_spec("matplotlib") else str(install.interpreter("picture"))
        if not Path(python).exists():
            say("no picture: matplotlib is not installed: benchmarks/cpu.py --install picture")
            return
        files = [str(self.options.out.resolve().with_suffix(end)) for end in (".json", ".png")]
        subprocess.run([python, "-m", "benchmarks.gpu_peers.picture", *files], cwd=ROOT, check=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside when ``seconds`` have passed, and again until it is heard."""

    def ring(*_: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Reads names by commas, in the order given."""

    def read(text: str) -> list[str]:
        found = text.split(",")
        if unknown := set(found) - set(known):
            raise argparse.ArgumentTypeError(
                f"no such name: {', '.join(sorted(unknown))}; there are {', '.join(known)}"
            )
        return found

    return read


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", type=_names(tuple(SHAPES)), default=["1b", "8b"], help="by commas (default: 1b,8b)")
    usual = ",".join(USUAL)
    add(
        "--formats",
        type=_names(FORMATS),
        default=list(USUAL),
        help=f"by commas, of {', '.join(FORMATS)} (default: {usual})",
    )
    add("--peers", type=_names(PEERS), default=list(PEERS), help=f"by commas, of {','.join(PEERS)} (default: all)")
    add("--batches", type=_numbers, default=[1, 8, 64], help="of decoding; '' is none (default: 1,8,64)")
    add("--prompt", type=int, default=128, help="tokens before decoding (default: %(default)s)")
    add("--new", type=int, default=128, help="tokens to write (default: %(default)s)")
    add(
        "--prefill", type=int, default=2048, help="tokens of the prompt that is timed; 0 is none (default: %(default)s)"
    )
    add("--rounds", type=int, default=3, help="that count (default: %(default)s)")
    add("--seconds", type=float, default=520.0, help="stop after these, and write what there is (default: %(default)s)")
    add("--tune", type=float, default=0.0, metavar="SECONDS", help="let slim tune for so long, in slim.compile")
    add("--mode", default="max-autotune", help="of torch.compile, also reduce-overhead (default: %(default)s)")
    add("--profile", action="store_true", help="the kernels of one decode step: first shape, format, peer and batch")
    add("--join", nargs="+", type=Path, metavar="JSON", help="measure nothing; make one report of these files")
    add("--out", type=Path, default=ROOT / "benchmarks/results/gpu.json", help="(default: %(default)s)")
    add(
        "--dry-run", action="store_true", help="on the CPU, with target 'cpu': to try this program, not for its numbers"
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    run = Run(options)
    if options.join:
        for path in options.join:
            run.join(path)
        run.write()
    elif not options.dry_run and not torch.cuda.is_available():
        say("benchmarks/gpu.py needs a CUDA GPU that PyTorch sees (torch.cuda.is_available()); --dry-run does without")
        sys.exit(2)
    elif options.profile:
        text = run.profile()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".profile.md").write_text(text + "\n")
        print(text)
        return
    else:
        run.shapes()
        run.write()
    print(run.text())


if __name__ == "__main__":
    main()
