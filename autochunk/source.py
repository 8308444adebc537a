"""Source: Python functions that are written as source code, for Dynamo to trace.

Their statements are where the user's are: an error, and a row of a report, names the user's line.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from autochunk.find import source_line

_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
_EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
_AUTOCAST = (_ENTER_AUTOCAST, _EXIT_AUTOCAST)


def define(
    function: ast.FunctionDef,
    file: str,
    number: int,
    places: Sequence[tuple[ast.stmt, int]],
    names: dict[str, Any],
) -> Callable[..., Any]:
    """Defines a function whose statements are where the user's are.

    Args:
        function: Its source, modified.
        file: The user's.
        number: Line of the function itself.
        places: Each of its statements, and its line. Those in another one come after it.
        names: Its globals; it becomes one of them.
    """
    for place, line in [(function, number), *places]:
        for part in ast.walk(place):
            if hasattr(part, "lineno"):
                part.lineno = part.end_lineno = line  # type: ignore[attr-defined]
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
    function.body, statements = _with_autocast(function.body, graph)
    places = list(zip(statements, at[1:], strict=True))
    names = dict(code.globals)
    if any(node.op in ("call_module", "get_attr") for node in graph.nodes):
        names["self"] = graph.owning_module
    return define(function, file, number, places, names)


def _assigned(statement: ast.stmt) -> str | None:
    """The name of the node that a statement computes."""
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    return target.id if isinstance(target, ast.Name) else None


def _with_autocast(body: list[ast.stmt], graph: fx.Graph) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """Statements with a ``with`` in place of each pair of calls that enter and exit autocast.

    Dynamo has made the pairs of ``with`` statements, so they are nested. It would trace into the
    calls, and fails where that is done in a ``with torch.autocast`` ("Global autocast(cpu)_enabled
    state changed while dynamo tracing").

    Returns:
        The body, and what became of each statement.
    """
    calls = {node.name: node.target for node in graph.nodes if node.target in _AUTOCAST}
    made: list[ast.stmt] = []
    block: list[ast.stmt] = []
    outer = []
    for statement in body:
        made.append(statement)
        value = statement.value if isinstance(statement, ast.Assign) else None
        target = calls.get(_assigned(statement) or "") if isinstance(value, ast.Call) else None
        if target is _ENTER_AUTOCAST:
            assert isinstance(value, ast.Call)
            value.func = ast.parse("torch.autocast", mode="eval").body
            nothing = ast.copy_location(ast.Pass(), statement)
            inner = ast.copy_location(ast.With([ast.withitem(value)], [nothing]), statement)
            made[-1] = inner
            block.append(inner)
            outer.append(block)
            block = inner.body
        elif target is _EXIT_AUTOCAST:
            block = outer.pop()
        else:
            block.append(statement)
    return block, made


def _line_of(node: fx.Node) -> tuple[str, int] | None:
    found = re.match(r"(.*?):(\d+)(:|$)", source_line(node))
    return (found[1], int(found[2])) if found else None
