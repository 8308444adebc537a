"""Lift: re-interpret the lowered graph with rows as a batch dimension, and cut regions out of it.

    1. Walk the graph (``walk.py``). Refused heads are ordinary outer nodes, and the walk starts
       again without them.
    2. Do it once more with wide values that depend on no head (``sink.py``), unless that makes it
       worse.
    3. Equal pieces that cover the rows become one value again (``pieces.py``).
    4. What leaves is grouped by chain; each group is one region with its own copy of the body.

What is not optimal: two losses over differently selected rows of the same logits become two
regions, each with its own matrix product; so are two selections that meet in one op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from torch import fx

from autochunk.find import hint, is_marked_dynamic
from autochunk.sink import ancestors, sinkable
from autochunk.tables import with_tables
from autochunk.types import IndexCheck, Lifted, Lowered, Refusal, Region, RowValue
from autochunk.walk import Walk, parts, row_input_features


def lift(lowered: Lowered, defer: bool = True) -> Lifted:
    """Finds the regions of a lowered graph, and the reasons for the heads that have none.

    Args:
        defer: Heads whose logits are only returned are no refusals, though they have no region.
    """
    walk, refusals, groups = _walk(lowered, {}, defer)
    if walk.merging:
        return Lifted((), {}, {}, {}, (), (), merging=tuple(walk.merging))
    sunk = sinkable(lowered)
    if sunk and groups:
        with_sunk = _walk(lowered, sunk, defer)
        if (len(with_sunk[1]), len(with_sunk[2])) <= (len(refusals), len(groups)):
            walk, refusals, groups = with_sunk
    walk.drop_all_but(groups)
    regions = tuple(
        with_tables(_region(f"region{i}", walk, group)) for i, group in enumerate(groups)
    )
    return Lifted(
        regions=regions,
        refusals=refusals,
        values=walk.values,
        splits=walk.splits,
        tail=tuple(walk.tail),
        deferred=tuple(walk.deferred),
    )


def _walk(
    lowered: Lowered, sunk: Mapping[fx.Node, fx.Node], defer: bool
) -> tuple[Walk, dict[str, Refusal], list[list[RowValue]]]:
    refusals: dict[str, Refusal] = {}
    while True:
        walk = Walk(lowered, frozenset(refusals), sunk)
        walk.run()
        if walk.merging:
            return walk, {}, []
        found = walk.refusals(defer)
        if not found:
            break
        refusals.update(found)
    walk.join_pieces()
    return walk, refusals, _group(walk)


def _group(walk: Walk) -> list[list[RowValue]]:
    """Everything that leaves, grouped by the rows it is about; one value per body node.

    Values of sunk nodes alone leave with a group that reads the same tensors, or not at all.
    """
    groups: list[list[RowValue]] = []
    leaving = [*walk.values.values(), *(split.inner for split in walk.splits.values())]
    for value in sorted(leaving, key=lambda v: not walk.depends_on_head(v)):
        shared = value.heads & walk.names or value.heads
        for group in groups:
            # Same heads, so that one pass over the logits serves both.
            if group[0].chain == value.chain and any(member.heads & shared for member in group):
                known = {v.node: i for i, v in enumerate(group)}
                if value.node not in known:
                    group.append(value)
                elif value.needs_grad:
                    group[known[value.node]] = value
                break
        else:
            if walk.depends_on_head(value):
                groups.append([value])
    return groups


def _region(name: str, walk: Walk, outputs: Sequence[RowValue]) -> Region:
    """Cuts the part of the walk's body that ``outputs`` need out into a graph of its own."""
    needed = ancestors([value.node for value in outputs])
    rows = [p for p in walk.row_inputs if p in needed]
    shared = [p for p in walk.shared_inputs if p in needed]
    body = _subgraph(walk.body, [*rows, *shared], [value.node for value in outputs])
    for made, original in zip(body.graph.nodes, rows, strict=False):
        features = row_input_features(walk.row_inputs[original])
        made.meta["val"] = original.meta["val"].new_empty([outputs[0].rows, *features])
    grads = _differentiated(walk, outputs)
    heads = walk.names.intersection(frozenset().union(*(value.heads for value in outputs)))
    candidates = [c for c in walk.heads.values() if c.name in heads]
    checks, all_checked = _checks(walk, rows, shared, needed)
    chain = outputs[0].chain
    n_rows = outputs[0].rows
    widest = max(candidates, key=lambda c: c.out_features)
    head_node = next(n for n, c in walk.heads.items() if c is widest)
    return Region(
        name=name,
        body=body,
        row_inputs=tuple(walk.row_inputs[p] for p in rows),
        shared_inputs=tuple(walk.shared_inputs[p] for p in shared),
        outputs=tuple(outputs),
        chain=chain,
        heads=heads,
        checks=tuple(checks),
        all_checked=all_checked,
        row_grads=tuple(i for i, p in enumerate(rows) if p in grads),
        shared_grads=tuple(i for i, p in enumerate(shared) if p in grads),
        rows=n_rows,
        wide_features=_wide_features(walk, needed),
        wide_itemsize=head_node.meta["val"].element_size(),
        saved_bytes=sum(c.logits_bytes for c in candidates),
    )


def _wide_features(walk: Walk, needed: set[fx.Node]) -> int:
    """Elements a row of the logits, or of a value that is wider than all of them together."""
    logits = sum(c.out_features for p, c in walk.products.items() if p in needed)
    values = [v for found in walk.env.values() for v in parts(found) if v.node in needed]
    return max(logits, *(prod(hint(f) for f in v.features) for v in values))


def _differentiated(walk: Walk, outputs: Sequence[RowValue]) -> set[fx.Node]:
    """Inputs of the body that need a gradient and are connected to an output that has one."""
    stack = [value.node for value in outputs if value.needs_grad]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen and node not in walk.without_gradient:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    needed = walk.lowered.needs_grad
    rows = {p for p, spec in walk.row_inputs.items() if spec.source in needed}
    return seen & (rows | {p for p, source in walk.shared_inputs.items() if source in needed})


def _checks(
    walk: Walk, rows: Sequence[fx.Node], shared: Sequence[fx.Node], needed: set[fx.Node]
) -> tuple[list[IndexCheck], bool]:
    """Checks of the indices that do not depend on logits, and whether that is all of them."""
    checks, complete = [], True
    for index, size, wraps, source in walk.index_uses:
        if index not in needed:
            continue
        behind = ancestors([index])
        used = [p for p in rows if p in behind]
        used_shared = [p for p in shared if p in behind]
        # One computed from a weight is computed from the logits: not the user's.
        if not [*used, *used_shared] or any(p.meta["val"].is_floating_point() for p in used_shared):
            complete = False
            continue
        if is_marked_dynamic(size):
            continue  # the region will be refused
        checks.append(
            IndexCheck(
                graph=_subgraph(walk.body, [*used, *used_shared], [index]),
                row_inputs=tuple(rows.index(p) for p in used),
                shared_inputs=tuple(shared.index(p) for p in used_shared),
                size=int(size),  # specialises a symbolic one, as all features of a kernel are
                wraps=wraps,
                source=source,
            )
        )
    return checks, complete


def _subgraph(
    graph: fx.Graph, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    needed = ancestors(outputs)
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = new.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in graph.nodes:
        if node in needed and node not in env:
            env[node] = new.node_copy(node, env.__getitem__)
    new.output(tuple(env[node] for node in outputs))
    new.lint()
    return fx.GraphModule({}, new)
