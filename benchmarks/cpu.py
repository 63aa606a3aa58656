"""slim beside its peers on this machine's CPU: Llamas with random weights, in one interleaved run.

    python benchmarks/cpu.py --install                        # the peers' environments, into benchmarks/.peers
    python benchmarks/cpu.py                                  # everything: table, JSON and picture in results/
    python benchmarks/cpu.py --shapes 135m --engines slim llama.cpp --rounds 3

Each engine runs in a process and an environment of its own, and is stopped (SIGSTOP) while another is measured, so that
no idle thread pool is in the way. Every round measures the machine's read bandwidth, then every engine in turn; round 0
warms up and does not count. Compare numbers of one run only. A peer that is not installed, does not fit into memory or
fails is left out by name. Models and what the peers make of them are kept in SLIM_BENCH_CACHE (default
~/.cache/slim-bench; 15 GB for all three shapes). The picture wants matplotlib, in the environment ``picture``.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.kept import write_kept  # noqa: E402
from benchmarks.peers import install, report  # noqa: E402
from benchmarks.peers.process import Failed, Peer, Worker, closing, convert, python_of  # noqa: E402
from benchmarks.peers.protocol import Setup  # noqa: E402
from benchmarks.peers.random_llama import SHAPES, Shape, ensure  # noqa: E402
from benchmarks.peers.report import Row  # noqa: E402

# What takes the most memory comes last: it is what a small machine leaves out.
PEERS = (
    Peer("slim int8", "ours", "int8", None, 1.5),
    Peer("slim int4", "ours", "int4", None, 1.0),
    Peer("slim W8A8", "ours", "w8a8", None, 1.5),
    Peer("slim int4 with zero points", "ours", "int4z", None, 1.0),
    Peer("slim int3", "ours", "int3", None, 0.9),
    Peer("slim nf4", "ours", "nf4", None, 1.0),
    Peer("slim fp8", "ours", "fp8", None, 1.5),
    Peer("slim bf16", "ours", "bf16", None, 0.3, maps=True),
    Peer("llama.cpp q8_0", "llama", "q8_0", "llama_cpp", 1.1, converts=True),
    Peer("llama.cpp q4_0", "llama", "q4_0", "llama_cpp", 0.7, converts=True),
    Peer("CTranslate2 int8", "ct2", "int8", "ctranslate2", 1.1, converts=True),
    Peer("ORT-genai int8", "genai", "int8", "ort_genai", 1.8, converts=True),
    Peer("ORT-genai int4", "genai", "int4", "ort_genai", 1.4, converts=True),
    Peer("torchao int8", "pytorch", "torchao-int8", "pytorch", 1.5),
    Peer("torch.compile bf16", "pytorch", "compile-bf16", "pytorch", 0.7, maps=True),
    Peer("transformers bf16", "pytorch", "eager-bf16", "pytorch", 0.7, maps=True),
    Peer("slim f32", "ours", "f32", None, 4.1),
    Peer("torch.compile f32", "pytorch", "compile-f32", "pytorch", 4.1),
    Peer("transformers f32", "pytorch", "eager-f32", "pytorch", 4.1),
)
CASES = ((128, 1), (128, 8), (2048, 1))  # prompt, batch; the first for all, the others for slim's integers
EXTRA = ("slim int8", "slim int4")
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimd",
         "asimddp", "i8mm", "sve")  # fmt: skip
SPARE = 1.5e9  # bytes that stay free: the bandwidth's array, and room for what engines allocate while they run


class Run:
    """One call of this program: its options, and what it found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cache = Path(os.environ.get("SLIM_BENCH_CACHE", Path.home() / ".cache/slim-bench"))
        self.cache.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self.left_out: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.bandwidth: dict[str, dict[str, Any]] = {}

    def shape(self, name: str) -> None:
        """Measures all engines on one shape; none of them outlives it."""
        shape = SHAPES[name]
        say(f"\n{name}: {shape.parameters / 1e6:.0f}M parameters, {shape.multiplied / 1e6:.0f}M read for a token")
        ensure(shape, self.cache / name / "model")
        peers = [peer for peer in PEERS if self._wanted(peer)]
        ready = [peer for peer in peers if self._prepare(peer, name)]
        if self.options.convert_only:
            return
        workers: list[Worker] = []
        with closing(workers):
            for peer in ready:
                self._start(peer, name, workers)
            self._rounds(name, workers)

    def _wanted(self, peer: Peer) -> bool:
        chosen = self.options.engines
        return not chosen or any(peer.name == name or peer.name.split()[0] == name for name in chosen)

    def _setup(self, peer: Peer, shape: str) -> Setup:
        folder = self.cache / shape
        converted = folder / f"{peer.engine}-{peer.precision}"
        precision = peer.precision if peer.environment else f"{peer.precision}@{self.options.target}"
        longest = max(prompt for prompt, _ in CASES) if peer.name in EXTRA else CASES[0][0]
        return Setup(folder / "model", converted, precision, self.options.threads, longest + self.options.new)

    def _prepare(self, peer: Peer, shape: str) -> bool:
        """Converts; False, with the reason noted, for what cannot run."""
        python = python_of(peer, Path(self.options.slim_python))
        if python is None:
            self._leave_out(peer, shape, "not installed: --install " + str(peer.environment))
            return False
        try:
            convert(peer, self._setup(peer, shape), python, self._log(peer, shape))
        except Failed as error:
            self._leave_out(peer, shape, str(error))
            return False
        return True

    def _start(self, peer: Peer, shape: str, workers: list[Worker]) -> None:
        """Loads the engine and warms it up."""
        maps = peer.maps or any(worker.peer.maps for worker in workers)  # all the one file, which must stay in memory
        needed = (peer.weight + 2.0 * maps) * SHAPES[shape].parameters + 4e8
        free = available_memory() - SPARE
        if needed > free:
            self._leave_out(peer, shape, f"needs about {needed / 1e9:.1f} GB, and {max(free, 0) / 1e9:.1f} GB are free")
            return
        python = python_of(peer, Path(self.options.slim_python))
        assert python
        say(f"  loading {peer.name}")
        try:
            worker = Worker(peer, self._setup(peer, shape), python, self._log(peer, shape))
        except Failed as error:
            self._leave_out(peer, shape, str(error))
            return
        workers.append(worker)
        self.versions |= worker.versions

    def _rounds(self, shape: str, workers: list[Worker]) -> None:
        rows: dict[tuple[str, int, int], Row] = {}
        seen: list[float] = []
        for index in range(self.options.rounds + 1):
            seen.append(self.read_bandwidth())
            say(f"  round {index} of {self.options.rounds}: {seen[-1]:.1f} GB/s")
            for worker in list(workers):
                try:
                    self._turn(shape, worker, rows, counts=index > 0)
                except Failed as error:
                    self._leave_out(worker.peer, shape, str(error))
                    workers.remove(worker)
                    worker.close()
        self.rows += rows.values()
        self.bandwidth[shape] = {"best": max(seen), "rounds": seen}

    def _turn(self, shape: str, worker: Worker, rows: dict[tuple[str, int, int], Row], counts: bool) -> None:
        """All cases of one engine, once."""
        name = worker.peer.name
        for prompt, batch in CASES if name in EXTRA and not self.options.plain else CASES[:1]:
            row = Row(shape, name, prompt, batch, worker.nbytes)
            if counts:
                row = rows.setdefault((name, prompt, batch), row)
            row.add(worker.run(prompt, self.options.new, batch))
            say(f"    {name:20} {prompt:5} x {batch} {row.prefills[-1]:9,.1f} {row.decodes[-1]:9,.1f}")

    def read_bandwidth(self) -> float:
        """GB/s of all threads reading one large array; built for this processor on first use."""
        source = Path(__file__).with_name("peers") / "bandwidth.cpp"
        program = self.cache / "bandwidth"
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            subprocess.run(["g++", "-O3", "-march=native", "-fopenmp", str(source), "-o", str(program)], check=True)
        command = [str(program), str(self.options.threads), "10"]
        return max(
            float(subprocess.run([*command, pages], check=True, capture_output=True, text=True).stdout)
            for pages in ("small", "huge")
        )

    def _leave_out(self, peer: Peer, shape: str, reason: str) -> None:
        self.left_out[f"{peer.name}, {shape}"] = reason
        say(f"  left out: {peer.name}: {reason}")

    def _log(self, peer: Peer, shape: str) -> Path:
        return self.cache / shape / f"{peer.name.replace(' ', '-')}.log"

    # -- what came of it ---------------------------------------------------------------------------------------------

    def goals(self) -> list[report.Goal]:
        founds = [report.Found(self.rows, shape, entry["best"]) for shape, entry in self.bandwidth.items()]
        return [goal for found in founds for goal in report.goals(found)]

    def text(self) -> str:
        """Everything for a reader, in Markdown."""
        parts = []
        for shape, entry in self.bandwidth.items():
            rows = [row for row in self.rows if row.shape == shape]
            parts.append(f"### {shape}: read bandwidth {entry['best']:.1f} GB/s")
            parts += [report.table(rows, entry["best"]), report.first_tokens(rows)]
        parts.append(report.goal_table(self.goals()))
        parts += [f"- left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n\n".join(parts)

    def data(self) -> dict[str, Any]:
        """Everything for a program."""
        return {
            "date": str(date.today()), "machine": machine(), "threads": self.options.threads,
            "rounds": self.options.rounds, "new tokens": self.options.new, "target": self.options.target,
            "versions": self.versions, "shapes": {name: _sizes(SHAPES[name]) for name in self.bandwidth},
            "bandwidth": self.bandwidth, "rows": [asdict(row) for row in self.rows],
            "goals": [asdict(goal) | {"passed": goal.passed} for goal in self.goals()], "left out": self.left_out,
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """JSON, the tables beside it, and the picture where it can be drawn."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_kept(path, self.data(), self.text() + "\n")
        python = install.interpreter("picture")
        if not python.exists():
            say("no picture: matplotlib is not installed: --install picture")
            return
        script = Path(__file__).with_name("peers") / "picture.py"
        subprocess.run([str(python), str(script), str(path), str(path.with_suffix(".png"))], check=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _sizes(shape: Shape) -> dict[str, Any]:
    return asdict(shape) | {"parameters": shape.parameters, "multiplied": shape.multiplied}


def machine() -> dict[str, Any]:
    """The processor, and what of it matters here."""
    path = Path("/proc/cpuinfo")
    entries = [line.partition(":") for line in path.read_text().splitlines()] if path.exists() else []
    known = {key.strip(): value.strip() for key, _, value in entries}
    flags = set((known.get("flags") or known.get("Features") or "").split())
    return {
        "processor": known.get("model name", platform.machine()), "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags], "system": platform.platform(),
    }  # fmt: skip


def available_memory() -> float:
    """Bytes that can be had without pushing anything out."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", default="15m,135m,1b", help="by commas (default: %(default)s)")
    add("--engines", nargs="+", metavar="NAME", help="'llama.cpp q8_0', or 'llama.cpp' for all of it (default: all)")
    add("--rounds", type=int, default=5, help="that count (default: %(default)s)")
    add("--new", type=int, default=32, help="tokens to write, the first is prefill's (default: %(default)s)")
    add("--threads", type=int, default=2, help="of every engine (default: %(default)s)")
    add("--target", default="auto", help="of slim (default: %(default)s)")
    add("--plain", action="store_true", help="leave out batch 8 and context 2048")
    add("--convert-only", action="store_true", help="make the models and what the peers make of them, and stop")
    add("--out", type=Path, default=ROOT / "benchmarks/results/cpu.json", help="(default: %(default)s)")
    add("--slim-python", default=sys.executable, help="the interpreter that has slim's dependencies")
    add("--install", nargs="*", choices=[*install.ENVIRONMENTS, []], help="make these environments, or all, and stop")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.install is not None:
        for environment in options.install or install.ENVIRONMENTS:
            install.install(environment)
        return
    shapes = options.shapes.split(",")
    if unknown := set(shapes) - set(SHAPES):
        sys.exit(f"no such shape: {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no stopped engine is left behind
    run = Run(options)
    for shape in shapes:
        run.shape(shape)
        if run.rows:
            run.write(options.out)  # after each, so that nothing is lost if the next one fails
    if run.rows:
        print(run.text())


if __name__ == "__main__":
    main()
