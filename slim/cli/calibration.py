"""Calibration texts on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import click

from slim import errors
from slim.cli.shell import read_text

calibration_option = click.option(
    "--calibration",
    metavar="FILE",
    help="What passes that need statistics read: a text file, or JSON lines that have a text each (.jsonl).",
)


def read_calibration(path: str) -> list[str]:
    """The text of a file, whole; or the ``text`` of each line of JSON where it is a .jsonl.

    Raises:
        UnreadableFile: where it cannot be read, or holds no text.
    """
    content = read_text(path, "--calibration")
    if Path(path).suffix == ".jsonl":
        texts = [_text_of(line, number, path) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    else:
        texts = [content]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise errors.UnreadableFile(option="--calibration", path=path, reason="it holds no text")
    return texts


def _text_of(line: str, number: int, path: str) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError) as error:
        reason = f'line {number} is not JSON such as {{"text": "..."}}'
        raise errors.UnreadableFile(option="--calibration", path=path, reason=reason) from error
