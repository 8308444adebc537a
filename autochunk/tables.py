"""Tables: a wide row input that would have to be copied is read where it lies.

    F.kl_div(z[:, :-1].log_softmax(-1), teacher_logits[:, :-1].softmax(-1))    a selection of rows
    F.mse_loss(z, prototypes[:, None])                                         rows broadcast
    F.mse_loss(z.transpose(1, 2), target_BVT)                                  another layout

The loop cuts its row inputs into chunks, for which each must be ``[rows, *features]`` in memory.
One that is as wide as the logits and lies otherwise would be copied, at the logits' size. Instead
every chunk is given all of it, as it is, and for each row dimension the rows' positions:

    body(x, target)    →    body(x, b, t, target) with target[b, t]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import fx

from autochunk.find import hint
from autochunk.types import NARROW, IndexCheck, Region, RowInput

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.mv.default)


def with_tables(region: Region) -> Region:
    """The region with its wide row inputs that would be copied as shared inputs."""
    placeholders = [n for n in region.body.graph.nodes if n.op == "placeholder"]
    n_rows = len(region.row_inputs)
    checked = {i for check in region.checks for i in check.row_inputs}
    tables = [
        i
        for i, (spec, node) in enumerate(zip(region.row_inputs, placeholders, strict=False))
        if i not in checked
        and not any(user.target in _PRODUCTS for user in node.users)
        and _would_be_copied(spec, region)
        and (i not in region.row_grads or _is_small(spec, region))
    ]
    if not tables:
        return region
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    rows: list[RowInput] = []
    for i, (spec, node) in enumerate(zip(region.row_inputs, placeholders, strict=False)):
        if i not in tables:
            env[node] = _placeholder(new, node.name, node.meta["val"])
            rows.append(spec)
    positions = {i: _positions(region.row_inputs[i]) for i in tables}
    total = region.outputs[0].rows
    at: dict[RowInput, fx.Node] = {}
    for i in tables:
        for spec in positions[i]:
            if spec not in at:
                val = spec.source.meta["val"].new_empty([total], dtype=spec.dtype)
                at[spec] = _placeholder(new, f"position{len(at)}", val)
                rows.append(spec)
    for node in placeholders[n_rows:]:
        env[node] = _placeholder(new, node.name, node.meta["val"])
    shared = list(region.shared_inputs)
    some_row = next(iter(env.values()))  # a product's operand is no table
    whole = {}
    for i in tables:
        source = region.row_inputs[i].source
        whole[i] = _placeholder(new, f"table{i}", source.meta["val"])
        shared.append(source)
    for i in tables:
        spec = region.row_inputs[i]
        env[placeholders[i]] = _read(new, spec, whole[i], [at[p] for p in positions[i]], some_row)
    for node in region.body.graph.nodes:
        if node.op == "call_function":
            env[node] = new.node_copy(node, env.__getitem__)
    output = region.body.graph.output_node()
    new.output(tuple(env[n] for n in output.args[0]))
    new.lint()
    kept = [i for i in range(n_rows) if i not in tables]
    return replace(
        region,
        body=fx.GraphModule({}, new),
        row_inputs=tuple(rows),
        shared_inputs=tuple(shared),
        checks=tuple(_moved(check, kept) for check in region.checks),
        row_grads=tuple(kept.index(i) for i in region.row_grads if i in kept),
        shared_grads=(
            *region.shared_grads,
            *(len(region.shared_inputs) + tables.index(i) for i in region.row_grads if i in tables),
        ),
    )


def _would_be_copied(spec: RowInput, region: Region) -> bool:
    """Whether ``[rows, *features]`` of an input is a copy as wide as the logits."""
    if spec.repeated or not all(isinstance(s, int) for s in spec.shape):
        return False
    val = spec.source.meta["val"]
    pad = len(spec.is_row) - val.dim()
    features = [s for s, row in zip(spec.shape, spec.is_row[pad:], strict=True) if not row]
    if prod(features) * NARROW <= region.wide_features:
        return False
    sizes = [s for s, row in zip(spec.shape, spec.is_row[pad:], strict=True) if row]
    expanded = [str(s) for s in sizes] != [str(s) for s in spec.row_shape]
    selected = spec.own or region.chain[len(spec.chain) :]
    order = [d for d in _rows_first(spec) if d >= pad]
    return bool(expanded or selected) or not val.permute([d - pad for d in order]).is_contiguous()


def _is_small(spec: RowInput, region: Region) -> bool:
    """Whether a gradient of the whole table, which each chunk makes, takes less than the copy's."""
    features = prod(
        s for s, row in zip(spec.shape[::-1], spec.is_row[::-1], strict=False) if not row
    )
    return 2 * hint(spec.source.meta["val"].numel()) <= hint(region.rows) * hint(features)


def _rows_first(spec: RowInput) -> list[int]:
    """The layout's dimensions, those of rows first."""
    return sorted(range(len(spec.is_row)), key=lambda d: not spec.is_row[d])


def _positions(spec: RowInput) -> list[RowInput]:
    """The inputs that say where a row stands, along each row dimension that the table has."""
    pad = len(spec.is_row) - len(spec.shape)
    dims = [d for d, row in enumerate(spec.is_row) if row]
    return [
        replace(spec, position=n)
        for n, d in enumerate(dims)
        if d >= pad and spec.shape[d - pad] != 1
    ]


def _read(
    graph: fx.Graph, spec: RowInput, table: fx.Node, positions: Sequence[fx.Node], rows: fx.Node
) -> fx.Node:
    """``[rows, *features]`` of a chunk, whose rows are at ``positions`` in the table.

    Args:
        rows: A row input, where the table has one row for all.
    """
    pad = len(spec.is_row) - len(spec.shape)
    order = [d - pad for d in _rows_first(spec) if d >= pad]
    out = table
    if order != sorted(order):
        out = graph.call_function(aten.permute.default, (out, order))
    n_rows = sum(spec.is_row[pad:])
    ones = [n for n, d in enumerate(order[:n_rows]) if spec.shape[d] == 1]
    if ones:
        out = graph.call_function(aten.squeeze.dims, (out, ones))
    features = [s for s, row in zip(spec.shape, spec.is_row[pad:], strict=True) if not row]
    if positions:
        out = graph.call_function(aten.index.Tensor, (out, list(positions)))
    else:
        size = graph.call_function(aten.sym_size.int, (rows, 0))
        out = graph.call_function(aten.expand.default, (out, [size, *features]))
    missing = spec.is_row[:pad].count(False)
    if missing:
        out = graph.call_function(aten.view.default, (out, [-1, *[1] * missing, *features]))
    return out


def _placeholder(graph: fx.Graph, name: str, val: torch.Tensor) -> fx.Node:
    made = graph.placeholder(name)
    made.meta["val"] = val
    return made


def _moved(check: IndexCheck, kept: Sequence[int]) -> IndexCheck:
    return replace(check, row_inputs=tuple(kept.index(i) for i in check.row_inputs))
