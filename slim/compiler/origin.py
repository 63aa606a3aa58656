"""Where the class of a pass comes from, so that another process can make it again: a module, or source to carry."""

from __future__ import annotations

import ast
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_SLIM = Path(__file__).resolve().parents[1]
_NOT_RUN = "__name__"  # what stands below `if __name__ == "__main__"` is for the script, not for its pass
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


@dataclass(frozen=True)
class Origin:
    """How to come by a class.

    Attributes:
        module: what to import it from; with ``source``, a name for the module that is made of that.
        source: Python text that defines it; None where the module can be imported everywhere that slim can.
        paths: folders with modules of the user's own that are imported on the way.
        missing: why another process cannot have the class; empty where it can.
    """

    module: str
    source: str | None = None
    paths: tuple[str, ...] = ()
    missing: str = ""


def origin_of(kind: type) -> Origin:
    """Where another process finds ``kind``: the source of a module that is not installed, and of a script as much
    as the class needs of it, goes along."""
    module = sys.modules.get(kind.__module__)
    name = _name(kind, module)
    if "<locals>" in kind.__qualname__:
        return Origin(name, missing=f"{kind.__name__} is defined inside a function")
    file = getattr(module, "__file__", None)
    if file is None:
        where = "in an interactive session" if name == "__main__" else f"in {name}, which has no file"
        return Origin(name, missing=f"{kind.__name__} is defined {where}")
    if name != "__main__" and _is_installed(Path(file)):
        return Origin(name)
    try:
        text = Path(file).read_text(encoding="utf-8")
        source = needed(text, kind.__qualname__.partition(".")[0]) if name == "__main__" else text
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError) as error:
        return Origin(name, missing=f"the source of {kind.__name__} cannot be read ({error})")
    if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)):  # it is part of a package
        return Origin(name, paths=tuple(_folder(name)))
    imported = dict.fromkeys(top for node in ast.walk(tree) for top in _imports(node))
    own = Path(file).stem if name == "__main__" else name.rpartition(".")[2]
    return Origin(f"reproduced_{own}", source, tuple(dict.fromkeys(path for top in imported for path in _folder(top))))


def _name(kind: type, module: ModuleType | None) -> str:
    """The name to import it by, which ``python -m`` hides behind ``__main__``."""
    spec = getattr(module, "__spec__", None)
    return spec.name if kind.__module__ == "__main__" and spec is not None else kind.__module__


def _is_installed(file: Path) -> bool:
    """Whether ``file`` belongs to slim, to Python or to an installed package."""
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    homes = (_SLIM, *(Path(sysconfig.get_path(kind)).resolve() for kind in kinds))
    return any(file.resolve().is_relative_to(home) for home in homes)


def _folder(module: str) -> Iterator[str]:
    """The folder from which a module of the user's own is imported; nothing for one that is installed."""
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # not there: the import may stand in a try
        return
    if spec is None or spec.origin in ("built-in", "frozen"):
        return
    file = Path(spec.origin or next(iter(spec.submodule_search_locations or ()), ""))
    package = spec.submodule_search_locations is not None
    if not _is_installed(file):
        yield str((file.parent if package and spec.origin else file).resolve().parent)


def _imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        yield node.module.partition(".")[0]


# -- what a class needs of its script ----------------------------------------------------------------------------------


def needed(source: str, name: str) -> str:
    """The statements of a script that define ``name``, and what those refer to; nothing else of it would run.

    Raises:
        ValueError: where the script does not define it.

    Example:
        >>> print(needed("import os\\nimport re\\nmain = os.getcwd()\\nclass A:\\n    r = re.I\\n", "A"))
        import re
        class A:
            r = re.I
    """
    statements = [node for node in ast.parse(source).body if not _is_for_the_script(node)]
    taken: set[int] = set()
    wanted = {name}
    while new := {i for i, node in enumerate(statements) if i not in taken and _is_wanted(node, wanted)}:
        taken |= new
        wanted |= {read for index in new for read in _reads(statements[index])}
    if not any(name in _binds(statements[index]) for index in taken):
        raise ValueError(f"it does not define {name} any more")
    lines = source.splitlines()
    kept = dict.fromkeys(line for index in sorted(taken) for line in _lines(statements[index]))
    gaps = {line for line in kept if line > 1 and not lines[line - 2].strip()} - {next(iter(kept))}
    return "\n".join("\n" * (line in gaps and line - 1 not in kept) + lines[line - 1] for line in kept) + "\n"


def _is_for_the_script(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and any(isinstance(n, ast.Name) and n.id == _NOT_RUN for n in ast.walk(node.test))


def _is_wanted(node: ast.stmt, wanted: set[str]) -> bool:
    """Whether it defines something that is wanted; what a star brings, and the future, may always be."""
    if isinstance(node, ast.ImportFrom) and (node.module == "__future__" or node.names[0].name == "*"):
        return True
    return not wanted.isdisjoint(_binds(node))


def _lines(node: ast.stmt) -> range:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
    return range(first, (node.end_lineno or node.lineno) + 1)


def _binds(node: ast.AST) -> Iterator[str]:
    """Names that a statement defines, or changes something of, at the level of the module."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, _SCOPES):
        yield from [node.name] if not isinstance(node, ast.Lambda) else []
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
        yield from (inner.id for inner in ast.walk(node.value) if isinstance(inner, ast.Name))
    else:
        for child in ast.iter_child_nodes(node):
            yield from _binds(child)


def _reads(node: ast.AST) -> Iterator[str]:
    """Names that a statement refers to, in annotations that are strings too."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            yield inner.id
        for hint in (getattr(inner, "annotation", None), getattr(inner, "returns", None)):
            if isinstance(hint, ast.Constant) and isinstance(hint.value, str):
                yield from _names_of(hint.value)


def _names_of(annotation: str) -> Iterable[str]:
    try:
        return list(_reads(ast.parse(annotation, mode="eval")))
    except SyntaxError:  # no type, whatever it is
        return []
