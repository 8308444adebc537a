"""Order: what a rewrite must not change about the order of reads and writes.

A second look, whatever decided on the cone: calls that share memory run in the order in which the
user wrote them, no write is lost, and what is computed after the call is not written to before.
"""

from __future__ import annotations

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


def refuse_deferral(memory: Memory, lowered: Lowered, lifted: Lifted) -> dict[str, Refusal]:
    """Heads whose logits are returned although the graph writes to what they are made of.

    Deferred logits are computed after the call, when those tensors have other values.
    """
    if not lowered.writes or not lifted.deferred:
        return {}
    written = storages([fake(node) for node in lowered.writes])
    sources = lowered.sources
    found: dict[str, Refusal] = {}
    for wide in lifted.deferred:
        behind = ancestors([wide])
        for node in behind & sources.keys():
            for storage in storages(fake(sources[node])) & written:
                detail = (
                    f"the logits are returned, and the graph writes to {name_of(memory, storage)}, "
                    "which they are computed from"
                )
                refusal = Refusal("mutation", op_name(wide), detail, source_line(wide))
                heads = (lowered.heads[n].name for n in behind if n in lowered.heads)
                found.update(dict.fromkeys(heads, refusal))
    return found
