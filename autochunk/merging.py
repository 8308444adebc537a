"""Merging: views that merge rows with features are moved behind the ops that reduce the logits.

    z = torch.stack([head(x) for head in heads], 1)                 [B, K, T, V]
    F.cross_entropy(z.view(-1, V), y.view(-1))                      [B·K·T, V]

A chunk of rows of ``x`` is no range of the view's rows. But the ops behind the view could as well
be done on ``z``: a map of elements, or along another dimension, commutes with a view that merges
dimensions. ``lift`` says which views stand in its way (:attr:`Lifted.merging`). Here each op behind
them is written for the shape before the merge (*fine*), and other operands are split to it. The
view is done where an op cannot be written so: a narrow value is merged outside of the region, a
wide one is a refusal of that op, unless it is only returned.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from autochunk.decompositions import REDUCING_LOSSES
from autochunk.lift import lift
from autochunk.lower import needs_grad
from autochunk.rules import KEPT, Boundary, bind, is_iota_of, rule_for, same_shape, same_size
from autochunk.types import Lifted, Lowered

aten = torch.ops.aten

#: Ops that take ``dim`` and leave the others alone; with ``keepdim`` they may remove it.
_ALONG = {
    *(aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default),
    *(aten.cumsum.default, aten.cumprod.default, aten.cummax.default, aten.cummin.default),
    *(aten.logcumsumexp.default, aten.sort.default, aten.sort.stable, aten.topk.default),
    *(aten.slice.Tensor, aten.flip.default, aten.index_select.default),
}
_REDUCING = {
    *(aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default),
    *(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default),
    *(aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim),
    *(aten.all.dims, aten.logsumexp.default, aten.prod.dim_int, aten.argmax.default),
    *(aten.argmin.default, aten.max.dim, aten.min.dim, aten.median.dim, aten.mode.default),
    *(aten.kthvalue.default, aten.var.correction, aten.std.correction, aten.nansum.default),
    *(aten.var_mean.correction, aten.linalg_vector_norm.default, aten.count_nonzero.default),
    aten.count_nonzero.dim_IntList,
}
#: Ops along ``dim`` whose other tensors have the first one's shape but for that dimension.
_INDEXED = {
    *(aten.gather.default, aten.scatter.value, aten.scatter.src, aten.scatter_add.default),
    *(aten.scatter.value_reduce, aten.scatter_reduce.two),
}
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_PERMUTING = (aten.permute.default, aten.transpose.int, aten.t.default)
_SQUEEZING = (aten.squeeze.dim, aten.squeeze.dims)


def lift_unmerged(lowered: Lowered, defer: bool = True) -> tuple[Lowered, Lifted]:
    """Lifts a lowered graph, after views that merge rows with features have been moved in it."""
    lifted = lift(lowered, defer)
    while lifted.merging:
        lowered = _unmerge(lowered, lifted.merging)
        lifted = lift(lowered, defer)
    return lowered, lifted


def _unmerge(lowered: Lowered, views: Collection[fx.Node]) -> Lowered:
    """The same, as another graph, with ``views`` moved as far as they go."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(lowered.graph.graph, copies))
    with enable_python_dispatcher(), torch.no_grad(), torch._C._DisableAutocast():
        _Mover(graph, {copies[view] for view in views}).run()
    graph.eliminate_dead_code()
    graph.lint()
    needing = [node in lowered.needs_grad for node in copies if node.op == "placeholder"]
    return replace(
        lowered,
        graph=fx.GraphModule(lowered.graph, graph),
        heads={copies[node]: candidate for node, candidate in lowered.heads.items()},
        needs_grad=needs_grad(graph, needing),
    )


@dataclass(frozen=True)
class _Fine:
    """A value before dimensions are merged.

    Attributes:
        node: It, or a call with several results of one shape.
        groups: For each of the user's dimensions, how many of the value's are merged into it.
    """

    node: fx.Node
    groups: tuple[int, ...]

    @property
    def shape(self) -> tuple[Any, ...]:
        val = self.node.meta["val"]
        return tuple((val if isinstance(val, torch.Tensor) else val[0]).shape)

    @property
    def sizes(self) -> list[tuple[Any, ...]]:
        """The value's sizes, by the user's dimensions."""
        sizes = iter(self.shape)
        return [tuple(next(sizes) for _ in range(n)) for n in self.groups]

    def dims(self, dim: int) -> list[int]:
        """The value's dimensions in one of the user's."""
        dim %= len(self.groups)
        start = sum(self.groups[:dim])
        return list(range(start, start + self.groups[dim]))

    def dim(self, dim: int, node: fx.Node) -> int:
        """As :meth:`dims`, of an op that runs along one."""
        found = self.dims(dim)
        if len(found) > 1:
            raise Boundary("mixes-rows", f"{node.target} runs along rows and features merged")
        return found[0]


class _Mover:
    def __init__(self, graph: fx.Graph, views: Collection[fx.Node]) -> None:
        self.graph = graph
        self.views = views
        self.fine: dict[fx.Node, _Fine] = {}
        self.merged: dict[fx.Node, fx.Node] = {}
        self.numbers: dict[sympy.Expr, fx.Node] = {}
        self.current: fx.Node | None = None

    def run(self) -> None:
        for node in list(self.graph.nodes):
            given = [a for a in node.all_input_nodes if a in self.fine]
            self.current = node
            with self.graph.inserting_before(node):
                try:
                    if node in self.views:
                        node.meta[KEPT] = Boundary("mixes-rows", "a view of rows and features")
                        self.fine[node] = self._view(node, self._fine_of(node.args[0]))
                    elif given and node.op == "call_function":
                        self._take(node)
                    elif given:
                        self._keep(node, given, None)
                except Boundary as boundary:
                    self._keep(node, given, boundary)

    def _fine_of(self, node: fx.Node) -> _Fine:
        return self.fine.get(node) or _Fine(node, (1,) * node.meta["val"].dim())

    def _take(self, node: fx.Node) -> None:
        """Writes an op for the fine shape of its operands."""
        if isinstance(node.meta["val"], torch.SymInt):
            node.replace_all_uses_with(self._number(node.meta["val"]))
            return
        made = self._moved(node)
        if all(n == 1 for n in made.groups):
            node.replace_all_uses_with(made.node)
        else:
            self.fine[node] = made

    def _keep(self, node: fx.Node, given: Sequence[fx.Node], boundary: Boundary | None) -> None:
        """Leaves an op as it is: what it reads is merged before it."""
        if node in self.views:
            node.meta[KEPT] = boundary
        for arg in given:
            try:
                merged = self._merge(arg)
            except Boundary:
                continue  # the view stays where it was
            if boundary is not None:
                boundary.at = node
            if merged.meta.get(KEPT) is None:
                merged.meta[KEPT] = boundary
            node.replace_input_with(arg, merged)

    def _merge(self, node: fx.Node) -> fx.Node:
        if node not in self.merged:
            fine = self.fine[node]
            merged = [self._number(prod(sizes)) for sizes in fine.sizes]
            whole = fine.node
            if not whole.meta["val"].is_contiguous():
                whole = self._emit(aten.clone.default, whole, memory_format=torch.contiguous_format)
            self.merged[node] = self._emit(aten.view.default, whole, merged)
            self.merged[node].meta["stack_trace"] = node.meta.get("stack_trace")
        return self.merged[node]

    # ---- ops

    def _moved(self, node: fx.Node) -> _Fine:
        target = node.target
        if target is operator.getitem:
            fine = self.fine[node.args[0]]
            return _Fine(self._emit(target, fine.node, node.args[1]), fine.groups)
        rule = rule_for(target)
        if rule is None:
            raise Boundary("no-rule", f"there is no rule for {target}")
        if rule.family == "pointwise" and target is not aten.bucketize.Tensor:
            return self._pointwise(node)
        first = node.args[0]
        if first in self.fine:
            fine = self.fine[first]
            if target in _VIEWS:
                return self._view(node, fine)
            for targets, move in self._moves().items():
                if target in targets:
                    return move(node, fine)
        raise Boundary("no-rule", f"rows and features were merged; there is no rule for {target}")

    def _moves(self) -> Mapping[Collection[Any], Callable[[fx.Node, _Fine], _Fine]]:
        return {
            tuple(_ALONG | _INDEXED): self._along,
            tuple(_REDUCING): self._reduce,
            _PERMUTING: self._permute,
            _SQUEEZING: self._squeeze,
            (aten.unsqueeze.default,): self._unsqueeze,
            (aten.select.int,): self._select,
            (aten.expand.default,): self._expand,
            (aten.index.Tensor,): self._index,
        }

    def _view(self, node: fx.Node, fine: _Fine) -> _Fine:
        """The groups of a view of the merged value; dimensions are split where that is needed."""
        found = _refined(fine.shape, tuple(node.meta["val"].shape))
        if found is None:
            shape, seen = list(node.args[0].meta["val"].shape), list(node.meta["val"].shape)
            raise Boundary("mixes-rows", f"a view of {shape} as {seen} mixes rows")
        sizes, groups = found
        if same_shape(sizes, fine.shape):
            return _Fine(fine.node, groups)
        return _Fine(self._split(fine.node, sizes), groups)

    def _pointwise(self, node: fx.Node) -> _Fine:
        bound = bind(node)
        if node.target in REDUCING_LOSSES and bound["reduction"] != 0:
            raise Boundary("mixes-rows", f"{node.target} reduces over rows")
        out = node.meta["val"]
        ndim = (out if isinstance(out, torch.Tensor) else out[0]).dim()
        tensors = [a for a in node.all_input_nodes if isinstance(a.meta["val"], torch.Tensor)]
        wanted: list[tuple[Any, ...]] = [(1,)] * ndim
        for arg in tensors:
            if arg in self.fine:
                own = self.fine[arg].sizes
                for d, parts in enumerate(own, ndim - len(own)):
                    if len(parts) > 1 and not _is_one(parts):
                        if len(wanted[d]) > 1 and not same_shape(wanted[d], parts):
                            raise Boundary("misaligned", "values merged otherwise are combined")
                        wanted[d] = parts
        new = {arg: self._operand(arg, wanted) for arg in tensors}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda a: new.get(a, a))
        return _Fine(self._emit(node.target, *args, **kwargs), tuple(map(len, wanted)))

    def _operand(self, arg: fx.Node, wanted: Sequence[tuple[Any, ...]]) -> fx.Node:
        """An operand with its dimensions split as those of ``wanted``, of which there are more."""
        own = self._fine_of(arg)
        sizes: list[Any] = []
        for mine, theirs in zip(own.sizes, wanted[len(wanted) - len(own.groups) :], strict=True):
            if len(mine) == len(theirs):
                sizes += mine
            elif _is_one(mine):
                sizes += [1] * len(theirs)
            elif len(mine) == 1 and same_size(mine[0], prod(theirs)):
                sizes += theirs
            else:
                raise Boundary("misaligned", "an operand does not line up with the merged rows")
        return own.node if same_shape(sizes, own.shape) else self._split(own.node, sizes)

    def _along(self, node: fx.Node, fine: _Fine) -> _Fine:
        bound = bind(node)
        if node.target is aten.slice.Tensor and _is_whole(node):
            return fine
        several = isinstance(bound.get("dim", bound.get("dims")), (list, tuple))
        name = "dims" if "dims" in bound else "dim"
        dims = [fine.dim(d, node) for d in (bound[name] if several else [bound[name]])]
        others: list[tuple[Any, ...]] = fine.sizes
        if not several:
            others[bound[name] % len(fine.groups)] = (None,)
        changed: dict[str, Any] = {"self": fine.node, name: dims if several else dims[0]}
        for key in ("index", "src"):
            if node.target in _INDEXED and isinstance(bound.get(key), fx.Node):
                changed[key] = self._aligned(bound[key], others)
        return _Fine(self._emit_bound(node, bound, changed), fine.groups)

    def _aligned(self, arg: fx.Node, wanted: Sequence[tuple[Any, ...]]) -> fx.Node:
        """A tensor that has the fine shape ``wanted``, but any size in place of None."""
        own = self._fine_of(arg)
        filled = [
            mine if theirs == (None,) else theirs
            for mine, theirs in zip(own.sizes, wanted, strict=True)
        ]
        for mine, theirs in zip(own.sizes, filled, strict=True):
            if not same_size(prod(mine), prod(theirs)):
                raise Boundary("misaligned", "an index does not line up with the merged rows")
        return self._operand(arg, filled)

    def _reduce(self, node: fx.Node, fine: _Fine) -> _Fine:
        bound = bind(node)
        dims, keeps = bound.get("dim"), bool(bound.get("keepdim", False))
        if dims is None or (isinstance(dims, (list, tuple)) and not dims):
            if keeps:
                raise Boundary("no-rule", f"{node.target} of all dimensions, which are kept")
            return _Fine(self._emit_bound(node, bound, {"self": fine.node}), ())
        changed: dict[str, Any] = {"self": fine.node}
        if isinstance(dims, (list, tuple)):
            changed["dim"] = [i for d in dims for i in fine.dims(d)]
        else:
            changed["dim"] = fine.dim(dims, node)
        several = dims if isinstance(dims, (list, tuple)) else [dims]
        gone = set() if keeps else {d % len(fine.groups) for d in several}
        groups = tuple(n for d, n in enumerate(fine.groups) if d not in gone)
        return _Fine(self._emit_bound(node, bound, changed), groups)

    def _permute(self, node: fx.Node, fine: _Fine) -> _Fine:
        order = list(range(len(fine.groups)))
        if node.target is aten.permute.default:
            order = [d % len(order) for d in node.args[1]]
        elif len(order) == 2 or node.target is aten.transpose.int:
            a, b = (0, 1) if node.target is aten.t.default else node.args[1:]
            order[a], order[b] = order[b], order[a]
        dims = [i for d in order for i in fine.dims(d)]
        made = self._emit(aten.permute.default, fine.node, dims)
        return _Fine(made, tuple(fine.groups[d] for d in order))

    def _squeeze(self, node: fx.Node, fine: _Fine) -> _Fine:
        dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
        dims = [d % len(fine.groups) for d in dims]
        gone = [d for d in dims if statically_known_true(prod(fine.sizes[d]) == 1)]
        places = [i for d in gone for i in fine.dims(d)]
        made = self._emit(aten.squeeze.dims, fine.node, places) if places else fine.node
        return _Fine(made, tuple(n for d, n in enumerate(fine.groups) if d not in gone))

    def _unsqueeze(self, node: fx.Node, fine: _Fine) -> _Fine:
        dim = node.args[1] % (len(fine.groups) + 1)
        made = self._emit(aten.unsqueeze.default, fine.node, sum(fine.groups[:dim]))
        return _Fine(made, (*fine.groups[:dim], 1, *fine.groups[dim:]))

    def _select(self, node: fx.Node, fine: _Fine) -> _Fine:
        dim = node.args[1] % len(fine.groups)
        made = self._emit(aten.select.int, fine.node, fine.dim(dim, node), node.args[2])
        return _Fine(made, (*fine.groups[:dim], *fine.groups[dim + 1 :]))

    def _expand(self, node: fx.Node, fine: _Fine) -> _Fine:
        sizes = list(node.args[1])
        new = len(sizes) - len(fine.groups)
        expanded = sizes[:new]
        for size, mine in zip(sizes[new:], fine.groups, strict=True):
            expanded += [-1] * mine if mine > 1 else [size]
        wanted = node.meta["val"].shape[new:]
        for size, parts in zip(wanted, fine.sizes, strict=True):
            if len(parts) > 1 and not same_size(size, prod(parts)):
                raise Boundary("no-rule", "merged rows are repeated")
        made = self._emit(aten.expand.default, fine.node, expanded)
        return _Fine(made, (*(1,) * new, *fine.groups))

    def _index(self, node: fx.Node, fine: _Fine) -> _Fine:
        """``x[arange(N), labels]`` of merged rows is a gather."""
        indices = list(node.args[1])
        rows, size = len(indices) - 1, fine.shape[-1]
        shape = node.args[0].meta["val"].shape
        fits = rows == len(fine.groups) - 1 and fine.groups[-1] == 1 and None not in indices
        if not fits or not all(is_iota_of(indices[d], d, shape[:rows]) for d in range(rows)):
            raise Boundary("misaligned", "merged rows are selected")
        labels = indices[rows]
        val = labels.meta["val"]
        if val.dtype == torch.bool or not same_shape(val.shape, shape[:rows]):
            raise Boundary("misaligned", "labels are not one index per row")
        labels = self._aligned(labels, fine.sizes[:rows])
        is_negative = self._emit(aten.lt.Scalar, labels, 0)
        wrapped = self._emit(aten.add.Scalar, labels, size)
        labels = self._emit(aten.where.self, is_negative, wrapped, labels)
        picked = self._emit(
            aten.gather.default, fine.node, -1, self._emit(aten.unsqueeze.default, labels, -1)
        )
        return _Fine(self._emit(aten.squeeze.dim, picked, -1), fine.groups[:rows])

    # ---- nodes

    def _split(self, node: fx.Node, sizes: Sequence[Any]) -> fx.Node:
        """A value as its dimensions split into ``sizes``; one number everywhere is made so."""
        ones = [d for d, size in enumerate(sizes) if statically_known_true(size == 1)]
        rest = [size for d, size in enumerate(sizes) if d not in ones]
        if same_shape(rest, node.meta["val"].shape):
            for d in ones:
                node = self._emit(aten.unsqueeze.default, node, d)
            return node
        if node.target is aten.full.default and all(isinstance(s, int) for s in sizes):
            return self._emit(aten.full.default, list(sizes), node.args[1], **node.kwargs)
        made = self._emit(aten.view.default, node, [self._number(s) for s in sizes])
        shapes = f"{list(node.meta['val'].shape)} as {list(sizes)}"
        made.meta[KEPT] = Boundary("mixes-rows", f"a view of {shapes} mixes rows")
        return made

    def _number(self, size: Any) -> Any:
        """A size as a number, or a node that computes it."""
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node.expr
        if expr.is_number:
            return int(expr)
        if expr not in self.numbers:
            known = self._provider(expr)
            if known is None:
                symbols = {symbol: self._provider(symbol) for symbol in expr.free_symbols}
                if None in symbols.values():
                    raise Boundary("no-rule", f"a size of {expr} cannot be computed here")
                env = {symbol: fx.Proxy(node) for symbol, node in symbols.items()}
                known = sympy_interp(PythonReferenceAnalysis, env, expr).node
                for node in self.graph.nodes:
                    if "val" not in node.meta and node.op == "call_function":
                        values = fx.map_arg((node.args, node.kwargs), lambda a: a.meta["val"])
                        node.meta["val"] = node.target(*values[0], **values[1])
            self.numbers[expr] = known
        return self.numbers[expr]

    def _provider(self, expr: sympy.Expr) -> fx.Node | None:
        """A node that is a number, or a size of a value before this op."""
        for node in self.graph.nodes:
            val = node.meta.get("val")
            if node is self.current:
                break
            if isinstance(val, torch.SymInt) and val.node.expr == expr:
                return node
            for dim, size in enumerate(val.shape if isinstance(val, torch.Tensor) else ()):
                found = isinstance(size, torch.SymInt) and size.node.expr == expr
                if found and node not in self.fine:
                    return self._emit(aten.sym_size.int, node, dim)
        return None

    def _emit_bound(self, node: fx.Node, bound: dict[str, Any], changed: dict[str, Any]) -> fx.Node:
        bound = {**bound, **changed}
        schema = node.target._schema.arguments
        args = [bound[arg.name] for arg in schema if not arg.kwarg_only]
        kwargs = {
            arg.name: bound[arg.name]
            for arg in schema
            if arg.kwarg_only and bound[arg.name] is not None
        }
        return self._emit(node.target, *args, **kwargs)

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self.graph.call_function(target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), lambda a: a.meta["val"])
        fakes = [v for v in pytree.tree_leaves((values, named)) if isinstance(v, FakeTensor)]
        with fakes[0].fake_mode if fakes else contextlib.nullcontext():
            made.meta["val"] = target(*values, **named)
        if self.current is not None:
            made.meta["stack_trace"] = self.current.meta.get("stack_trace")
        return made


def _is_one(sizes: Sequence[Any]) -> bool:
    """Whether a dimension that these are merged into has one element: it is broadcast."""
    return all(statically_known_true(size == 1) for size in sizes)


def _is_whole(node: fx.Node) -> bool:
    """Whether a slice takes everything."""
    return bind(node)["step"] == 1 and same_shape(
        node.meta["val"].shape, node.args[0].meta["val"].shape
    )


def _refined(shape: Sequence[Any], seen: Sequence[Any]) -> tuple[list[Any], tuple[int, ...]] | None:
    """How a view of ``shape`` as ``seen`` splits and merges dimensions, if it does no more.

    Returns:
        The sizes of the parts that dimensions are split into, and for each dimension of ``seen``
        how many of them are merged into it.
    """
    if any(statically_known_true(size == 0) for size in (*shape, *seen)):
        return None  # nothing is split into anything
    left = [size for size in shape if not statically_known_true(size == 1)]
    sizes: list[Any] = []
    groups: list[int] = []
    for size in seen:
        begun, rest = len(sizes), size
        if statically_known_true(size == 1):
            sizes.append(1)
        while not statically_known_true(rest == 1):
            if not left:
                return None
            part = left.pop(0)
            if statically_known_true(rest % part == 0):
                rest = rest // part
            elif statically_known_true(part % rest == 0):
                left.insert(0, part // rest)
                part, rest = rest, 1
            else:
                return None
            sizes.append(part)
        groups.append(len(sizes) - begun)
    return None if left else (sizes, tuple(groups))
