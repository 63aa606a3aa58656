"""Progress on standard error: a moving line on a terminal, a plain line a stage in a log."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Steps:
    """Shows what is being done and how far it is; called as ``slim.compile`` calls its ``progress``.

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

    def __enter__(self) -> Steps:
        self._progress.start()
        if self._moving:  # importing torch takes seconds, and is nothing to tell a log
            self.stage(self._stage)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, what: str) -> None:
        """Something of unknown length begins, and whatever was shown before is over."""
        for task in self._tasks.values():
            self._progress.remove_task(task)
        self._tasks.clear()
        self._stage = what
        self._show(what, None)

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` steps out of ``total``; at the last one the line goes away."""
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
