"""Sink: wide values that do not depend on a head move into the chunks, with what computes them.

    F.kl_div(F.linear(x, w).log_softmax(-1), teacher_logits.softmax(-1))
    -(F.one_hot(labels, V) * F.linear(x, w).log_softmax(-1)).sum(-1).mean()

The teacher's softmax and the one-hot labels are as large as the logits, and only the cone reads
them. Computed per chunk from what they are made of, they are never materialised. First the Dynamo
nodes that compute them join the cone (:func:`producers`); then ``lift`` tries its rules on their
ATen ops (:func:`sinkable`), and computes outside what has none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from autochunk.find import (
    LAYERS,
    fake,
    hint,
    is_derivative,
    is_grad_function,
    is_inplace,
    op_name,
    parse_linear,
    refuse_subclass,
    tensors_of,
)
from autochunk.memory import Access, Memory
from autochunk.types import NARROW, Candidate, Lowered


def producers(
    graph: fx.Graph, memory: Memory, cone: Collection[fx.Node], heads: Sequence[Candidate]
) -> frozenset[fx.Node]:
    """Dynamo nodes whose wide values only the cone reads, and what only the cone makes of them.

    What the heads themselves are computed from is not among them. In-place ops are, where they
    write to a tensor made here. A node whose arguments are written to before the cone runs, or
    whose own memory somebody else uses, is not.
    """
    least = min(hint(fake(c.node).numel()) for c in heads)
    needed = ancestors([c.node for c in heads])
    found = _movable(
        graph,
        memory,
        cone,
        {
            n
            for n in graph.nodes
            if n not in cone and n not in needed and _is_pure(n, memory.access(n))
        },
    )
    sunk: set[fx.Node] = set()
    for node in graph.nodes:
        wide = any(hint(t.numel()) * NARROW > least for t in tensors_of(fake(node)))
        if node in found and (wide or any(a in sunk for a in node.all_input_nodes)):
            sunk.add(node)
    return frozenset(_movable(graph, memory, cone, sunk))


def _is_part(node: fx.Node) -> bool:
    """Whether a call takes one of several results: it stays where they are."""
    return op_name(node) == "getitem" and isinstance(fake(node.args[0]), (tuple, list))


def _movable(
    graph: fx.Graph, memory: Memory, cone: Collection[fx.Node], nodes: set[fx.Node]
) -> set[fx.Node]:
    """The largest part of ``nodes`` that could run right before the cone instead."""
    while True:
        inside = {*nodes, *cone}
        users_inside = {
            n
            for n in nodes
            if all(user in inside for user in n.users)
            and (n.users or memory.access(n).writes)
            and all(memory.base(storage) in inside for storage in memory.access(n).writes)
            and (not _is_part(n) or n.args[0] in nodes)
        }
        if users_inside != nodes:
            nodes = users_inside
            continue
        crossed = memory.reordered(graph, inside)
        if crossed is None or crossed[0] in cone:  # the cone alone keeps the order
            return nodes
        nodes = nodes - {crossed[0]}


def _is_pure(node: fx.Node, access: Access) -> bool:
    """Whether a call computes tensors from its arguments and could be made later as well."""
    target = node.target
    if node.op not in ("call_function", "call_method"):
        return False
    if not tensors_of(fake(node)) and not is_inplace(node):
        return False
    if access.hidden:
        return False
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target).split(".")[0] in ("aten", "prims")
    if isinstance(target, torch._ops.HigherOrderOperator) or is_grad_function(target):
        return False
    if is_derivative(node) or refuse_subclass(node) is not None:
        return False
    return parse_linear(node) is None and target not in LAYERS


def sinkable(lowered: Lowered) -> Mapping[fx.Node, fx.Node]:
    """ATen nodes that could be computed per chunk although they do not depend on a head.

    They are wide, or made of such; and nothing but they and the heads' cones reads them. Views of
    what exists anyway are not among them.

    Returns:
        For each node the wide one it leads to, whose rows should be those of the heads.
    """
    nodes = list(lowered.graph.graph.nodes)
    dependent: set[fx.Node] = set(lowered.heads)
    for node in nodes:
        if node.op == "call_function" and any(a in dependent for a in node.all_input_nodes):
            dependent.add(node)
    needed = ancestors(lowered.heads)
    least = min((hint(n.meta["val"].numel()) for n in lowered.heads), default=0)
    wide: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in nodes:
        tensors = tensors_of(node.meta.get("val"))
        if node.op != "call_function" or node in dependent or node in needed or not tensors:
            continue
        args = [a for a in node.all_input_nodes if tensors_of(a.meta.get("val"))]
        if any(hint(t.numel()) * NARROW > least for t in tensors):
            wide.add(node)
        if any(a in found for a in args) or (node in wide and args and not _is_view(node)):
            found.add(node)
    while True:
        kept = {n for n in found if all(user in found or user in dependent for user in n.users)}
        if kept == found:
            break
        found = kept
    leads_to: dict[fx.Node, fx.Node] = {}
    for node in reversed(nodes):
        if node in found:
            ends = [leads_to[user] for user in node.users if user in found and user in wide]
            leads_to[node] = ends[0] if ends and node in wide else node
    return leads_to


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that ``nodes`` are computed from, themselves included."""
    seen = set(nodes)
    stack = list(seen)
    while stack:
        for arg in stack.pop().all_input_nodes:
            if arg not in seen:
                seen.add(arg)
                stack.append(arg)
    return seen


def rows_of(shape: Sequence[Any], wide: Sequence[Any]) -> tuple[bool, ...] | None:
    """Which dimensions of a tensor are rows, if the leading ones are those of a wide value.

    ``[B, T, V]`` or ``[B·T, V]`` for a wide ``[B, T, V]``; labels ``[B, T]``, ``[B·T, 1]``.
    """
    rows = prod(wide[:-1])
    for k in range(1, len(shape) + 1):
        if statically_known_true(prod(shape[:k]) == rows):
            return tuple(d < k and not statically_known_true(s == 1) for d, s in enumerate(shape))
    return None


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(
        result.alias_info is not None for result in target._schema.returns
    )
