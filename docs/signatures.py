"""Signatures of the API as they stand in the source: ArrayLike, and not what it is an alias of."""

import ast
import inspect
import textwrap
from typing import Any

from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, Any]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-signature", lambda app, kind, name, item, *_: signature(kind, item))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def signature(kind: str, item: Any) -> tuple[str, str] | None:
    """The arguments and the result as text, of a function, a method or a class."""
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
