"""Tables of what was measured."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.quality_peers.rows import FLOAT, ROWS, Row

HEADER = """# Quality of quantised models

Written by `python -m benchmarks.quality`. Loss: nats a held-out token above floating point; best of each table in bold.
Bits: of a quantised weight on disk, scales (16 bits with peers) and zero points included. The head, embeddings and
norms stay in floating point. A method that is not in a table was not measured. {versions}
"""


def line(model: str, row: Row, found: dict[str, Any]) -> str:
    """One row as it is measured."""
    return f"{model:14}{row.table:28}{row.engine:16}{row.name:24}{_told(found)}"


def _told(found: dict[str, Any]) -> str:
    if "error" in found:
        return found["error"][:100]
    return f"{_nats(found):.5f} nats, {_bits(found)} bits, {found['seconds']} s"


def _bits(found: dict[str, Any]) -> str:
    return "-" if found["bits"] is None else f"{found['bits']:.2f}"  # keys and values are no weights


def _nats(found: dict[str, Any]) -> float:
    return float(found["nats"] / found["tokens"])


def tables(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Everything measured, a section a model, a table a way of holding numbers."""
    parts = [HEADER.format(versions=_versions(results))]
    for model, found in results.items():
        parts.append(f"\n## {model}\n")
        exact = found.get(FLOAT.key)
        if exact is not None and "error" not in exact:
            parts.append(f"\nFloat: perplexity {math.exp(_nats(exact)):.4f}, {_nats(exact):.5f} nats a token.\n")
        names = dict.fromkeys(row.table for row in ROWS if row is not FLOAT)
        parts += [
            _table(name, found, exact) for name in names if any(row.key in found for row in ROWS if row.table == name)
        ]
    return "".join(parts)


def _table(name: str, found: dict[str, Any], exact: dict[str, Any] | None) -> str:
    rows = [row for row in ROWS if row.table == name and row.key in found]
    losses = {
        row.key: _nats(found[row.key]) - (_nats(exact) if exact else 0.0) for row in rows if "nats" in found[row.key]
    }
    lines = [f"\n### {name}\n", "| engine | method | bits | perplexity | loss, nats |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: losses.get(row.key, math.inf)):
        value = found[row.key]
        if "error" in value:
            lines.append(f"| {row.engine} | {row.name} | | | {value['error'].replace('|', '/')[:120]} |")
            continue
        loss = f"{losses[row.key]:+.5f}"
        loss = f"**{loss}**" if losses[row.key] == min(losses.values()) else loss
        lines.append(f"| {row.engine} | {row.name} | {_bits(value)} | {math.exp(_nats(value)):.4f} | {loss} |")
    return "\n".join(lines) + "\n"


def _versions(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    found = {
        f"{name} {version}"
        for rows in results.values()
        for value in rows.values()
        for name, version in value.get("versions", {}).items()
    }
    return f"Versions: {', '.join(sorted(found))}." if found else ""
