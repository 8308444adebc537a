"""Aliases: views of one memory that a graph returns are made of one result, after the call.

    z = head(x)
    return z, z.view(-1, V), z[1]

What is written to one of the results is seen in the others. So of deferred logits, and of what a
region computes, only the tensor that owns the memory leaves the graph (also if it was not returned
itself); the views of it are made by the calls that made them in the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autochunk.find import fake, op_name
from autochunk.memory import storages, written_arguments
from autochunk.modes import recording_of

#: In-place calls after which a tensor is another view of its memory.
_RESHAPED = {
    *("squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_"),
    *("resize_", "as_strided_", "set_"),
}


@dataclass(frozen=True)
class Aliases:
    """What a graph's wrapper must put back in place.

    Attributes:
        gm: The graph without the views. Its outputs: the others, then owners that were not
            returned.
        outputs: The old graph's; of a node :attr:`returned` or :attr:`calls` have the value.
        returned: The outputs of ``gm``.
        placeholders: Of the old graph.
        calls: What makes the views, in order, and whether autograd records it.
    """

    gm: fx.GraphModule
    outputs: tuple[Any, ...]
    returned: tuple[Any, ...]
    placeholders: tuple[fx.Node, ...]
    calls: tuple[tuple[fx.Node, bool], ...]


def separate(gm: fx.GraphModule) -> Aliases | None:
    """A graph without those of its outputs that are views of another's memory; None: no such."""
    graph = gm.graph
    outputs = tuple(graph.output_node().args[0])
    views: dict[fx.Node, set[fx.Node]] = {}  # with the calls that make them
    owners: dict[fx.Node, None] = {}
    for owner, members in _groups(graph, outputs).items():
        made = {v: _calls(v, owner) for v in members if v is not owner}
        found = {view: calls for view, calls in made.items() if calls is not None}
        # A view left in the graph has a memory of its own.
        if found and len(found) == len(made):
            views.update(found)
            owners[owner] = None
    if not views:
        return None
    returned = [o for o in outputs if not isinstance(o, fx.Node) or o not in views]
    returned += [owner for owner in owners if owner not in returned]
    calls = set().union(*views.values())
    recording = recording_of(graph)
    return Aliases(
        gm=_returning(gm, returned),
        outputs=outputs,
        returned=tuple(returned),
        placeholders=tuple(node for node in graph.nodes if node.op == "placeholder"),
        calls=tuple((node, recording[node]) for node in graph.nodes if node in calls),
    )


def _groups(graph: fx.Graph, outputs: Sequence[Any]) -> dict[fx.Node, list[fx.Node]]:
    """Outputs that share memory, of which there are several, by the node that made the memory.

    Not what shares memory with an input.
    """
    first: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if isinstance(fake(node), Tensor):
            for storage in storages(fake(node)):
                first.setdefault(storage, node)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in dict.fromkeys(o for o in outputs if isinstance(o, fx.Node)):
        memory = storages(fake(node)) if isinstance(fake(node), Tensor) else frozenset()
        made = {first[storage] for storage in memory}
        if len(made) == 1:
            groups.setdefault(made.pop(), []).append(node)
    return {
        owner: members
        for owner, members in groups.items()
        if len(members) > 1 and owner.op in ("call_function", "call_method")
    }


def _calls(view: fx.Node, owner: fx.Node) -> set[fx.Node] | None:
    """The calls that make a view of what owns its memory and of numbers; None if others do."""
    memory = storages(fake(owner))
    found: set[fx.Node] = set()
    stack = [view]
    while stack:
        node = stack.pop()
        if node is owner or node.op == "placeholder" or node in found:
            continue
        value = fake(node)
        is_view = isinstance(value, Tensor | tuple | list) and not memory.isdisjoint(
            storages(value)
        )
        if node.op not in ("call_function", "call_method") or op_name(node) in _RESHAPED:
            return None
        if isinstance(value, Tensor) and not is_view:
            return None
        found.add(node)
        stack += _read(node)
    return found


def _read(node: fx.Node) -> list[fx.Node]:
    """What a call's result is made of: an in-place one returns what it has written to."""
    written = list(written_arguments(node))
    return written[:1] or node.all_input_nodes


def _returning(gm: fx.GraphModule, outputs: Sequence[Any]) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(gm.graph, copies)
    graph.output(fx.map_arg(tuple(outputs), copies.__getitem__))
    made = fx.GraphModule(gm, graph)
    made.meta = dict(gm.meta)
    return made


def rejoined(compiled: Callable[..., Any], aliases: Aliases) -> Callable[..., Any]:
    """What the old graph computes, by the compiled graph without the views."""

    def call(*args: Any) -> tuple[Any, ...]:
        env = dict(zip(aliases.placeholders, args, strict=True))
        for node, value in zip(aliases.returned, compiled(*args), strict=True):
            if isinstance(node, fx.Node):
                env[node] = value
        for node, is_recorded in aliases.calls:
            with contextlib.nullcontext() if is_recorded else torch.no_grad():
                env[node] = _value(node, env)
        return tuple(env[o] if isinstance(o, fx.Node) else o for o in aliases.outputs)

    return call


def _value(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    if written_arguments(node):
        return env[_read(node)[0]]
    args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)
