"""Grouping: regions of one weight are computed by one op, which has one gradient of the weight.

Eight prediction heads that share a weight would make eight gradients of its size, which autograd
adds up. Regions do not read each other's outputs, so that any of them can run together. They must
know their cotangents at the same time: fused regions of one loss do, and so do recomputed ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from autochunk.config import Options
from autochunk.find import hint
from autochunk.rewrite import Grouped, Scheduled
from autochunk.runtime import group_key
from autochunk.types import Lowered, Region
from autochunk.walk import row_input_features

aten = torch.ops.aten

#: Of equal arguments they give equal results: a weight is often transposed or cast once per head.
_PURE = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten.detach.default,
    aten._to_copy.default,
}


def kept_more_than_once(scheduled: Sequence[Scheduled]) -> frozenset[str]:
    """Fused regions that should be recomputed: names.

    Their losses are several, so that a gradient of the weight would be kept for each, and it takes
    more bytes than the logits that an unchunked model keeps.
    """
    found: set[str] = set()
    for items in _of_one_weight(scheduled):
        fused = [item for item in items if item.plan.strategy == "fused"]
        if fused and len({_loss(item) for item in items}) > 1:
            weights = {key: node for item in fused for key, node in _weights(item.region)}
            logits = min(item.region.saved_bytes for item in fused)
            if sum(_bytes(node.meta["val"]) for node in weights.values()) > logits:
                found.update(item.region.name for item in fused)
    return frozenset(found)


def grouped(lowered: Lowered, scheduled: Sequence[Scheduled], options: Options) -> list[Grouped]:
    """The regions in groups, in order."""
    groups: list[list[Scheduled]] = []
    for items in _of_one_weight(scheduled):
        by_loss: dict[Any, list[Scheduled]] = {}
        for item in items:
            by_loss.setdefault(_loss(item), []).append(item)
        groups += by_loss.values()
    order = {item.region.name: i for i, item in enumerate(scheduled)}
    groups.sort(key=lambda items: order[items[0].region.name])
    return [_group(lowered, items, options) for items in groups]


def _group(lowered: Lowered, items: Sequence[Scheduled], options: Options) -> Grouped:
    known: dict[Any, fx.Node] = {}
    shared = tuple(
        tuple(known.setdefault(_same(node), node) for node in item.region.shared_inputs)
        for item in items
    )
    sums: dict[fx.Node, int] = {}
    with_gradients = items[0].plan.strategy != "forward"
    places = [
        [sums.setdefault(nodes[i], len(sums)) for i in item.region.shared_grads if with_gradients]
        for item, nodes in zip(items, shared, strict=True)
    ]
    sources = lowered.sources
    inputs = all(w in sources and sources[w].op in ("placeholder", "get_attr") for w in sums)
    members = [(item.key, p) for item, p in zip(items, places, strict=True)]
    return Grouped(
        items=tuple(items),
        shared=shared,
        key=group_key(members, inputs),
        kept=_can_keep(items, list(sums), options),
    )


def _can_keep(items: Sequence[Scheduled], weights: Sequence[fx.Node], options: Options) -> bool:
    """Whether a group's gradients may be kept outside of the graph.

    A CUDA graph replays what it has recorded: it can decide nothing. The inputs of the regions are
    kept instead of their gradients, which should not be more.
    """
    device = items[0].region.outputs[0].val.device.type
    graphs = options.inductor.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs)
    if items[0].plan.strategy != "fused" or options.strategy != "auto":
        return False
    if device == "cuda" and graphs:
        return False
    inputs = [(spec, item.region) for item in items for spec in item.region.row_inputs]
    differentiated = [
        (item.region.row_inputs[i], item.region) for item in items for i in item.region.row_grads
    ]
    gradients = sum(_row_bytes(differentiated)) + sum(_bytes(w.meta["val"]) for w in weights)
    return sum(_row_bytes(inputs)) <= gradients


def _row_bytes(specs: Iterable[tuple[Any, Region]]) -> Iterable[int]:
    for spec, region in specs:
        size = spec.source.meta["val"].element_size() * hint(region.rows)
        for features in row_input_features(spec):
            size *= hint(features)
        yield size


def _of_one_weight(scheduled: Sequence[Scheduled]) -> list[list[Scheduled]]:
    """The regions, those together that are connected by weights with a gradient."""
    found: list[tuple[set[Any], list[Scheduled]]] = []
    for item in scheduled:
        weights = {key for key, _ in _weights(item.region)}
        if item.plan.strategy == "forward":
            weights = set()
        together = [item]
        apart = []
        for others, items in found:
            if others & weights:
                weights |= others
                together = [*items, *together]
            else:
                apart.append((others, items))
        found = [*apart, (weights, together)]
    return [items for _, items in found]


def _weights(region: Region) -> list[tuple[Any, fx.Node]]:
    """The matrices among a region's shared inputs that have a gradient."""
    nodes = [region.shared_inputs[i] for i in region.shared_grads]
    return [(_same(node), node) for node in nodes if node.meta["val"].dim() == 2]


def _loss(item: Scheduled) -> Any:
    """Regions of one weight with the same one can be one group."""
    known = item.cotangents
    return (item.plan.strategy, known.loss if known is not None else None)


def _same(node: fx.Node) -> Any:
    """Equal for nodes that have the same value."""
    if node.op == "call_function" and node.target in _PURE:
        rest = repr((node.args[1:], sorted(node.kwargs.items())))
        return (node.target, _same(node.args[0]), rest)
    return node


def _bytes(val: torch.Tensor) -> int:
    return hint(val.numel()) * val.element_size()
