"""Pipeline text: ``prune(0.2), gqa(kv_heads=2), quantize("int8")``, read as data and never executed."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from slim import errors
from slim.compiler.options import literal
from slim.compiler.passes_base import Pass, option_types

_OPEN = "_(\n"  # the text becomes the arguments of one call, so that it may span lines and hold comments


def write_pipeline(passes: Iterable[Pass]) -> str:
    """The text that ``read_pipeline`` reads back as equal passes."""
    return ", ".join(map(repr, passes))


def read_pipeline(text: str, known: Mapping[str, type[Pass]]) -> tuple[Pass, ...]:
    """The passes that ``text`` names, out of ``known`` ones.

    Raises:
        BadPipelineText: with the character at which it cannot be read. UnknownPass, BadPassOption,
        ContradictoryOptions: where it can be read and means nothing.
    """
    return _Reader(text, known).read()


class _Reader:
    def __init__(self, text: str, known: Mapping[str, type[Pass]]) -> None:
        self.text = text
        self.known = known
        self.lines = [f"{line}\n" for line in text.split("\n")]

    def read(self) -> tuple[Pass, ...]:
        try:
            body = ast.parse(f"{_OPEN}{self.text}\n)", mode="eval").body
        except SyntaxError as error:
            raise self._bad(self._offset(error.lineno, (error.offset or 1) - 1), error.msg) from None
        except (ValueError, RecursionError, MemoryError) as error:  # null characters; nested too deep
            raise self._bad(0, str(error) or "it is nested too deep") from None
        match body:
            case ast.Call(func=ast.Name(id="_"), keywords=[]):
                return tuple(self._pass(node) for node in body.args)
            case ast.Call(func=ast.Name(id="_")):
                raise self._bad(self._at(body.keywords[0]), "expected a pass, such as quantize()")
        raise self._bad(0, "its parentheses do not match")

    def _pass(self, node: ast.expr) -> Pass:
        """A call of a pass; its bare name stands for a call without options."""
        match node:
            case ast.Name(id=name):
                return self._make(name, [], [])
            case ast.Call(func=ast.Name(id=name)):
                return self._make(name, node.args, node.keywords)
        raise self._bad(self._at(node), "expected a pass, such as quantize()")

    def _make(self, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Pass:
        if name not in self.known:
            raise errors.UnknownPass(name=name, known=sorted(self.known))
        kind = self.known[name]
        declared = list(option_types(kind))
        given = self._by_position(name, declared, args)
        for keyword in keywords:
            option, value = keyword.arg, self._value(keyword.value)
            if option is None:
                raise self._bad(self._at(keyword), "** has no meaning here")
            if option not in declared:
                raise errors.BadPassOption(
                    pass_name=name, option=option, reason="there is no such option", known=declared
                )
            if option in given:
                first, second = (f"{option}={literal(v)}" for v in (given[option], value))
                raise errors.ContradictoryOptions(a=first, b=second, reason="the option is given twice")
            given[option] = value
        self._complete(kind, given)
        return kind(**given)

    def _by_position(self, name: str, declared: list[str], args: list[ast.expr]) -> dict[str, Any]:
        values = [self._value(argument) for argument in args]
        if len(values) > len(declared):
            reason = f"it has {len(declared)} options, and {len(values)} values are given"
            raise errors.BadPassOption(
                pass_name=name, option=literal(values[len(declared)]), reason=reason, known=declared
            )
        return dict(zip(declared, values, strict=False))

    def _complete(self, kind: type[Pass], given: dict[str, Any]) -> None:
        for option in dataclasses.fields(kind):
            if option.name not in given and option.default is dataclasses.MISSING:
                raise errors.BadPassOption(
                    pass_name=kind.name, option=option.name, reason="it has no default and must be given"
                )

    def _value(self, node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            shown = ast.get_source_segment(f"{_OPEN}{self.text}\n)", node) or "this"
            raise self._bad(self._at(node), f"{shown} is not a number, string, list, True, False or None") from None

    def _bad(self, position: int, reason: str) -> errors.BadPipelineText:
        return errors.BadPipelineText(text=self.text, position=position, reason=reason)

    def _at(self, node: ast.expr | ast.keyword) -> int:
        """Where a node begins; ast counts columns in bytes."""
        line = self.lines[min(node.lineno - 2, len(self.lines) - 1)]
        return self._offset(node.lineno, len(line.encode()[: node.col_offset].decode()))

    def _offset(self, line: int | None, column: int) -> int:
        """Line and column of the wrapped text as an offset into the user's."""
        before = sum(len(text) for text in self.lines[: max((line or 2) - 2, 0)])
        return max(0, min(before + column, len(self.text)))
