"""Pieces: a loop over rows in the user's code becomes one pass over the logits again.

    torch.stack([torch.logsumexp(row, -1) for row in logits])

Each turn of the loop selects other rows and would become a region with its own matrix product.
Where all turns compute the same thing and together they cover the rows, it is computed for all
rows at once, and the selection is done on the narrow result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx

from autochunk.types import RowInput, RowOp, RowValue

aten = torch.ops.aten
Key = TypeVar("Key")


def join(
    values: Mapping[Key, RowValue], body: fx.Graph, row_inputs: Mapping[fx.Node, RowInput]
) -> dict[Key, RowValue]:
    """The same values, those that are pieces of one computed from it (``RowValue.selected``).

    Args:
        values: What leaves a body.
        body: Their graph.
        row_inputs: Its row-aligned placeholders.
    """
    same = _equal_nodes(body)
    depth = _depths(body, row_inputs)
    found = dict(values)
    while True:
        groups: dict[Any, list[Key]] = {}
        for key, value in found.items():
            if value.chain and depth[value.node] < len(value.chain):
                kind = (same[value.node], value.chain[:-1], value.needs_grad)
                groups.setdefault(kind, []).append(key)
        joined = [
            (node, keys)
            for (node, _, _), keys in groups.items()
            if _cover_the_rows([found[key].chain[-1] for key in keys])
        ]
        if not joined:
            return found
        for node, keys in joined:
            for key in keys:
                value = found[key]
                selected = (value.chain[-1], *value.selected)
                found[key] = replace(value, node=node, chain=value.chain[:-1], selected=selected)


def whole(
    values: Sequence[RowValue], body: fx.Graph, row_inputs: Mapping[fx.Node, RowInput]
) -> RowValue | None:
    """The value that ``values``, in this order, are all the pieces of; its shape is to be set.

    ``torch.cat(logits.chunk(4))``, ``torch.stack([z.float() for z in logits])``
    """
    first = values[0]
    if len(values) < 2 or any(not v.chain for v in values):
        return None
    same, depth = _equal_nodes(body), _depths(body, row_inputs)
    kind = (same[first.node], first.chain[:-1], first.is_row)
    if any((same[v.node], v.chain[:-1], v.is_row) != kind for v in values):
        return None
    steps = [v.chain[-1] for v in values]
    if depth[first.node] >= len(first.chain) or not _cover_the_rows(steps):
        return None
    size = steps[0].in_shape[steps[0].args[0]]
    if steps[0].target is aten.select.int:
        begins = [s.args[1] % size for s in steps]
    else:
        begins = [slice(*s.args[1:3]).indices(size)[0] for s in steps]
    if begins != sorted(set(begins)):
        return None
    rows = steps[0].in_shape
    return replace(
        first,
        chain=first.chain[:-1],
        shape=(*rows, *first.features),
        is_row=(True,) * len(rows) + (False,) * len(first.features),
    )


def _equal_nodes(body: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node the first one that computes the same."""
    first: dict[str, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in body.nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), same.__getitem__)
            same[node] = first.setdefault(str((node.target, args, kwargs)), node)
        else:
            same[node] = node
    return same


def _depths(body: fx.Graph, row_inputs: Mapping[fx.Node, RowInput]) -> dict[fx.Node, int]:
    """For each node the length of the longest chain that an input of its had been through."""
    depth: dict[fx.Node, int] = {}
    for node in body.nodes:
        own = len(row_inputs[node].chain) if node in row_inputs else 0
        depth[node] = max([own, *(depth[arg] for arg in node.all_input_nodes)])
    return depth


def _cover_the_rows(steps: Sequence[RowOp]) -> bool:
    """Whether selections of the same rows take every row, and none twice."""
    unique = list(dict.fromkeys(steps))
    if len(unique) < 2 or len({(s.target, s.args[:1], str(s.in_shape)) for s in unique}) > 1:
        return False
    size = unique[0].in_shape[unique[0].args[0]]
    if not isinstance(size, int) or not all(isinstance(a, int) for s in unique for a in s.args):
        return False
    if unique[0].target is aten.select.int:
        return sorted(s.args[1] % size for s in unique) == list(range(size))
    if unique[0].target is not aten.slice.Tensor or any(s.args[3] != 1 for s in unique):
        return False
    end = 0
    for start, stop in sorted(slice(*s.args[1:3]).indices(size)[:2] for s in unique):
        if start != end:
            return False
        end = stop
    return end == size
