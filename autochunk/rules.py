"""The row rules: which ATen ops treat rows independently, and how each is written per row.

Lifting is batching, read backwards: a body value is stored as ``[rows, *features]`` and each rule
re-writes one op of the user's graph for that layout. A rule either returns the lifted value or
raises :class:`Boundary`, which ends the body there. The comment above each rule says why it is
legal: computing it on a chunk of rows gives that chunk of the whole result.

Shape legend: R rows, F, K features, N logical row dimensions (there may be several).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from autochunk import extrema
from autochunk.decompositions import REDUCING_LOSSES
from autochunk.find import hint, is_differentiable, is_marked_dynamic
from autochunk.types import RowValue, Split

if TYPE_CHECKING:
    from autochunk.walk import Walk

aten = torch.ops.aten

Result = RowValue | Split | tuple[RowValue, ...]


class Boundary(Exception):
    """The op cannot be part of a body.

    Attributes:
        code: Refusal code, should a wide value be lost by it.
        detail: One sentence.
        at: The op, if it is not the one that is being lifted.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.at: fx.Node | None = None


@dataclass(frozen=True)
class Rule:
    """A rule and the family it belongs to (for the docs' table and the tests' samples)."""

    apply: Callable[[Walk, fx.Node], Result]
    family: str


RULES: dict[Any, Rule] = {}

#: In the ``meta`` of a view that merges rows with features: it cannot be moved behind other ops
#: (``merging.py``) because of this Boundary; None if it is only returned.
KEPT = "autochunk_kept"


def rule_for(target: Any) -> Rule | None:
    """The rule of an ATen op: registered, or pointwise by PyTorch's own tag."""
    found = RULES.get(target)
    if found is not None:
        return found
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return None
    if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
        return None
    if torch.Tag.pointwise in target.tags and len(target._schema.returns) == 1:
        return POINTWISE
    return None


def register(family: str, targets: Iterable[Any]) -> Callable[[Any], Any]:
    """Makes a function the rule of ``targets``."""

    def add(apply: Callable[[Walk, fx.Node], Result]) -> Callable[[Walk, fx.Node], Result]:
        for target in targets:
            RULES[target] = Rule(apply, family)
        return apply

    return add


# ---- pointwise -------------------------------------------------------------------------------


# Each output element depends on the same element of every operand. Operands that span rows are
# cut like the rows; operands that do not are the same for every row.
def _pointwise(walk: Walk, node: fx.Node) -> RowValue:
    given = [a for a in node.all_input_nodes if a in walk.env]
    operands = walk.on_same_rows([walk.row_argument(node, a) for a in given])
    values = dict(zip(given, operands, strict=True))
    is_row = common_layout(operands, node.meta["val"].dim())
    like = operands[0]
    features = sum(not row for row in is_row)

    def lifted(arg: fx.Node) -> fx.Node:
        if arg in values:
            return pad_features(walk, values[arg], features)
        return walk.outer_operand(arg, is_row, like)

    args, kwargs = fx.map_arg((node.args, node.kwargs), lifted)
    kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
    return walk.result(node, walk.emit(node.target, *args, **kwargs), is_row, like, operands)


POINTWISE = Rule(_pointwise, "pointwise")

register(
    "pointwise",
    [
        aten.alias.default,
        aten.detach.default,
        aten.masked_fill.Tensor,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.fill.Scalar,
        aten.fill.Tensor,
        aten.bucketize.Tensor,
        aten._prelu_kernel.default,
    ],
)(_pointwise)


# A loss that reduces nothing has one term for each element of its operands.
@register("pointwise", REDUCING_LOSSES)
def _loss(walk: Walk, node: fx.Node) -> RowValue:
    if bind(node)["reduction"] != 0:
        raise Boundary("mixes-rows", f"{node.target} reduces over rows")
    return _pointwise(walk, node)


# The output's second part is what the op keeps for its derivative: on a CPU one number for each
# element, elsewhere nothing.
@register("pointwise", [aten.log_sigmoid_forward.default])
def _log_sigmoid(walk: Walk, node: fx.Node) -> tuple[RowValue, ...]:
    x = walk.row_argument(node, node.args[0])
    both = walk.emit(node.target, x.node)
    kept = [i for i, val in enumerate(node.meta["val"]) if same_shape(val.shape, x.shape)]
    return tuple(
        walk.result(
            node, walk.emit(operator.getitem, both, i), x.is_row, x, [x], node.meta["val"][i]
        )
        for i in kept
    )


# A cast is pointwise; a move to another device is not something a chunk should do.
@register("pointwise", [aten._to_copy.default])
def _to_copy(walk: Walk, node: fx.Node) -> RowValue:
    source = node.all_input_nodes[0].meta["val"]
    if node.meta["val"].device != source.device:
        raise Boundary("no-rule", "the logits are moved to another device")
    return _pointwise(walk, node)


# ---- reductions over features ----------------------------------------------------------------

_SPLITS: dict[Any, Any] = {
    aten.sum.dim_IntList: aten.sum.dim_IntList,
    aten.sum.default: aten.sum.dim_IntList,
    aten.mean.dim: aten.mean.dim,
    aten.mean.default: aten.mean.dim,
    aten.amax.default: aten.amax.default,
    aten.amin.default: aten.amin.default,
    aten.max.default: aten.amax.default,
    aten.min.default: aten.amin.default,
    aten.any.default: aten.any.dims,
    aten.any.dims: aten.any.dims,
    aten.all.default: aten.all.dims,
    aten.all.dims: aten.all.dims,
    aten.logsumexp.default: aten.logsumexp.default,
}


_EXTREMA = (aten.amax.default, aten.amin.default)

#: Of the ops that reduce everything, those that are told the dimensions.
_WHOLE = {**_SPLITS, aten.count_nonzero.default: aten.count_nonzero.dim_IntList}
_POSITIONS = (aten.argmax.default, aten.argmin.default)


# A reduction over features reads one row. Over rows as well it is cut in two where op(op(x over
# features) over rows) is op(x): sums, means (all rows are equally long), extrema, any, all,
# log-sum-exp. Half precision sums leave the body in float32, as the uncut sum accumulates.
@register(
    "reduction",
    [
        *_SPLITS,
        aten.prod.dim_int,
        aten.any.dim,
        aten.all.dim,
        aten.argmax.default,
        aten.argmin.default,
        aten.max.dim,
        aten.min.dim,
        aten.median.dim,
        aten.mode.default,
        aten.kthvalue.default,
        aten.var.correction,
        aten.std.correction,
        aten.var_mean.correction,
        aten.linalg_vector_norm.default,
        aten.count_nonzero.default,
        aten.count_nonzero.dim_IntList,
        aten.nansum.default,
    ],
)
def _reduce(walk: Walk, node: fx.Node) -> Result:
    bound = bind(node)
    x = walk.row_argument(node, bound["self"])
    dims = dims_of(bound.get("dim"), len(x.is_row))
    feature_dims = [d for d in dims if not x.is_row[d]]
    if len(feature_dims) == len(dims):
        stored = stored_dims(x, dims)
        # A value of one row (``logits[0].sum()``) is reduced whole: its features, not that row.
        whole = bound.get("dim") is None
        target = _WHOLE.get(node.target, node.target) if whole else node.target
        takes_list = isinstance(bound.get("dim"), (list, tuple)) or whole
        operand = x.node
        if not dims or (whole and node.target in _POSITIONS):
            if bound.get("keepdim", False) and dims:
                raise Boundary("no-rule", f"{node.target} of several dimensions that are kept")
            operand, stored, bound["keepdim"] = walk.view(x.node, [prod(x.features)]), [1], False
            takes_list = takes_list and node.target not in _POSITIONS
        bound["dim"] = stored if takes_list else stored[0]
        emitted = walk.emit_bound(target, {**bound, "self": operand})
        gone = set() if bound.get("keepdim", False) else set(dims)
        is_row = tuple(row for d, row in enumerate(x.is_row) if d not in gone)
        return walk.results(node, emitted, is_row, x, [x])
    if node.target not in _SPLITS:
        raise Boundary("mixes-rows", f"{node.target} reduces over rows")
    if not feature_dims:
        raise Boundary("mixes-rows", f"{node.target} reduces over rows only")
    inner_target = _SPLITS[node.target]
    if inner_target in _EXTREMA and x.needs_grad and is_differentiable(node.meta["val"]):
        return _split_extremum(walk, node, x, dims, bound.get("keepdim", False))
    inner: dict[str, Any] = {"self": x.node, "dim": stored_dims(x, feature_dims), "keepdim": True}
    out, outer_kwargs = node.meta["val"], {}
    if "dtype" in bound and out.dtype in (torch.float16, torch.bfloat16):
        inner["dtype"], outer_kwargs = torch.float32, {"dtype": out.dtype}
    elif bound.get("dtype") is not None:
        inner["dtype"] = bound["dtype"]
    shape = tuple(1 if d in feature_dims else s for d, s in enumerate(x.shape))
    if inner_target is aten.logsumexp.default:
        made = _logsumexp_of_rows(walk, inner)
    else:
        made = walk.emit_bound(inner_target, inner)
    value = RowValue(
        node=made,
        is_row=x.is_row,
        shape=shape,
        chain=x.chain,
        heads=x.heads,
        needs_grad=x.needs_grad and is_differentiable(out),
        val=_split_val(x, shape, inner.get("dtype", out.dtype)),
    )
    return Split(value, outer_kwargs)


# A row of -inf alone counts for nothing in the logsumexp of all, and has no gradient there, though
# that of its own logsumexp is nan.
def _logsumexp_of_rows(walk: Walk, inner: Mapping[str, Any]) -> fx.Node:
    x, dims = inner["self"], inner["dim"]
    is_empty = walk.emit(aten.eq.Scalar, walk.emit(aten.amax.default, x, dims, True), -math.inf)
    finite = walk.emit(aten.masked_fill.Scalar, x, is_empty, 0.0)
    made = walk.emit_bound(aten.logsumexp.default, {**inner, "self": finite})
    return walk.emit(aten.masked_fill.Scalar, made, is_empty, -math.inf)


# The extremum of the rows' extrema is that of all; ties between rows take their counts along.
def _split_extremum(
    walk: Walk, node: fx.Node, x: RowValue, dims: Sequence[int], keepdim: bool
) -> Split:
    target, out = _SPLITS[node.target], node.meta["val"]
    nan_ties = node.target in (aten.max.default, aten.min.default)
    dtype = extrema.packed_dtype(out.dtype)
    # The dimension that comes first where the body stores it.
    feature_dims = sorted((d for d in dims if not x.is_row[d]), key=lambda d: stored_dims(x, [d]))
    along = feature_dims[0]
    shape = tuple(1 if d in feature_dims else s for d, s in enumerate(x.shape))
    shape = (*shape[:along], extrema.PACKED, *shape[along + 1 :])
    stored = stored_dims(x, feature_dims)
    value = RowValue(
        node=extrema.pack(walk.emit, target, x.node, stored, dtype, nan_ties),
        is_row=x.is_row,
        shape=shape,
        chain=x.chain,
        heads=x.heads,
        needs_grad=True,
        val=_split_val(x, shape, dtype),
    )

    def outer(emit: extrema.Emit, packed: Any) -> Any:
        return extrema.combine(
            emit, target, packed, along, list(dims), keepdim, out.dtype, nan_ties
        )

    return Split(value, outer=outer)


def _split_val(x: RowValue, shape: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
    return x.val.new_empty(shape, dtype=dtype)


# ---- along features --------------------------------------------------------------------------


# A map along one feature dimension (softmax, sort, cumulative sum, top-k, gated halves) reads one
# row.
@register(
    "along features",
    [
        aten._softmax.default,
        aten._log_softmax.default,
        aten._safe_softmax.default,
        aten.cumsum.default,
        aten.cumprod.default,
        aten.cummax.default,
        aten.cummin.default,
        aten.logcumsumexp.default,
        aten.sort.default,
        aten.sort.stable,
        aten.topk.default,
        aten.glu.default,
    ],
)
def _along(walk: Walk, node: fx.Node) -> Result:
    bound = bind(node)
    x = walk.row_argument(node, bound["self"])
    (dim,) = dims_of(bound["dim"], len(x.is_row))
    if x.is_row[dim]:
        raise Boundary("mixes-rows", f"{node.target} runs along dimension {dim}, which is rows")
    (bound["dim"],) = stored_dims(x, [dim])
    emitted = walk.emit_bound(node.target, {**bound, "self": x.node})
    return walk.results(node, emitted, x.is_row, x, [x])


# Flipping or rolling features permutes each row alike.
@register("along features", [aten.flip.default, aten.roll.default])
def _permute_features(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    x = walk.row_argument(node, bound["self"])
    dims = dims_of(bound["dims"], len(x.is_row))
    if any(x.is_row[d] for d in dims) or (node.target is aten.roll.default and not bound["dims"]):
        raise Boundary("mixes-rows", f"{node.target} moves rows")
    bound["dims"] = stored_dims(x, dims)
    emitted = walk.emit_bound(node.target, {**bound, "self": x.node})
    return walk.result(node, emitted, x.is_row, x, [x])


# Row r of the result picks features of row r by row r's indices.
@register("along features", [aten.gather.default])
def _gather(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    index = bound["index"]
    like = walk.env.get(bound["self"]) or walk.env.get(index)
    if not isinstance(like, RowValue):
        raise Boundary("no-rule", "gather from a value of several parts")
    (dim,) = dims_of(bound["dim"], len(like.is_row))
    if like.is_row[dim]:
        raise Boundary("mixes-rows", f"gather runs along dimension {dim}, which is rows")
    x = walk.aligned_operand(bound["self"], like)
    picked = walk.aligned_operand(index, like)
    (stored,) = stored_dims(like, [dim])
    size = bound["self"].meta["val"].shape[dim]
    walk.note_index(picked, size, wraps=False, node=node)
    emitted = walk.emit(aten.gather.default, x, stored, picked)
    operands = [walk.env[a] for a in (bound["self"], index) if a in walk.env]
    return walk.result(node, emitted, like.is_row, like, operands)


# Row r of the result writes features of row r at row r's indices.
@register(
    "along features",
    [
        aten.scatter.value,
        aten.scatter.src,
        aten.scatter_add.default,
        aten.scatter.value_reduce,
        aten.scatter_reduce.two,
    ],
)
def _scatter(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    tensors = [n for n in ("self", "index", "src") if isinstance(bound.get(n), fx.Node)]
    like = next(walk.env[bound[n]] for n in tensors if bound[n] in walk.env)
    if not isinstance(like, RowValue):
        raise Boundary("no-rule", "scatter into a value of several parts")
    (dim,) = dims_of(bound["dim"], len(like.is_row))
    if like.is_row[dim]:
        raise Boundary("mixes-rows", f"scatter runs along dimension {dim}, which is rows")
    size = bound["self"].meta["val"].shape[dim]
    operands = [walk.env[bound[n]] for n in tensors if bound[n] in walk.env]
    for name in tensors:
        bound[name] = walk.aligned_operand(bound[name], like)
    (bound["dim"],) = stored_dims(like, [dim])
    walk.note_index(bound["index"], size, wraps=False, node=node)
    emitted = walk.emit_bound(node.target, bound)
    return walk.result(node, emitted, like.is_row, like, operands)


# The same features are picked from every row.
@register("along features", [aten.index_select.default])
def _index_select(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    x = walk.row_argument(node, bound["self"])
    (dim,) = dims_of(bound["dim"], len(x.is_row))
    if x.is_row[dim]:
        row_dim = sum(x.is_row[:dim])
        return walk.row_op(node, x, aten.index_select.default, (row_dim, bound["index"]), x.is_row)
    if bound["index"] in walk.env:
        raise Boundary("no-rule", "features are selected by an index computed from the logits")
    (stored,) = stored_dims(x, [dim])
    picked = walk.shared(bound["index"])
    walk.note_index(picked, x.shape[dim], wraps=False, node=node)
    emitted = walk.emit(aten.index_select.default, x.node, stored, picked)
    return walk.result(node, emitted, x.is_row, x, [x])


# A slice of features is taken from each row; a slice of rows selects rows.
@register("along features", [aten.slice.Tensor])
def _slice(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    x = walk.row_argument(node, bound["self"])
    (dim,) = dims_of(bound["dim"], len(x.is_row))
    if same_shape(node.meta["val"].shape, x.shape) and bound["step"] == 1:
        return x
    span = (bound["start"], bound["end"], bound["step"])
    if x.is_row[dim]:
        return walk.row_op(node, x, aten.slice.Tensor, (sum(x.is_row[:dim]), *span), x.is_row)
    if any(isinstance(s, fx.Node) for s in span):
        raise Boundary("no-rule", "a slice of features with symbolic ends")
    (stored,) = stored_dims(x, [dim])
    emitted = walk.emit(aten.slice.Tensor, x.node, stored, *span)
    return walk.result(node, emitted, x.is_row, x, [x])


# One feature of each row, or one index along a row dimension.
@register("along features", [aten.select.int])
def _select(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    x = walk.row_argument(node, bound["self"])
    (dim,) = dims_of(bound["dim"], len(x.is_row))
    is_row = x.is_row[:dim] + x.is_row[dim + 1 :]
    if x.is_row[dim]:
        args = (sum(x.is_row[:dim]), bound["index"])
        return walk.row_op(node, x, aten.select.int, args, is_row)
    if isinstance(bound["index"], fx.Node):
        raise Boundary("no-rule", "a feature is selected by a symbolic number")
    (stored,) = stored_dims(x, [dim])
    emitted = walk.emit(aten.select.int, x.node, stored, bound["index"])
    return walk.result(node, emitted, is_row, x, [x])


# Features of several values of the same rows, side by side. Pieces of rows, all of them and in
# order, are the value they are pieces of.
@register("along features", [aten.cat.default])
def _cat(walk: Walk, node: fx.Node) -> RowValue:
    tensors, operands = _parts(walk, node)
    like = operands[0]
    (dim,) = dims_of(bind(node)["dim"], len(like.is_row))
    if like.is_row[dim]:
        whole = walk.joined(operands) if len(operands) == len(tensors) else None
        at = sum(like.is_row[:dim])
        if whole is None or like.chain[-1].args[0] != at:
            raise Boundary("mixes-rows", "rows are concatenated")
        return replace(whole, is_row=like.is_row, shape=tuple(node.meta["val"].shape))
    parts = [walk.aligned_operand(t, like) for t in tensors]
    emitted = walk.emit(aten.cat.default, parts, stored_dims(like, [dim])[0])
    return walk.result(node, emitted, like.is_row, like, operands)


def _parts(walk: Walk, node: fx.Node) -> tuple[list[fx.Node], list[RowValue]]:
    """The tensors that are put together, and the row values among them."""
    tensors = list(node.args[0])
    given = [walk.env[t] for t in tensors if t in walk.env]
    operands = [o for o in given if isinstance(o, RowValue)]
    if len(operands) < len(given):
        name = node.target.overloadpacket.__name__
        raise Boundary("no-rule", f"{name} of a value of several parts")
    return tensors, operands


# As cat, along a new feature.
@register("along features", [aten.stack.default])
def _stack(walk: Walk, node: fx.Node) -> RowValue:
    tensors, operands = _parts(walk, node)
    like = operands[0]
    (dim,) = dims_of(bind(node)["dim"], len(like.is_row) + 1)
    whole = walk.joined(operands) if len(operands) == len(tensors) else None
    at = sum(like.is_row[:dim])
    if whole is not None and like.chain[-1].target is aten.select.int:
        is_row = (*like.is_row[:dim], True, *like.is_row[dim:])
        if like.chain[-1].args[0] == at:
            return replace(whole, is_row=is_row, shape=tuple(node.meta["val"].shape))
        order = [d for d in range(sum(is_row)) if d != like.chain[-1].args[0]]
        order.insert(at, like.chain[-1].args[0])
        return walk.row_op(node, whole, aten.permute.default, (order,), is_row)
    if not any(like.is_row) and len({o.chain for o in operands}) > 1:
        raise Boundary("mixes-rows", "some rows are stacked, in another order or not all")
    parts = [walk.aligned_operand(t, like) for t in tensors]
    emitted = walk.emit(aten.stack.default, parts, 1 + sum(not r for r in like.is_row[:dim]))
    is_row = (*like.is_row[:dim], False, *like.is_row[dim:])
    return walk.result(node, emitted, is_row, like, operands)


# Padding features pads each row alike.
@register("along features", [aten.constant_pad_nd.default])
def _pad(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    x = walk.row_argument(node, bound["self"])
    pad = list(bound["pad"])
    padded = [len(x.is_row) - 1 - i // 2 for i, p in enumerate(pad) if p != 0]
    if any(x.is_row[d] for d in padded):
        raise Boundary("mixes-rows", "rows are padded")
    by_dim = {len(x.is_row) - 1 - i: pad[2 * i : 2 * i + 2] for i in range(len(pad) // 2)}
    stored_pad = [
        p for d in reversed(range(len(x.is_row))) if not x.is_row[d] for p in by_dim.get(d, [0, 0])
    ]
    emitted = walk.emit(aten.constant_pad_nd.default, x.node, stored_pad, bound["value"])
    return walk.result(node, emitted, x.is_row, x, [x])


# x[arange(N), labels] is a gather; x[mask] and x[:, positions] select rows; x[rows, labels] selects
# rows, then gathers; x[..., ids] selects the same features of every row.
@register("along features", [aten.index.Tensor])
def _index(walk: Walk, node: fx.Node) -> RowValue:
    x = walk.row_argument(node, node.args[0])
    indices = list(node.args[1])
    indices += [None] * (len(x.is_row) - len(indices))
    if any(i is not None and i in walk.env for i in indices):
        raise Boundary("no-rule", "indexing by a tensor computed from the logits")
    used = [d for d, i in enumerate(indices) if i is not None]
    if all(not x.is_row[d] for d in used):
        if len(used) > 1 or indices[used[0]].meta["val"].dim() != 1:
            raise Boundary("no-rule", "features are indexed by several tensors")
        (stored,) = stored_dims(x, used)
        places = walk.shared(indices[used[0]])
        walk.note_index(places, x.shape[used[0]], wraps=True, node=node)
        index = places_in_rows(walk, x, used[0], places)
        emitted = walk.emit(aten.gather.default, x.node, stored, index)
        return walk.result(node, emitted, x.is_row, x, [x])
    rows_first = x.is_row == tuple(sorted(x.is_row, reverse=True))
    n_rows = sum(x.is_row)
    if not rows_first:
        raise Boundary("misaligned", "rows and features are indexed together")
    if all(x.is_row[d] for d in used):
        new_rows = node.meta["val"].dim() - (len(x.is_row) - n_rows)
        is_row = (True,) * new_rows + x.is_row[n_rows:]
        return walk.row_op(node, x, aten.index.Tensor, (indices[:n_rows],), is_row)
    if not picks_one_feature(x, indices):
        x = _rows_of_pairs(walk, node, x, indices)
        n_rows = sum(x.is_row)
    index = labels_of(walk, node, x, indices[used[-1]])
    rest = [1] * (len(x.is_row) - n_rows - 1)
    if rest:
        index = walk.view(index, [1, *rest])
        index = walk.emit(aten.expand.default, index, [-1, 1, *x.features[1:]])
    gathered = walk.emit(aten.gather.default, x.node, 1, index)
    emitted = walk.emit(aten.squeeze.dim, gathered, 1)
    return walk.result(node, emitted, (True,) * n_rows + x.is_row[n_rows + 1 :], x, [x])


def places_in_rows(walk: Walk, x: RowValue, dim: int, places: fx.Node) -> fx.Node:
    """Places along a feature dimension, which may count from the end, as an index of each row.

    For a gather and a scatter: Inductor's C++ of an ``index`` whose result an ``index_put`` writes
    does not compile (torch 2.13).
    """
    (stored,) = stored_dims(x, [dim])
    size = _static(x.shape[dim])
    if places.meta["val"].dtype == torch.bool:
        raise Boundary("no-rule", "features are indexed by a mask")
    wrapped = _from_the_start(walk, places, size)
    for _ in x.features[stored:]:
        wrapped = walk.emit(aten.unsqueeze.default, wrapped, -1)
    rows = walk.emit(aten.sym_size.int, x.node, 0)
    others = [-1 if at + 1 == stored else _static(f) for at, f in enumerate(x.features)]
    return walk.emit(aten.expand.default, wrapped, [rows, *others])


def picks_one_feature(x: RowValue, indices: Sequence[Any]) -> bool:
    """Whether indices are ``arange`` of each row dimension, then labels of the first feature."""
    n_rows = sum(x.is_row)
    used = [d for d, i in enumerate(indices) if i is not None]
    return used == list(range(n_rows + 1)) and all(
        is_iota_of(indices[d], d, x.shape[:n_rows]) for d in range(n_rows)
    )


def _rows_of_pairs(walk: Walk, node: fx.Node, x: RowValue, indices: Sequence[Any]) -> RowValue:
    """The rows of ``x[rows, labels]``, of which ``labels`` then picks one feature each."""
    n_rows = sum(x.is_row)
    rows = list(indices[:n_rows])
    if any(i is None for i in indices[: n_rows + 1]) or any(
        i is not None for i in indices[n_rows + 1 :]
    ):
        raise Boundary("misaligned", "some rows and features are indexed together")
    if any(i.meta["val"].dtype == torch.bool for i in indices[: n_rows + 1]):
        raise Boundary("misaligned", "rows and features are indexed together, by a mask")
    picked = torch.broadcast_shapes(*(i.meta["val"].shape for i in rows))
    features = tuple(x.shape[n_rows:])
    result = node.meta["val"].shape
    if not same_shape((*picked, *features[1:]), result):
        raise Boundary("misaligned", "labels are not one index per row")
    if any(statically_known_true(size == 1) for size in picked):
        raise Boundary("misaligned", "one row is picked")
    if prod(map(hint, picked)) > prod(map(hint, x.row_shape)):
        raise Boundary("misaligned", "rows are picked more than once; each would be computed again")
    is_row = (True,) * len(picked) + (False,) * len(features)
    val = x.val.new_empty((*picked, *features))
    return walk.row_op(node, x, aten.index.Tensor, (rows,), is_row, val=val)


def labels_of(walk: Walk, node: fx.Node, x: RowValue, labels: fx.Node) -> fx.Node:
    """``[rows, 1]`` labels that may count from the end, as non-negative numbers."""
    n_rows = sum(x.is_row)
    labels_val = labels.meta["val"]
    if labels_val.dtype == torch.bool or labels_val.dim() > n_rows:
        raise Boundary("misaligned", "labels are not one index per row")
    picked = walk.outer_operand(labels, (True,) * n_rows, x, whole=True)
    size = _static(x.shape[n_rows])
    walk.note_index(picked, size, wraps=True, node=node)
    return walk.view(_from_the_start(walk, picked, size), [1])


def _from_the_start(walk: Walk, index: fx.Node, size: int) -> fx.Node:
    """An index whose negative numbers count from the end of ``size``, without such numbers."""
    is_negative = walk.emit(aten.lt.Scalar, index, 0)
    return walk.emit(aten.where.self, is_negative, walk.emit(aten.add.Scalar, index, size), index)


def _static(features: Any) -> int:
    """A number of features, specialised: everything but the rows is static in a kernel."""
    if is_marked_dynamic(features):
        detail = "features whose number is marked as dynamic (mark_dynamic) are indexed"
        raise Boundary("dynamic-features", detail)
    return int(features)


def is_iota_of(index: fx.Node, dim: int, row_shape: Sequence[Any]) -> bool:
    """Whether ``index`` is ``arange(row_shape[dim])``, shaped to vary along ``dim`` only."""
    shape = index.meta["val"].shape
    position = len(row_shape) - len(shape)
    for d, size in enumerate(shape):
        wanted = row_shape[dim] if d + position == dim else 1
        if not same_size(size, wanted):
            return False
    views = (aten.unsqueeze.default, aten.view.default, aten._unsafe_view.default)
    while index.target in views or _is_whole_slice(index):
        index = index.all_input_nodes[0]
    starts: Mapping[Any, tuple[Any, ...]] = {
        aten.arange.default: (),
        aten.arange.start: (0,),
        aten.arange.start_step: (0,),
    }
    if index.target not in starts or index.meta["val"].dim() != 1:
        return False
    begins = starts[index.target]
    step = index.args[2] if len(index.args) > 2 else 1
    return index.args[: len(begins)] == begins and step == 1


def _is_whole_slice(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    return same_shape(node.meta["val"].shape, node.args[0].meta["val"].shape)


# ---- products --------------------------------------------------------------------------------


# Row r of x @ W is (row r of x) @ W.
@register("product", [aten.mm.default, aten.addmm.default, aten.mv.default])
def _mm(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    addmm = node.target is aten.addmm.default
    x_arg, w_arg = (bound["mat1"], bound["mat2"]) if addmm else _two(node)
    if w_arg in walk.env:
        raise Boundary("mixes-rows", "the product contracts rows")
    x = walk.env.get(x_arg)
    if not isinstance(x, RowValue):
        raise Boundary("no-rule", "the logits are added to an unrelated product")
    if x.is_row != (True, False):
        raise Boundary("mixes-rows", "the product contracts rows")
    weight = walk.shared(w_arg)
    is_row = (True,) if node.target is aten.mv.default else (True, False)
    if not addmm:
        return walk.result(node, walk.emit(node.target, x.node, weight), is_row, x, [x])
    bias_value = walk.env.get(bound["self"])
    if isinstance(bias_value, RowValue):
        common_layout([x, bias_value], 2)
        bias = pad_features(walk, bias_value, 1)
    else:
        bias = walk.outer_operand(bound["self"], is_row, x)
    emitted = walk.emit_bound(node.target, {**bound, "self": bias, "mat1": x.node, "mat2": weight})
    operands = [x, *([bias_value] if isinstance(bias_value, RowValue) else [])]
    return walk.result(node, emitted, is_row, x, operands)


# A batch of products, one per row: row r of the result reads row r of both. A product with a
# batch of one is a plain product.
@register("product", [aten.bmm.default])
def _bmm(walk: Walk, node: fx.Node) -> RowValue:
    a_arg, b_arg = _two(node)
    a, b = walk.env.get(a_arg), walk.env.get(b_arg)
    if isinstance(a, RowValue) and a.is_row == (False, True, False) and not isinstance(b, RowValue):
        weight = walk.emit(aten.select.int, walk.shared(b_arg), 0, 0)
        flat = walk.view(a.node, [a.shape[2]])
        out = walk.view(walk.emit(aten.mm.default, flat, weight), [1, node.meta["val"].shape[2]])
        return walk.result(node, out, a.is_row, a, [a])
    per_row = (True, False, False)
    like = a if isinstance(a, RowValue) else b
    if not isinstance(like, RowValue) or like.is_row != per_row:
        raise Boundary("mixes-rows", "the batched product does not keep rows apart")
    left, right = walk.aligned_operand(a_arg, like), walk.aligned_operand(b_arg, like)
    operands = [v for v in (a, b) if isinstance(v, RowValue)]
    return walk.result(node, walk.emit(aten.bmm.default, left, right), per_row, like, operands)


# Each row looks its own indices up in a table that all rows share.
@register("product", [aten.embedding.default])
def _embedding(walk: Walk, node: fx.Node) -> RowValue:
    table, index = node.args[0], node.args[1]
    value = walk.env.get(index)
    if table in walk.env or not isinstance(value, RowValue):
        raise Boundary("mixes-rows", "the table of an embedding is computed from the logits")
    walk.note_index(value.node, table.meta["val"].shape[0], wraps=False, node=node)
    emitted = walk.emit(aten.embedding.default, walk.shared(table), value.node)
    return walk.result(node, emitted, (*value.is_row, False), value, [value])


# ---- layout ----------------------------------------------------------------------------------


# A view that regroups rows among rows and features among features moves no element to another
# row.
@register("layout", [aten.view.default, aten._unsafe_view.default])
def _view(walk: Walk, node: fx.Node) -> RowValue:
    x = walk.row_argument(node, node.args[0])
    shape = tuple(node.meta["val"].shape)
    is_row = match_view(x, shape)
    if is_row is None:
        raise walk.stopped_by_view(node, x)
    features = [s for s, row in zip(shape, is_row, strict=True) if not row]
    emitted = x.node
    if not same_shape(features, x.features):
        emitted = walk.view(x.node, features)
    return walk.result(node, emitted, is_row, x, [x])


# A dimension of size one holds no rows.
@register("layout", [aten.unsqueeze.default])
def _unsqueeze(walk: Walk, node: fx.Node) -> RowValue:
    x = walk.row_argument(node, node.args[0])
    dim = int(node.args[1])
    dim = dim + len(x.is_row) + 1 if dim < 0 else dim
    emitted = walk.emit(aten.unsqueeze.default, x.node, 1 + sum(not r for r in x.is_row[:dim]))
    is_row = (*x.is_row[:dim], False, *x.is_row[dim:])
    return walk.result(node, emitted, is_row, x, [x])


# As above, the other way round; row dimensions never have static size one here.
@register("layout", [aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default])
def _squeeze(walk: Walk, node: fx.Node) -> RowValue:
    x = walk.row_argument(node, node.args[0])
    dims = dims_of(bind(node).get("dim"), len(x.is_row))
    gone = [d for d in dims if not x.is_row[d] and statically_known_true(x.shape[d] == 1)]
    if not gone:
        return x
    emitted = walk.emit(aten.squeeze.dims, x.node, stored_dims(x, gone))
    is_row = tuple(r for d, r in enumerate(x.is_row) if d not in gone)
    return walk.result(node, emitted, is_row, x, [x])


# Exchanging a row with a feature dimension changes how the user sees the value, not the value;
# exchanging features permutes each row alike; exchanging rows reorders the rows.
@register("layout", [aten.permute.default, aten.transpose.int, aten.t.default])
def _permute(walk: Walk, node: fx.Node) -> RowValue:
    x = walk.row_argument(node, node.args[0])
    order = list(range(len(x.is_row)))
    if node.target is aten.permute.default:
        order = dims_of(node.args[1], len(order))
    elif len(order) == 2 or node.target is aten.transpose.int:
        a, b = (0, 1) if node.target is aten.t.default else dims_of(node.args[1:], len(order))
        order[a], order[b] = order[b], order[a]
    is_row = tuple(x.is_row[d] for d in order)
    row_order = [sum(x.is_row[:d]) for d in order if x.is_row[d]]
    feature_order = stored_dims(x, [d for d in order if not x.is_row[d]])
    emitted = x.node
    if feature_order != sorted(feature_order):
        emitted = walk.emit(aten.permute.default, x.node, [0, *feature_order])
    if row_order == sorted(row_order):
        return walk.result(node, emitted, is_row, x, [x])
    return walk.row_op(node, x, aten.permute.default, (row_order,), is_row, emitted)


# Repeating features repeats them in every row.
@register("layout", [aten.repeat.default])
def _repeat(walk: Walk, node: fx.Node) -> RowValue:
    x = walk.row_argument(node, node.args[0])
    repeats = list(node.args[1])
    new = len(repeats) - len(x.is_row)
    if any(row and r != 1 for r, row in zip(repeats[new:], x.is_row, strict=True)):
        raise Boundary("mixes-rows", "rows are repeated")
    is_row = (False,) * new + x.is_row
    stored = [1, *(r for r, row in zip(repeats, is_row, strict=True) if not row)]
    padded = pad_features(walk, x, len(stored) - 1)
    return walk.result(node, walk.emit(aten.repeat.default, padded, stored), is_row, x, [x])


# Windows along one feature dimension of each row.
@register("layout", [aten.unfold.default])
def _unfold(walk: Walk, node: fx.Node) -> RowValue:
    bound = bind(node)
    x = walk.row_argument(node, bound["self"])
    (dim,) = dims_of(bound["dimension"], len(x.is_row))
    if x.is_row[dim]:
        raise Boundary("mixes-rows", "windows of rows")
    (stored,) = stored_dims(x, [dim])
    emitted = walk.emit(aten.unfold.default, x.node, stored, bound["size"], bound["step"])
    return walk.result(node, emitted, (*x.is_row, False), x, [x])


# Repeating features repeats them in every row.
@register("layout", [aten.expand.default])
def _expand(walk: Walk, node: fx.Node) -> RowValue:
    x = walk.row_argument(node, node.args[0])
    shape = tuple(node.meta["val"].shape)
    is_row = (False,) * (len(shape) - len(x.is_row)) + x.is_row
    features = [s for s, row in zip(shape, is_row, strict=True) if not row]
    if any(not isinstance(f, int) for f in features):
        raise Boundary("no-rule", "an expansion of symbolic size")
    emitted = pad_features(walk, x, len(features))
    if not same_shape(features, x.features):
        emitted = walk.emit(aten.expand.default, emitted, [-1, *features])
    return walk.result(node, emitted, is_row, x, [x])


# ---- helpers ---------------------------------------------------------------------------------


def bind(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by name, defaults included."""
    schema = node.target._schema
    bound = {
        arg.name: (arg.default_value if arg.has_default_value() else None)
        for arg in schema.arguments
    }
    bound.update(zip(bound, node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def stored_dims(x: RowValue, dims: Iterable[int]) -> list[int]:
    """Positions in ``[rows, *features]`` of a value's feature dimensions."""
    return [1 + sum(not row for row in x.is_row[:d]) for d in dims]


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are provably equal."""
    return len(a) == len(b) and all(
        statically_known_true(i == j) for i, j in zip(a, b, strict=True)
    )


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal, as far as this compilation is concerned.

    Sizes that are symbolic and happen to be equal are made so: Dynamo then guards on it, and
    compiles anew for other inputs.
    """
    if statically_known_true(a == b):
        return True
    symbolic = [s for s in (a, b) if isinstance(s, torch.SymInt)]
    if not symbolic or any(s.node.hint is None for s in symbolic):
        return False
    hints = [s.node.hint if isinstance(s, torch.SymInt) else s for s in (a, b)]
    return hints[0] == hints[1] and bool(a == b)


def same_rows(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two row shapes are equal, as :func:`same_size`."""
    return len(a) == len(b) and all(same_size(i, j) for i, j in zip(a, b, strict=True))


def common_layout(operands: Sequence[RowValue], ndim: int) -> tuple[bool, ...]:
    """The layout of a pointwise result, if all operands have the same rows in the same places.

    Raises:
        Boundary: ``misaligned``.
    """
    first = operands[0]
    layouts = [(False,) * (ndim - len(o.is_row)) + o.is_row for o in operands]
    for operand, layout in zip(operands, layouts, strict=True):
        if layout != layouts[0] or not same_rows(operand.row_shape, first.row_shape):
            shapes = " and ".join(str(list(o.shape)) for o in operands)
            raise Boundary("misaligned", f"rows of shapes {shapes} do not line up")
        if operand.chain != first.chain:
            raise Boundary("misaligned", "two different selections of rows are combined")
    return layouts[0]


def pad_features(walk: Walk, x: RowValue, features: int) -> fx.Node:
    """``x`` with leading features of size one, so that it broadcasts against ``features``."""
    missing = features - len(x.features)
    return walk.view(x.node, [*[1] * missing, *x.features]) if missing else x.node


def match_view(x: RowValue, shape: Sequence[Any]) -> tuple[bool, ...] | None:
    """Which dimensions of a view are rows; None if some would hold rows and features.

    Runs of row dimensions and runs of feature dimensions are matched from the left by their
    products. Dimensions of size one belong to any run and count as features.
    """
    runs: list[list[Any]] = []
    for size, row in zip(x.shape, x.is_row, strict=True):
        if not row and statically_known_true(size == 1):
            continue
        if runs and runs[-1][0] == row:
            runs[-1][1] *= size
        else:
            runs.append([row, size])
    is_row: list[bool] = []
    dims = list(shape)
    for row, size in runs:
        taken: list[Any] = []
        while not (taken and statically_known_true(prod(taken) == size)):
            if not dims:
                return None
            dim = dims.pop(0)
            unit = statically_known_true(dim == 1)
            is_row.append(row and not unit)
            if not unit:
                taken.append(dim)
    if any(not statically_known_true(d == 1) for d in dims):
        return None
    return tuple(is_row + [False] * len(dims))


def dims_of(dims: Any, ndim: int) -> list[int]:
    """Normalised dimensions; None and the empty list mean all of them."""
    if isinstance(dims, int):
        dims = [dims]
    if dims is None or len(dims) == 0:
        return list(range(ndim))
    return [int(d) % ndim for d in dims]


def _two(node: fx.Node) -> tuple[Any, Any]:
    bound = list(bind(node).values())
    return bound[0], bound[1]
