"""Kernel writes: Inductor takes it for granted that no op of a graph modifies a tensor.

Some derivatives are written with in-place ops (``cumprod``'s scatters into zeros), and tracing
through autograd records them as they are. AOTAutograd functionalises what it traces; so do we, and
prove of every kernel that nothing is written but what the kernel is meant to write.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

#: Views by what they do, not by their schemas.
_HIDDEN_VIEWS = (aten._unsafe_view.default,)


class WriteError(RuntimeError):
    """A graph modifies a tensor that it must not."""


def writing_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that write to one of their arguments, in order."""
    return [
        node
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]


def functionalised(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """The same graph without writes to tensors it has made; itself if it writes nothing.

    Args:
        gm: A graph of ATen ops.
        inputs: What it was traced with. The fake mode and the Python dispatcher it was traced
            under must be active.
        decompositions: For the ops that take the place of writes.
    """
    if not writing_nodes(gm.graph):
        return gm
    return make_fx(
        torch.func.functionalize(gm),
        decomposition_table=dict(decompositions or {}),
        tracing_mode="real",
        _allow_non_fake_inputs=True,
    )(*inputs)


def same_memory(graph: fx.Graph, nodes: Collection[fx.Node]) -> set[fx.Node]:
    """``nodes`` and all views of them."""
    found = set(nodes)
    for node in graph.nodes:
        if _is_view(node) and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    return target in _HIDDEN_VIEWS or views_argument(target)


def views_argument(target: Any) -> bool:
    """Whether an ATen op's result is a view of an argument, by its schema."""
    return isinstance(target, torch._ops.OpOverload) and any(
        arg.alias_info is not None and not arg.alias_info.is_write
        for arg in target._schema.arguments
    )


def check_writes(graph: fx.Graph, buffers: Collection[fx.Node]) -> None:
    """Proves that a kernel writes to its buffers only, and reads none of them afterwards.

    Args:
        graph: The kernel's graph.
        buffers: Placeholders that a ``copy_`` at the end may overwrite.

    Raises:
        WriteError: naming the op.
    """
    writing = set(writing_nodes(graph))
    overwritten: set[fx.Node] = set()
    for node in graph.nodes:
        stale = overwritten.intersection(node.all_input_nodes)
        if stale:
            name = next(iter(stale))
            raise WriteError(f"a kernel reads {name} after it was overwritten ({node})")
        if node.target is aten.copy_.default and node.args[0] in buffers and not node.users:
            overwritten |= same_memory(graph, [node.args[0]])
        elif node in writing:
            raise WriteError(f"a kernel modifies a tensor in place: {node.target} ({node})")
