"""Twin: a product whose rows and columns are both reduced is computed once for each.

    logits = a @ b.T                                          logits = a @ b.T
                                                         →    columns = (b @ a.T).T
    cross_entropy(logits, y) + cross_entropy(logits.T, y)     … + cross_entropy(columns.T, y)

A chunk of rows cannot reduce a column; a chunk of the transposed product's rows can. The product
runs a second time for it, so only a head that is refused otherwise gets a twin. Columns that are
reduced without a transposition (``logits.softmax(0)``) are left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from autochunk.find import as_candidate, fake, is_random, op_name
from autochunk.memory import Memory
from autochunk.sink import ancestors

_TRANSPOSING = {"t", "T", "mT", "H", "transpose", "permute", "swapaxes", "swapdims", "movedim"}


def with_twin(gm: fx.GraphModule, name: str) -> fx.GraphModule | None:
    """A copy of a graph in which what transposes a head's output has a product of its own.

    Args:
        gm: Dynamo's graph; it is not modified.
        name: Of the head's node.

    Returns:
        None where the head is no product of two matrices, or nothing transposes it.
    """
    graph = _copied(gm.graph)
    (head,) = (node for node in graph.nodes if node.name == name)
    candidate = as_candidate(head)
    if candidate is None or candidate.bias is not None or fake(candidate.x).dim() != 2:
        return None
    if candidate.weight_layout not in ("VH", "HV"):
        return None
    memory = Memory.of(graph)
    cone = memory.dependents(graph, [head])
    transposing = [node for node in cone if _transposes(node, head)]
    path = ancestors(transposing).intersection(cone) - {*transposing, head}
    if not transposing or any(is_random(node) for node in path):
        return None
    if any(memory.access(node).writes for node in cone):
        return None  # a second product would need what is written a second time
    x, weight = candidate.x, candidate.weight
    with graph.inserting_before(head.next):
        other = weight
        if candidate.weight_layout == "HV":
            other = _call(graph, head, "t", weight)
        product = _call(graph, head, torch.matmul, other, _call(graph, head, "t", x))
        twins = {head: _call(graph, head, "t", product)}
    for node in cone:
        if node in path:
            with graph.inserting_after(node):
                twins[node] = graph.node_copy(node, lambda arg: twins.get(arg, arg))
        elif node in transposing:
            node.args, node.kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda arg: twins.get(arg, arg)
            )
    for node in reversed([head, *(node for node in cone if node in path)]):
        if not node.users:
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(gm, graph)


def _copied(graph: fx.Graph) -> fx.Graph:
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = made.node_copy(node, copies.__getitem__)
    return made


def _transposes(node: fx.Node, head: fx.Node) -> bool:
    """Whether a node transposes the logits, or a value of their shape."""
    operand = node.args[0] if node.args else None
    value = fake(operand) if isinstance(operand, fx.Node) else None
    if not isinstance(value, Tensor) or value.shape != fake(head).shape:
        return False
    name = op_name(node)
    return (node.args[1] if name == "getattr" else name) in _TRANSPOSING


def _call(graph: fx.Graph, head: fx.Node, target: Any, *args: fx.Node) -> fx.Node:
    """A call next to ``head``, of a function or a method."""
    values = [fake(arg) for arg in args]
    if isinstance(target, str):
        node, value = graph.call_method(target, args), getattr(values[0], target)(*values[1:])
    else:
        node, value = graph.call_function(target, args), target(*values)
    node.meta = {"example_value": value, "stack_trace": head.meta.get("stack_trace")}
    return node
