"""What all errors share: their fields, their wording, and the base to catch them by."""

import dataclasses
import difflib
import functools
import os
from collections.abc import Collection
from string import Formatter
from typing import Any, ClassVar, dataclass_transform

StrPath = str | os.PathLike[str]


# A root of its own, because type checkers take no fields from the class that carries dataclass_transform.
@dataclass_transform(kw_only_default=True, eq_default=False)
class _Catalogued(Exception):
    """Makes every error below a dataclass: mypy, and Python itself, refuse a missing or unknown field."""

    def __init_subclass__(cls) -> None:
        if cls.__module__.startswith("slim.errors."):
            cls.__module__ = "slim.errors"  # where users find it, and what a traceback should say
        dataclasses.dataclass(kw_only=True, eq=False)(cls)  # eq would take the hash away that tracebacks need


class SlimError(_Catalogued):
    """The base of every error slim raises on purpose; never raised itself."""

    message: ClassVar[str]  # what went wrong: a str.format template over the error's fields and properties
    hint: ClassVar[str]  # what to do about it: likewise

    where: str | None = None  # "node mul_3 (modeling_llama.py:120)", for errors that have a place in the graph

    def __post_init__(self) -> None:
        place = f"\n  at: {self.where}" if self.where else ""
        super().__init__(f"{self._fill(self.message)}{place}\n  hint: {self._fill(self.hint)}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own way calls the class with positional arguments, which these classes do not take.
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return functools.partial(type(self), **fields), (), self.__dict__

    def _fill(self, template: str) -> str:
        names = [name for _, name, _, _ in Formatter().parse(template) if name]
        return template.format_map({name: readable(getattr(self, name)) for name in names})


def readable(value: object) -> object:
    """Lists as words with commas; all else as it is, so that format specs still apply."""
    if isinstance(value, Collection) and not isinstance(value, str | bytes):
        return ", ".join(map(str, value))
    return value


def did_you_mean(word: str, known: Collection[str]) -> str:
    spelled = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), spelled, n=1)
    return f" Did you mean '{spelled[close[0]]}'?" if close else ""
