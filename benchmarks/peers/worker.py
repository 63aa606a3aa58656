"""Runs one engine in this process: the far end of ``process.Worker``.

    python worker.py convert '{"engine": "llama", "model": ..., "converted": ..., "precision": "q8_0", ...}'
    python worker.py serve '{...}'

``serve`` reads lines ``{"prompt": 128, "new": 32, "batch": 1}`` and answers each with ``{"prefill": seconds,
"decode": [seconds a token], "tokens": [ids]}`` or ``{"error": text}``; its first line says what was loaded.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

import protocol


def main() -> None:
    action, text = sys.argv[1:]
    answers = _own_stdout()
    told: dict[str, Any] = json.loads(text)
    name = told.pop("engine")
    setup = protocol.Setup(Path(told.pop("model")), Path(told.pop("converted")), **told)
    try:
        module = importlib.import_module(name)
        if action == "convert":
            module.convert(setup)
            return
        engine = module.Engine(setup)
    except Exception as error:
        _fail(answers, error)
        sys.exit(1)
    _answer(answers, {"nbytes": engine.nbytes, "versions": engine.versions})
    serve(engine, setup, answers)


def serve(engine: protocol.Engine, setup: protocol.Setup, answers: TextIO) -> None:
    """Answers until the input ends."""
    vocabulary = json.loads((setup.model / "config.json").read_text())["vocab_size"]
    for line in sys.stdin:
        request = json.loads(line)
        prompt = random.Random(0).choices(range(vocabulary), k=request["prompt"])
        try:
            clock = engine.run(prompt, request["new"], request["batch"])
        except Exception as error:
            _fail(answers, error)
        else:
            _answer(answers, {"prefill": clock.prefill, "decode": clock.decode, "tokens": clock.tokens})


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _fail(answers: TextIO, error: Exception) -> None:
    """The whole story to the log, the first line of the message to the driver."""
    traceback.print_exc()
    _answer(answers, {"error": f"{type(error).__name__}: {error}".partition("\n")[0]})


def _own_stdout() -> TextIO:
    """The pipe to the driver; what engines print goes to the log instead, C libraries included."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return pipe


if __name__ == "__main__":
    main()
