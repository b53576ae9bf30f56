"""The API as it stands in the source: types by their names, such as ArrayLike, and attributes in a table."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx

_ENTRY = re.compile(r"([\w, ]+): (.*)")


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-signature", lambda app, kind, name, item, *_: signature(kind, item))
    # Before napoleon, which would list the attributes one by one.
    app.connect("autodoc-process-docstring", lambda app, kind, name, item, _, lines: tabulate(lines), priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def signature(kind: str, item: Any) -> tuple[str, str] | None:
    """The arguments and the result as text, of a function, a method or a class."""
    if kind not in ("function", "method", "class"):
        return None
    node = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(item)))).body[0]
    if isinstance(node, ast.FunctionDef):
        return _arguments(node), "" if node.returns is None else ast.unparse(node.returns)
    if not isinstance(node, ast.ClassDef):
        return None
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return _arguments(statement), ""
    # A dataclass, such as a linen module: its fields are the arguments.
    fields = [ast.unparse(statement) for statement in node.body if isinstance(statement, ast.AnnAssign)]
    return f"({', '.join(fields)})", ""


def _arguments(function: ast.FunctionDef) -> str:
    everything = function.args
    if everything.args and everything.args[0].arg == "self":
        everything.args = everything.args[1:]
    return f"({ast.unparse(everything)})"


def tabulate(lines: list[str]) -> None:
    """Replaces the section "Attributes:" of a docstring, in place."""
    if "Attributes:" not in lines:
        return
    start = lines.index("Attributes:")
    end = next((i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
    rows = [row for name, text in _entries(lines[start + 1 : end]) for row in (f"   * - ``{name}``", f"     - {text}")]
    lines[start:end] = [".. list-table::", "   :widths: 25 75", "", *rows, ""]


def _entries(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Each attribute, or several with one description, and its description in a line."""
    name, text = "", ""
    for line in filter(None, map(str.rstrip, lines)):
        indented = line.startswith("   ")
        found = None if indented else _ENTRY.fullmatch(line.strip())
        if found is None:
            text += " " + line.strip()
            continue
        if name:
            yield name, text
        name, text = found.groups()
    if name:
        yield name, text
