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
)
from autochunk.types import NARROW, Candidate, Lowered

_FACTORIES = {"zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "clone"}
_FACTORIES |= {"new_zeros", "new_ones", "new_full"}


def producers(
    graph: fx.Graph, cone: Collection[fx.Node], heads: Sequence[Candidate]
) -> set[fx.Node]:
    """Dynamo nodes whose wide values only the cone reads, and what only the cone makes of them.

    What the heads themselves are computed from is not among them. In-place ops are, where they
    write to a tensor made here. There are none where a tensor that they read could be modified
    before the cone runs.
    """
    least = min(hint(fake(c.node).numel()) for c in heads)
    needed = ancestors([c.node for c in heads])
    found = {n for n in graph.nodes if n not in cone and n not in needed and _is_pure(n)}
    made: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in found or (is_inplace(node) and node.args[0] not in made):
            continue
        if op_name(node) in _FACTORIES or is_inplace(node):
            made.add(node)
    while True:
        kept = {
            n
            for n in found
            if all(user in found or user in cone for user in n.users)
            and (n.users or is_inplace(n))
            and (not is_inplace(n) or (n in made and n.args[0] in found))
            and (not _is_part(n) or n.args[0] in found)
        }
        if kept == found:
            break
        found = kept
    sunk: set[fx.Node] = set()
    for node in graph.nodes:
        wide = any(hint(t.numel()) * NARROW > least for t in _tensors(fake(node)))
        if node in found and (wide or any(a in sunk for a in node.all_input_nodes)):
            sunk.add(node)
    moved = False
    for node in graph.nodes:
        moved = moved or node in sunk
        if moved and is_inplace(node) and node not in sunk and node not in cone:
            return set()
    return sunk


def _is_part(node: fx.Node) -> bool:
    """Whether a call takes one of several results: it stays where they are."""
    return op_name(node) == "getitem" and isinstance(fake(node.args[0]), (tuple, list))


def _is_pure(node: fx.Node) -> bool:
    """Whether a call computes tensors from its arguments and could be made later as well."""
    target = node.target
    if node.op not in ("call_function", "call_method"):
        return False
    if not _tensors(fake(node)) and not is_inplace(node):
        return False
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target).split(".")[0] in ("aten", "prims")
    if isinstance(target, torch._ops.HigherOrderOperator) or is_grad_function(target):
        return False
    if is_derivative(node) or refuse_subclass(node) is not None:
        return False
    return parse_linear(node) is None and target not in LAYERS


def _tensors(value: Any) -> list[torch.Tensor]:
    found = value if isinstance(value, (tuple, list)) else (value,)
    return [t for t in found if isinstance(t, torch.Tensor)]


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
        tensors = _tensors(node.meta.get("val"))
        if node.op != "call_function" or node in dependent or node in needed or not tensors:
            continue
        args = [a for a in node.all_input_nodes if _tensors(a.meta.get("val"))]
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
