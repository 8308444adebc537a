"""Order: what a rewrite must not change about the order of reads and writes.

A second look, whatever decided on the cone: calls that share memory run in the order in which the
user wrote them, no write is lost, and what is computed after the call is not written to before.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from autochunk.find import fake, op_name, source_line
from autochunk.memory import Memory, storages
from autochunk.sink import ancestors
from autochunk.types import Lifted, Lowered, Refusal
from autochunk.writes import name_of


class ReorderedError(RuntimeError):
    """A rewrite that would move a reader of a tensor past a writer of it: a fault of ours."""


def check_order(graph: fx.Graph, memory: Memory, lowered: Lowered) -> None:
    """Checks that calls which share memory keep their order, whatever decided on the cone.

    Raises:
        ReorderedError: where one would not, or where a write would get lost.
    """
    crossed = memory.reordered(graph, lowered.inside)
    if crossed is not None:
        first, second = crossed
        raise ReorderedError(
            f"{op_name(first)} ({source_line(first)}) would run after {op_name(second)} "
            f"({source_line(second)}), and one of them writes to memory that the other one uses"
        )
    kept = storages([fake(node) for node in lowered.writes])
    for node in lowered.inside:
        for storage in memory.access(node).writes - kept:
            if memory.is_input(storage):
                raise ReorderedError(f"what {op_name(node)} writes would be lost")


def refuse_deferral(
    graph: fx.Graph, memory: Memory, lowered: Lowered, lifted: Lifted
) -> dict[str, Refusal]:
    """Heads whose logits are returned although they cannot be computed after the call.

    The graph writes to what they are made of, so that it has other values then; or how many rows
    there are depends on data, and nothing but the logits themselves would tell.
    """
    found: dict[str, Refusal] = {}
    for wide in lifted.deferred:
        behind = ancestors([wide])
        refusal = _rows_unknown(graph, lowered, lifted, wide)
        refusal = refusal or _overwritten(memory, lowered, wide, behind)
        if refusal is not None:
            heads = (lowered.heads[n].name for n in behind if n in lowered.heads)
            found.update(dict.fromkeys(heads, refusal))
    return found


def _overwritten(
    memory: Memory, lowered: Lowered, wide: fx.Node, behind: Collection[fx.Node]
) -> Refusal | None:
    written = storages([fake(node) for node in lowered.writes])
    for node, source in lowered.sources.items():
        if node in behind:
            for storage in storages(fake(source)) & written:
                detail = (
                    f"the logits are returned, and the graph writes to {name_of(memory, storage)}, "
                    "which they are computed from"
                )
                return Refusal("mutation", op_name(wide), detail, source_line(wide))
    return None


def _rows_unknown(
    graph: fx.Graph, lowered: Lowered, lifted: Lifted, wide: fx.Node
) -> Refusal | None:
    if not _unbacked(wide.meta["val"]):
        return None
    known = [fake(node) for node in graph.nodes if node not in lowered.cone]
    heads = lowered.heads.keys()
    known += [n.meta.get("val") for n in ancestors([wide]) if heads.isdisjoint(ancestors([n]))]
    known += [node.meta.get("val") for node in lifted.tail]
    known += [step.out_shape for region in lifted.regions for step in region.chain]
    if _unbacked(wide.meta["val"]) <= set().union(*map(_unbacked, known)):
        return None
    detail = "the logits are returned, and how many rows are selected depends on data"
    return Refusal("unsupported-graph", op_name(wide), detail, source_line(wide))


def _unbacked(value: Any) -> set[Any]:
    """The symbols that depend on data, of a size, of several or of a tensor's."""
    sizes = value.shape if isinstance(value, torch.Tensor) else value
    if isinstance(sizes, (tuple, list)):
        return set().union(*map(_unbacked, sizes))
    is_known = not isinstance(sizes, torch.SymInt) or sizes.node.hint is not None
    return set() if is_known else set(sizes.node.expr.free_symbols)
