"""Replaying a sequence of launches as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Replay:
    """A function without arguments whose launches are captured the second time and replayed from then on.

    The first time runs as it is: it compiles the kernels and may tune them, which no capture could hold.
    """

    def __init__(self, run: Callable[[], None], captures: bool) -> None:
        self._run = run
        self._captures = captures
        self._warm = False
        self._graph: Any = None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self._captures and self._warm:
            self._graph = self._captured()
            self._graph.replay()
        else:
            self._run()
            self._warm = True

    def _captured(self) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return graph
