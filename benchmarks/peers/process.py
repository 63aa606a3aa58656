"""Engines in processes of their own, stopped whenever another is measured."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers import install
from benchmarks.peers.protocol import Setup

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Peer:
    """An engine with one way of holding weights.

    Attributes:
        name: of its rows.
        engine: the file beside this one that runs it.
        precision: what that file calls the way.
        environment: see ``install``; None for slim's own interpreter.
        weight: about how many bytes a parameter takes in memory of its own.
        maps: whether it reads the model's bfloat16 file in place.
        converts: whether it makes files of its own from the model.
    """

    name: str
    engine: str
    precision: str
    environment: str | None
    weight: float
    converts: bool = False
    maps: bool = False


class Failed(Exception):
    """An engine could not be started or did not answer; the text is its last line."""


class Worker:
    """One engine, loaded; stopped but for the time that ``run`` takes.

    Attributes:
        peer: what it is.
        nbytes: of the matrices that a new token reads.
        versions: of its packages.
    """

    def __init__(self, peer: Peer, setup: Setup, python: Path, log: Path) -> None:
        self.peer = peer
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                _command(peer, setup, python, "serve"), env=_environment(peer, setup), text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
            )  # fmt: skip
        try:
            ready = self._answer()
        except BaseException:  # also a signal that ends the driver: nobody else knows of the process yet
            self.close()
            raise
        self.nbytes: int = ready["nbytes"]
        self.versions: dict[str, str] = ready["versions"]
        self._signal(signal.SIGSTOP)

    def run(self, prompt: int, new: int, batch: int = 1) -> dict[str, Any]:
        """Seconds of the prompt and of each new token after the first, and the tokens.

        Raises:
            Failed: with what the engine said.
        """
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin
            self._process.stdin.write(json.dumps({"prompt": prompt, "new": new, "batch": batch}) + "\n")
            return self._answer()
        except BrokenPipeError:
            raise Failed(_last_line(self._log)) from None
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Ends the process and whatever it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise Failed(_last_line(self._log))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)  # its session, which is its own


def convert(peer: Peer, setup: Setup, python: Path, log: Path) -> None:
    """Makes the engine's own files, unless an earlier run did.

    Raises:
        Failed: with the last line of the log.
    """
    if not peer.converts or setup.converted.exists():
        return
    partial = replace(setup, converted=setup.converted.with_name("partial-" + setup.converted.name))
    with log.open("ab") as output:
        command = _command(peer, partial, python, "convert")
        done = subprocess.run(
            command, env=_environment(peer, setup), text=True, stdout=subprocess.PIPE, stderr=output, check=False
        )
    if done.returncode:
        raise Failed(json.loads(done.stdout)["error"] if done.stdout else _last_line(log))
    partial.converted.rename(setup.converted)


@contextlib.contextmanager
def closing(workers: list[Worker]) -> Iterator[None]:
    """Closes them all in the end, whatever happens."""
    try:
        yield
    finally:
        for worker in workers:
            worker.close()


def python_of(peer: Peer, own: Path) -> Path | None:
    """The interpreter that runs the peer; None where it is not installed."""
    if peer.environment is None:
        return own
    found = install.interpreter(peer.environment)
    return found if found.exists() else None


def _command(peer: Peer, setup: Setup, python: Path, action: str) -> list[str]:
    told = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(setup).items()}
    return [str(python), str(WORKER), action, json.dumps({"engine": peer.engine, **told})]


def _environment(peer: Peer, setup: Setup) -> dict[str, str]:
    """slim is importable in slim's own workers alone; no pool of compilers runs beside what is measured."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    threads = str(setup.threads)
    kept |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    kept |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    kept |= {"TORCHINDUCTOR_CACHE_DIR": str(setup.model.parent / "inductor")}  # compiled once, for later runs too
    return kept | ({"PYTHONPATH": str(ROOT)} if peer.environment is None else {})


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it ended without a word"
