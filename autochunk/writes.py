"""Writes: what a cone writes to, and how that is seen outside of it.

    self.hist[3] = loss.detach()      # hist is a buffer: the write must reach it
    return self.hist.sum()            # and its reader belongs to the cone

In the lowered graph a tensor is a value. One that the cone writes to and that was made before
enters as *one* input: every view of it that the cone uses is taken again inside, so that all of
them see the write.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from autochunk.find import fake, op_name, source_line
from autochunk.memory import (
    Conflict,
    Memory,
    Storage,
    is_alias,
    storages,
    written_arguments,
)
from autochunk.modes import recording_of
from autochunk.types import Refusal


@dataclass(frozen=True)
class Inside:
    """The calls that a lowered graph is made of.

    Attributes:
        nodes: The calls: the cone, what moved into it, and what is computed again.
        same: In-place calls outside whose result is wanted inside: the argument that it is.
        inputs: Nodes outside whose values the calls take, in graph order.
        outputs: Outputs of the Dynamo graph that the lowered graph computes.
        needing: The inputs through which a gradient flows when the cone begins.
    """

    nodes: frozenset[fx.Node]
    same: Mapping[fx.Node, fx.Node]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    needing: frozenset[fx.Node]


def inside_of(
    graph: fx.Graph,
    memory: Memory,
    cone: Collection[fx.Node],
    moved: Collection[fx.Node],
    repeated: Collection[fx.Node],
) -> Inside:
    """What runs inside, and what has to enter and to leave.

    Args:
        cone: What has to run after the heads.
        moved: What moves behind them.
        repeated: What is computed inside as well.
    """
    nodes = {*cone, *moved, *repeated}
    writing = [node for node in graph.nodes if node in nodes and memory.access(node).writes]
    written = frozenset().union(*(memory.access(node).writes for node in writing))
    foreign = {s for s in written if memory.base(s) not in nodes}
    output = graph.output_node()
    outputs = tuple(node for node in output.all_input_nodes if _leaves(node, memory, cone, foreign))
    same: dict[fx.Node, fx.Node] = {}
    stack = [arg for node in nodes for arg in node.all_input_nodes]
    stack += outputs
    while stack:
        node = stack.pop()
        if node in nodes or node in same or storages(fake(node)).isdisjoint(foreign):
            continue
        if node in map(memory.base, storages(fake(node))):
            continue
        if is_alias(node):
            nodes.add(node)
            stack.extend(node.all_input_nodes)
        else:
            same[node] = written_arguments(node)[0]
            stack.append(same[node])
    wanted = {arg for node in nodes for arg in node.all_input_nodes} | {*same.values(), *outputs}
    inputs = tuple(n for n in graph.nodes if n in wanted and n not in nodes and n not in same)
    needing = frozenset(n for n in inputs if _needs_grad_before(n, memory, nodes, foreign))
    return Inside(frozenset(nodes), same, inputs, outputs, needing)


def _leaves(
    node: fx.Node, memory: Memory, cone: Collection[fx.Node], foreign: Collection[Storage]
) -> bool:
    """Whether an output is computed inside; an alias of an input of the graph never is."""
    held = storages(fake(node))
    if any(map(memory.is_input, held)):
        return False
    return node in cone or not held.isdisjoint(foreign)


def _needs_grad_before(
    node: fx.Node, memory: Memory, nodes: Collection[fx.Node], foreign: Collection[Storage]
) -> bool:
    """Whether a gradient flows through an input, before the cone writes to it.

    The fake of a tensor that is written to tells what is true at the end of the graph.
    """
    value = fake(node)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return False
    held = storages(value)
    if held.isdisjoint(foreign):
        return True
    if node.op in ("placeholder", "get_attr"):
        argument = node.meta.get("grapharg")
        example = None if argument is None else argument.example
        return not isinstance(example, Tensor) or example.requires_grad
    before = [
        writer
        for writer, access in memory.accesses.items()
        if writer not in nodes and not access.writes.isdisjoint(held)
    ]
    feeding = [arg for n in (node, *before) for arg in n.all_input_nodes]
    return any(_carries_gradient(arg) for arg in feeding if storages(fake(arg)).isdisjoint(foreign))


def _carries_gradient(node: fx.Node) -> bool:
    value = fake(node)
    return isinstance(value, Tensor) and value.requires_grad


def refuse_writes(
    graph: fx.Graph, memory: Memory, cone: Mapping[fx.Node, Conflict | None]
) -> Refusal | None:
    """A write in a cone that has no functional form, as a refusal."""
    recording = recording_of(graph)
    never = not any(recording[node] for node in cone)  # then nothing has a gradient
    for node in graph.nodes:
        access = memory.access(node)
        if node not in cone or not access.writes:
            continue
        reason = _not_functional(node, memory, recording[node] or never)
        if reason is not None:
            conflict = conflict_behind(cone, node)
            if conflict is not None:
                reason = f"{reason}; {describe(memory, conflict)}"
            return Refusal("mutation", op_name(node), reason, source_line(node))
    return None


def _not_functional(node: fx.Node, memory: Memory, grad_enabled: bool) -> str | None:
    """Why a write cannot be made a value of its own, if it cannot."""
    access = memory.access(node)
    for storage in sorted(access.writes):
        name = name_of(memory, storage)
        if access.hidden:
            return f"{op_name(node)} updates {name} inside"
        base = memory.base(storage)
        if base is None:
            others = [n for n in memory.holders[storage] if n.op in ("placeholder", "get_attr")]
            names = " and ".join(tensor_name(n) for n in others)
            return f"{op_name(node)} writes to memory that {names or name} share"
        holders = memory.holders[storage]
        recorded = grad_enabled and any(
            _carries_gradient(arg) for arg in written_arguments(node) if arg in holders
        )
        if any(map(_carries_gradient, holders)) and not recorded:
            return f"{op_name(node)} writes to {name}, which has a gradient, behind autograd's back"
    return None


def conflict_behind(cone: Mapping[fx.Node, Conflict | None], node: fx.Node) -> Conflict | None:
    """The conflict that made a node, or what it takes a value of, part of a cone."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        conflict = cone.get(current)
        if conflict is not None:
            return conflict
        for arg in current.all_input_nodes:
            if arg in cone and arg not in seen:
                seen.add(arg)
                stack.append(arg)
    return None


def describe(memory: Memory, conflict: Conflict) -> str:
    """``setitem writes to out (file:9: …), which sum reads (file:10: …)``."""
    writer, reader = conflict.writer, conflict.reader
    verb = "writes to as well" if conflict.storage in memory.access(reader).writes else "reads"
    return (
        f"{op_name(writer)} writes to {name_of(memory, conflict.storage)} "
        f"({source_line(writer)}), which {op_name(reader)} {verb} ({source_line(reader)})"
    )


def name_of(memory: Memory, storage: Storage) -> str:
    """A tensor's name as the user knows it: an attribute, an argument or a variable."""
    holders = memory.holders.get(storage, ())
    return tensor_name(holders[0]) if holders else "a tensor"


def tensor_name(node: fx.Node) -> str:
    """``self.hist`` for what Dynamo calls ``L['self']._buffers['hist']``."""
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    if source is None:
        return node.name
    name = source.name if isinstance(source.name, str) else source.name()
    name = re.sub(r"\._(?:buffers|parameters|modules)\['(\w+)'\]", r".\1", name)
    return re.sub(r"L\['(\w+)'\]", r"\1", name)
