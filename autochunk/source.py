"""Source: Python functions that are written as source code, for Dynamo to trace.

Their statements are where the user's are: an error, and a row of a report, names the user's line.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from autochunk.find import source_line
from autochunk.modes import ENTER_AUTOCAST, EXIT_AUTOCAST


def place(function: ast.FunctionDef, number: int, lines: Sequence[int]) -> None:
    """Moves a function to the line ``number``, and its statements to ``lines``."""
    places: list[tuple[ast.AST, int]] = [(function, number)]
    places += zip(function.body, lines, strict=True)
    for node, line in places:
        for part in ast.walk(node):
            if hasattr(part, "lineno"):
                part.lineno = part.end_lineno = line  # type: ignore[attr-defined]


def define(function: ast.FunctionDef, file: str, names: dict[str, Any]) -> Callable[..., Any]:
    """Defines a function.

    Args:
        function: Its source.
        file: The user's, where its statements are placed.
        names: Its globals; it becomes one of them.
    """
    exec(compile(ast.Module([function], []), file, "exec"), names)
    made: Callable[..., Any] = names[function.name]
    return made


def as_function(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a Python function."""
    code = graph.python_code("self")
    (function,) = ast.parse(code.src.strip()).body
    assert isinstance(function, ast.FunctionDef)
    function.name = "entered"
    function.args.args.pop(0)  # self
    lines = {node.name: _line_of(node) for node in graph.nodes}
    files = Counter(line[0] for line in lines.values() if line)
    file = files.most_common(1)[0][0] if files else "<unknown>"
    number = min((line[1] for line in lines.values() if line and line[0] == file), default=1)
    at = [number]  # a statement without a line is where the one before it is
    for statement in function.body:
        line = lines.get(_assigned(statement) or "")
        at.append(line[1] if line and line[0] == file else at[-1])
    place(function, number, at[1:])
    function.body = _with_autocast(function.body, graph)
    names = dict(code.globals)
    if any(node.op in ("call_module", "get_attr") for node in graph.nodes):
        names["self"] = graph.owning_module
    return define(function, file, names)


def _assigned(statement: ast.stmt) -> str | None:
    """The name of the node that a statement computes."""
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    return target.id if isinstance(target, ast.Name) else None


def _with_autocast(body: Sequence[ast.stmt], graph: fx.Graph) -> list[ast.stmt]:
    """Statements with a ``with`` in place of each pair of calls that enter and exit autocast.

    Dynamo has made the pairs of ``with`` statements, so they are nested. It would trace into the
    calls, and fails where that is done in a ``with torch.autocast`` ("Global autocast(cpu)_enabled
    state changed while dynamo tracing").
    """
    calls = {node.name: node.target for node in graph.nodes}
    block: list[ast.stmt] = []
    outer = []
    for statement in body:
        value = statement.value if isinstance(statement, ast.Assign) else None
        target = calls.get(_assigned(statement) or "") if isinstance(value, ast.Call) else None
        if target is ENTER_AUTOCAST:
            assert isinstance(value, ast.Call)
            value.func = ast.Attribute(ast.Name("torch", ast.Load()), "autocast", ast.Load())
            inner = ast.With([ast.withitem(value)], [ast.Pass()])
            ast.fix_missing_locations(ast.copy_location(inner, statement))
            block.append(inner)
            outer.append(block)
            block = inner.body
        elif target is EXIT_AUTOCAST:
            block = outer.pop()
        else:
            block.append(statement)
    return block


def _line_of(node: fx.Node) -> tuple[str, int] | None:
    found = re.match(r"(.*?):(\d+)(:|$)", source_line(node))
    return (found[1], int(found[2])) if found else None
