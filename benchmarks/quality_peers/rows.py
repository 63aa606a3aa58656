"""What is compared: tables of methods that hold a weight, or an activation, in the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SLIM, COMPRESSOR, AO = "slim", "llm-compressor", "torchao"


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        table: what is held how, for all its rows.
        recipe: pipeline text for slim, with ``{odd}`` for the weights to leave alone; else what the peer's file reads.
        planted: how much larger outliers are made at each norm's output; 0 for none.
    """

    table: str
    name: str
    engine: str
    recipe: Any
    planted: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.table} | {self.engine} | {self.name}"


def _slim(table: str, name: str, text: str, planted: float = 0.0) -> Row:
    return Row(table, name, SLIM, text, planted)


def _compressor(table: str, name: str, planted: float = 0.0, **recipe: Any) -> Row:
    return Row(table, name, COMPRESSOR, recipe, planted)


def _ao(table: str, name: str, planted: float = 0.0, **recipe: Any) -> Row:
    return Row(table, name, AO, recipe, planted)


def _grouped(table: str, bits: int) -> list[Row]:
    """Integers in groups of 32 along the row."""
    held = f'"int{bits}", group_size=32, head=False, exclude={{odd}}'
    rows = [_slim(table, "default", f"quantize({held})")]
    rows.append(_slim(table, "default, asymmetric", f"quantize({held}, symmetric=False)"))
    rows += [_slim(table, method, f'quantize({held}, method="{method}")') for method in ("rtn", "gptq", "awq", "hqq")]
    rows += [_compressor(table, method, method=method, bits=bits, group=32) for method in ("rtn", "gptq", "awq")]
    rows += [_compressor(table, f"{m}, asymmetric", method=m, bits=bits, group=32, zeros=True) for m in ("gptq", "awq")]
    rows += [_ao(table, "rtn", method="intx", bits=bits, group=32)]
    return [*rows, _ao(table, "hqq", method="intx", bits=bits, group=32, hqq=True)]


def _rounded(table: str, planted: float = 0.0) -> list[Row]:
    """int8 weights by row, int8 activations by token."""
    rows = [_slim(table, "default", 'quantize("int8", activations="int8", head=False)', planted)]
    rows += [
        _slim(
            table,
            f"smooth_quant({alpha})",
            f'smooth_quant({alpha}), quantize("int8", activations="int8", head=False)',
            planted,
        )
        for alpha in ("0.5", '"search"')
    ]
    rows.append(_compressor(table, "rtn", planted, method="rtn", bits=8, inputs=True))
    if not planted:
        rows.append(_compressor(table, "gptq", method="gptq", bits=8, inputs=True))
    for alpha in (0.5, 0.8):
        told: Any = dict(method="rtn", bits=8, inputs=True, smooth=alpha)
        rows.append(_compressor(table, f"SmoothQuant {alpha}", planted, **told))
    rows.append(_ao(table, "int8 dynamic", planted, method="w8a8"))
    return rows


FLOAT = _slim("float", "float", "")
ROWS: tuple[Row, ...] = (
    FLOAT,
    _slim("int8 weights", "default", 'quantize("int8", head=False)'),
    _compressor("int8 weights", "gptq", method="gptq", bits=8),
    _ao("int8 weights", "int8", method="int8"),
    *_rounded("W8A8"),
    *_grouped("int4 weights, groups of 32", 4),
    *_grouped("int3 weights, groups of 32", 3),
    _slim("nf4 weights", "default", 'quantize("nf4", head=False, exclude={odd})'),
    _slim("fp8 weights", "default", 'quantize("fp8", head=False)'),
    _ao("fp8 weights", "float8", method="fp8"),
    _slim("keys and values", "int8", 'quantize_kv("int8")'),
    _slim("keys and values", "int4", 'quantize_kv("int4")'),
    *_rounded("W8A8, outliers of 60", 60.0),
    *_rounded("W8A8, outliers of 1000", 1000.0),
)  # fmt: skip
