"""The row rules of writes to features, as functionalisation leaves them.

z[:, 3] = z[:, 5]                     select_scatter
out[:, 8:] = z[:, 8:]                 slice_scatter, into a tensor beside the logits
z.index_fill_(1, banned, -1e4)        index_fill
z.view(-1, K, K).diagonal(dim1=1, dim2=2).zero_()    diagonal_scatter
z[:, banned] = -1e4; z[arange(N), labels] -= margin      index_put
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autochunk.rules import (
    Boundary,
    aten,
    bind,
    dims_of,
    labels_of,
    picks_one_feature,
    places_in_rows,
    register,
    same_shape,
    stored_dims,
)
from autochunk.types import RowValue

if TYPE_CHECKING:
    from autochunk.walk import Walk


# What is written over the same features of every row comes from that row, or is one for all; what
# it is written to is a value of those rows, the logits or a tensor beside them.
@register("along features", [aten.select_scatter.default, aten.slice_scatter.default])
def _feature_scatter(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    given = [walk.env[bound[name]] for name in ("self", "src") if bound[name] in walk.env]
    like = given[0]
    if not isinstance(like, RowValue):
        raise Boundary("no-rule", "features of a value of several parts are overwritten")
    is_select = node.target is aten.select_scatter.default
    (dim,) = dims_of(bound["dim"], node.meta["val"].dim())
    is_row = like.is_row
    if is_select and bound["self"] not in walk.env:
        is_row = (*is_row[:dim], False, *is_row[dim:])
    if is_row[dim]:
        raise Boundary("mixes-rows", "some rows of the logits are overwritten")
    if any(isinstance(bound.get(n), fx.Node) for n in ("index", "start", "end", "step")):
        raise Boundary("no-rule", "features are overwritten at a symbolic number")
    piece = is_row[:dim] + is_row[dim + 1 :] if is_select else is_row
    bound["self"], operands = walk.written_operand(bound["self"], is_row, like, whole=True)
    bound["src"], written = walk.written_operand(bound["src"], piece, like, whole=True)
    bound["dim"] = 1 + sum(not row for row in is_row[:dim])
    emitted = walk.emit_bound(node.target, bound)
    return walk.result(node, emitted, is_row, like, [*operands, *written])


# The same places of every row are filled with one number.
@register("along features", [aten.index_fill.int_Scalar, aten.index_fill.int_Tensor])
def _index_fill(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    x, dim, places = _at_features(walk, node, bound)
    walk.note_index(places, x.shape[dim], wraps=True, node=node)
    if bound["value"] in walk.env:
        raise Boundary("no-rule", "features are filled with a number computed from the logits")
    (stored,) = stored_dims(x, [dim])
    emitted = walk.emit(node.target, x.node, stored, places, walk.shared(bound["value"]))
    return walk.result(node, emitted, x.is_row, x, [x])


# The same places of every row are overwritten by, or get in addition, values of that row.
@register("along features", [aten.index_copy.default, aten.index_add.default])
def _index_write(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    x, dim, places = _at_features(walk, node, bound)
    walk.note_index(places, x.shape[dim], wraps=False, node=node)
    if bound.get("alpha", 1) != 1:
        raise Boundary("no-rule", "index_add with a factor")
    adds = node.target is aten.index_add.default
    return _written_at(walk, node, x, dim, places, bound["source"], adds)


def _at_features(walk: Walk, node: fx.Node, bound: dict[str, Any]) -> tuple[RowValue, int, fx.Node]:
    """What is written to, the dimension, and the places along it."""
    x = walk.row_argument(node, bound["self"])
    (dim,) = dims_of(bound["dim"], len(x.is_row))
    if x.is_row[dim]:
        raise Boundary("mixes-rows", "some rows of the logits are overwritten")
    if bound["index"] in walk.env:
        raise Boundary("no-rule", "the places of a write are computed from the logits")
    if bound["index"].meta["val"].dim() != 1:
        raise Boundary("no-rule", "one place is given as a number")
    return x, dim, walk.shared(bound["index"])


def _written_at(
    walk: Walk, node: fx.Node, x: RowValue, dim: int, places: fx.Node, values: fx.Node, adds: bool
) -> RowValue:
    """``x[..., places, ...] = values`` for places along one feature dimension."""
    (stored,) = stored_dims(x, [dim])
    written, operands = walk.written_operand(values, x.is_row, x)
    if values.meta["val"].dim() == 0:
        args = [None] * stored + [places]
        emitted = walk.emit(aten.index_put.default, x.node, args, written, adds)
        return walk.result(node, emitted, x.is_row, x, [x])
    index = places_in_rows(walk, x, dim, places)
    features = list(x.features)
    features[stored - 1] = places.meta["val"].shape[0]
    rows = walk.emit(aten.sym_size.int, x.node, 0)
    source = walk.emit(aten.expand.default, written, [rows, *features])
    target = aten.scatter_add.default if adds else aten.scatter.src
    emitted = walk.emit(target, x.node, stored, index, source)
    return walk.result(node, emitted, x.is_row, x, [x, *operands])


# x[mask] = number is where(mask, number, x); x[..., ids] = values writes the same features of
# every row; x[arange(N), labels] = y writes one feature of each row.
@register("along features", [aten.index_put.default])
def _index_put(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    x = walk.row_argument(node, bound["self"])
    indices, values, adds = list(bound["indices"]), bound["values"], bound["accumulate"]
    indices += [None] * (len(x.is_row) - len(indices))
    mask = indices[0]
    if mask is not None and same_shape(mask.meta["val"].shape, x.shape):
        if mask.meta["val"].dtype != torch.bool or values.meta["val"].numel() != 1 or adds:
            raise Boundary("no-rule", "selected elements are overwritten one by one")
        picked = walk.aligned_operand(mask, x)
        filled = walk.emit(aten.where.self, picked, walk.shared(values), x.node)
        operands = [x, *([walk.env[mask]] if mask in walk.env else [])]
        return walk.result(node, filled, x.is_row, x, operands)
    if any(i is not None and i in walk.env for i in indices):
        raise Boundary("no-rule", "indexing by a tensor computed from the logits")
    used = [d for d, i in enumerate(indices) if i is not None]
    n_rows = sum(x.is_row)
    if len(used) == 1 and not x.is_row[used[0]]:
        if indices[used[0]].meta["val"].dim() != 1:
            raise Boundary("no-rule", "features are overwritten at a table of places")
        places = walk.shared(indices[used[0]])
        walk.note_index(places, x.shape[used[0]], wraps=True, node=node)
        return _written_at(walk, node, x, used[0], places, values, adds)
    if x.is_row != (True,) * n_rows + (False,) or not picks_one_feature(x, indices):
        raise Boundary("misaligned", "rows of the logits are overwritten")
    labels = labels_of(walk, node, x, indices[n_rows])
    source, written = walk.written_operand(values, (True,) * n_rows, x, whole=True)
    target = aten.scatter_add.default if adds else aten.scatter.src
    emitted = walk.emit(target, x.node, 1, labels, walk.view(source, [1]))
    return walk.result(node, emitted, x.is_row, x, [x, *written])


# The diagonal of a square of features belongs to one row.
@register("along features", [aten.diagonal.default, aten.diagonal_scatter.default])
def _diagonal(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    x = walk.row_argument(node, bound["self"])
    dims = dims_of([bound["dim1"], bound["dim2"]], len(x.is_row))
    if any(x.is_row[d] for d in dims):
        raise Boundary("mixes-rows", "the diagonal runs along rows")
    bound["dim1"], bound["dim2"] = stored_dims(x, dims)
    is_row, operands = x.is_row, [x]
    diagonal = (*(row for d, row in enumerate(x.is_row) if d not in dims), False)
    if "src" in bound:
        bound["src"], written = walk.written_operand(bound["src"], diagonal, x, whole=True)
        operands = [x, *written]
    else:
        is_row = diagonal
    emitted = walk.emit_bound(node.target, {**bound, "self": x.node})
    return walk.result(node, emitted, is_row, x, operands)


# A triangle of a square of features belongs to one row.
@register("along features", [aten.tril.default, aten.triu.default])
def _triangle(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    x = walk.row_argument(node, bound["self"])
    if any(x.is_row[-2:]) or stored_dims(x, [len(x.is_row) - 1])[0] != len(x.features):
        raise Boundary("mixes-rows", "the triangle has rows of the logits")
    emitted = walk.emit_bound(node.target, {**bound, "self": x.node})
    return walk.result(node, emitted, x.is_row, x, [x])
