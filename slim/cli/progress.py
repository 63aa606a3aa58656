"""Progress on standard error: a moving line on a terminal, a plain line a stage in a log."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Steps:
    """Shows what is being done and how far it is; called as ``slim.compile`` calls its ``progress``.

    Each step is also where a Ctrl-C is raised again that something in between has swallowed.

    Example:
        >>> with Steps() as steps:
        ...     steps.stage("lifting")
        ...     compiled = slim.compile(model, passes, progress=steps)
        ...     steps.stage("saving")
    """

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
        )
        self._moving = console.is_terminal
        self._progress = Progress(*columns, console=console, transient=True, disable=not self._moving)
        self._tasks: dict[str, TaskID] = {}
        self._seen: set[str] = set()
        self._stage = "starting"
        self._interrupted = False
        self._catches = False

    def __enter__(self) -> Steps:
        in_main = threading.current_thread() is threading.main_thread()  # signals are its alone
        self._catches = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._catches:
            signal.signal(signal.SIGINT, self._interrupt)
        self._progress.start()
        if self._moving:  # importing torch takes seconds, and is nothing to tell a log
            self.stage(self._stage)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._catches:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _check(self) -> None:
        """Ctrl-C counts even where a library that it hit swallowed the exception."""
        if self._interrupted:
            raise KeyboardInterrupt

    def stage(self, what: str) -> None:
        """Something of unknown length begins, and whatever was shown before is over."""
        self._check()
        for task in self._tasks.values():
            self._progress.remove_task(task)
        self._tasks.clear()
        self._stage = what
        self._show(what, None)

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` steps out of ``total``; at the last one the line goes away."""
        self._check()
        if self._stage in self._tasks:
            self._progress.remove_task(self._tasks.pop(self._stage))
        if done >= total:
            if what in self._tasks:
                self._progress.remove_task(self._tasks.pop(what))
            return
        if what not in self._tasks:
            self._show(what, total)
        self._progress.update(self._tasks[what], completed=done, count=f"{done}/{total}")

    def _show(self, what: str, total: int | None) -> None:
        self._tasks[what] = self._progress.add_task(what, total=total, count="")
        if not self._moving and what not in self._seen:
            self._progress.console.print(f"{what} ...", markup=False)
        self._seen.add(what)
