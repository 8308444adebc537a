"""Rewrite: a new Dynamo-level graph in which each region is one opaque op.

    1. Everything outside the cone is copied as it was.
    2. Outer nodes of the lowered graph follow, where something needs them.
    3. Per group of regions: their inputs are prepared (rows selected, expanded, flattened), then
         fused      cotangents, the op on detached inputs, and ``attach`` on the loss;
         recompute  the differentiable op;
         forward    the same on detached inputs.
    4. Tail nodes follow, reading the region's outputs in the user's shapes.
    5. Wide values that were outputs of the graph leave it; their inputs are returned instead.

The lowered nodes had autocast applied when they were lowered; it is switched off around them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from autochunk.find import fake, is_differentiable
from autochunk.lower import uses_autocast
from autochunk.memory import Memory, is_alias, storages, written_arguments
from autochunk.modes import ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD, recording_of
from autochunk.runtime import gradient_positions
from autochunk.sink import ancestors
from autochunk.tail import applied, logical_order, output_index
from autochunk.types import (
    Cotangents,
    Lifted,
    Lowered,
    Plan,
    Region,
    RowInput,
    RowOp,
    RowValue,
)
from autochunk.walk import is_size, row_input_features

aten = torch.ops.aten


@dataclass(frozen=True)
class Scheduled:
    """A region with everything needed to write it into the graph."""

    region: Region
    plan: Plan
    cotangents: Cotangents | None
    key: str


@dataclass(frozen=True)
class Grouped:
    """Regions that one op computes, so that a weight they share has one gradient.

    Attributes:
        items: One, or several of one strategy (and, if fused, of one loss).
        shared: For each of them its shared inputs; equal ones are one node.
        key: Finds it at run time.
        kept: Whether a fused group's gradients are kept outside of the graph (``keeping.py``).
    """

    items: tuple[Scheduled, ...]
    shared: tuple[tuple[fx.Node, ...], ...]
    key: str
    kept: bool


@dataclass(frozen=True)
class Deferral:
    """A wide output of the graph that is not computed by it.

    Attributes:
        node: The lowered node.
        positions: Where it stood in the graph's outputs.
        graph: Computes it from ``inputs``.
        inputs: For each input, ``("input", i)`` for an input of the graph or ``("output", i)``
            for one of its new outputs.
        shape, strides: Of the value; symbolic numbers are given as ``inputs`` are.
        val: A fake tensor with its dtype and device.
        needs_grad: Whether a gradient flows through it.
        claims: Whether it says so and none does (``modes.py``).
        symbolic: For each input the dimensions whose size is symbolic; None for a number.
    """

    node: fx.Node
    positions: tuple[int, ...]
    graph: fx.GraphModule
    inputs: tuple[tuple[str, int], ...]
    shape: tuple[int | tuple[str, int], ...]
    strides: tuple[int | tuple[str, int], ...]
    val: torch.Tensor
    needs_grad: bool
    claims: bool
    symbolic: tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class Rewritten:
    """The new graph, and what its wrapper must put back in place.

    Attributes:
        gm: Its outputs are those of the old graph without the deferred ones, then the extra
            inputs of the deferred ones.
        kept: For each output of ``gm`` that the old graph had, its old position.
        n_outputs: Number of outputs of the old graph.
        deferrals: The wide outputs.
        claims: Positions of the other outputs that say they require a gradient and have none.
    """

    gm: fx.GraphModule
    kept: tuple[int, ...]
    n_outputs: int
    deferrals: tuple[Deferral, ...]
    claims: tuple[int, ...]


def rewrite(
    gm: fx.GraphModule,
    memory: Memory,
    lowered: Lowered,
    lifted: Lifted,
    groups: Sequence[Grouped],
) -> Rewritten:
    """Writes the new graph; ``gm`` is not modified."""
    return _Writer(gm, memory, lowered, lifted, groups).write()


#: An op to be applied to a loss, with its other arguments.
_Attachment = tuple[Any, tuple[Any, ...]]


class _Writer:
    def __init__(
        self,
        gm: fx.GraphModule,
        memory: Memory,
        lowered: Lowered,
        lifted: Lifted,
        groups: Sequence[Grouped],
    ) -> None:
        self.gm = gm
        self.lowered = lowered
        self.lifted = lifted
        self.groups = groups
        self.new = fx.Graph()
        self.from_dynamo: dict[fx.Node, fx.Node] = {}
        self.outer: dict[fx.Node, fx.Node] = {}  # lowered node → new node
        self.stored: dict[tuple[str, int], fx.Node] = {}  # region output → new node
        self.logical: dict[fx.Node, fx.Node] = {}  # lowered value node → new node
        self.sizes: dict[sympy.Expr, fx.Node] = {}
        self.selected: dict[sympy.Expr, tuple[fx.Node, int]] = {}  # a symbol → of what, which size
        self.constants: dict[str, torch.Tensor] = {}  # attributes of the new module
        self.dynamo: dict[fx.Node, fx.Node] = {}  # new node → Dynamo's
        self.memory = memory
        self.trace: str | None = None

    def write(self) -> Rewritten:
        output = self.gm.graph.output_node()
        for node in self.gm.graph.nodes:
            if node.op != "output" and node not in self.lowered.cone:
                self.from_dynamo[node] = self.new.node_copy(node, self.from_dynamo.__getitem__)
                self.dynamo[self.from_dynamo[node]] = node
                self._remember_sizes(self.from_dynamo[node], node.meta.get("example_value"))
        for node, source in self.lowered.sources.items():
            self.outer[node] = self.from_dynamo[source]
        exits = self._disable_autocast()
        records = self._recording_at_end()
        if self.lowered.needs_grad and not records:
            self.new.call_function(SET_GRAD, (True,))
        losses: dict[fx.Node, list[_Attachment]] = {}
        for group in self.groups:
            attachment = self._group(group)
            known = group.items[0].cotangents
            if attachment is not None and known is not None:
                losses.setdefault(known.loss, []).append(attachment)
        self._tail(losses)
        deferrals, extra = self._deferrals(output)
        for node in reversed(exits):
            self.new.call_function(EXIT_AUTOCAST, (node,))
        self._write_back(records)
        if self.lowered.needs_grad and not records:
            self.new.call_function(SET_GRAD, (False,))
        gone = {p for d in deferrals for p in d.positions}
        flat = list(output.args[0])
        kept = [i for i in range(len(flat)) if i not in gone]
        results = [self._returned(flat[i]) for i in kept]
        self.new.output((*results, *extra))
        self.new.lint()
        attributes = {
            node.target: operator.attrgetter(node.target)(self.gm)
            for node in self.new.nodes
            if node.op in ("get_attr", "call_module") and node.target not in self.constants
        }
        new_gm = fx.GraphModule({**attributes, **self.constants}, self.new)
        new_gm.meta = dict(self.gm.meta)
        claims = tuple(i for i in kept if self._claims(flat[i]))
        return Rewritten(new_gm, tuple(kept), len(flat), tuple(deferrals), claims)

    # ---- pieces of the graph

    def _disable_autocast(self) -> list[fx.Node]:
        if not uses_autocast(self.gm.graph):
            return []
        devices = {
            node.meta["val"].device.type
            for node in self.lowered.graph.graph.nodes
            if isinstance(node.meta.get("val"), torch.Tensor)
        }
        return [
            self.new.call_function(ENTER_AUTOCAST, (device, None, False, None))
            for device in sorted(devices)
        ]

    def _group(self, group: Grouped) -> _Attachment | None:
        """Writes a group of regions; returns what must be done to a loss that carries gradients."""
        ops = torch.ops.autochunk
        self.trace = self._trace_of(group.items[0].region)
        rows = [
            self._row_input(spec, item.region)
            for item in group.items
            for spec in item.region.row_inputs
        ]
        shared = [self._get(node) for nodes in group.shared for node in nodes]
        strategy = group.items[0].plan.strategy
        if strategy == "recompute":
            rows, shared = ([self._unwritten(n) for n in nodes] for nodes in (rows, shared))
            results = self._emit(ops.forward.default, rows, shared, group.key)
            self._take_outputs(group, results)
            return None
        detached = [[self._detach(n) for n in nodes] for nodes in (rows, shared)]
        if strategy == "forward":
            results = self._emit(ops.forward.default, *detached, group.key)
            self._take_outputs(group, results)
            return None
        weights = [
            node
            for item in group.items
            if item.cotangents is not None
            for node in self._cotangents(item.cotangents)
        ]
        # Numbers to the loop: what they depend on gets its gradient from the tail.
        weights = [self._detach(node) for node in weights]
        op = ops.fused_kept.default if group.kept else ops.fused.default
        results = self._emit(op, *detached, weights, group.key)
        n_outputs = self._take_outputs(group, results)
        if group.kept:
            ticket = self._item(results, n_outputs)
            # A later backward pass may compute the gradients again.
            rows, shared = ([self._unwritten(n) for n in nodes] for nodes in (rows, shared))
            return ops.attach_kept.default, (rows, shared, weights, ticket, group.key)
        row_grads, shared_grads = gradient_positions(group.key)
        wanted = [*(rows[i] for i in row_grads), *(shared[i] for i in shared_grads)]
        gradients = [self._item(results, n_outputs + i) for i in range(len(wanted))]
        return ops.attach.default, (wanted, gradients)

    def _unwritten(self, node: fx.Node) -> fx.Node:
        """A value that the backward pass needs: a copy of it where the graph writes to its memory.

        Autograd would refuse the write to what it keeps, which unchunked may be something else; and
        what is computed from an input that is written to would be computed again from what was
        written (``copies.py``).
        """
        if not self.memory.written:
            return node
        source = node
        while source not in self.dynamo and getattr(source.target, "is_view", False):
            source = source.all_input_nodes[0]
        held = {n: storages(fake(self.dynamo[n])) for n in ancestors([node]) if n in self.dynamo}
        inputs = (s for n, found in held.items() if n.op == "placeholder" for s in found)
        written = self.memory.written.intersection((*held.get(source, ()), *inputs))
        return self._emit(torch.ops.autochunk.copy_of.default, node) if written else node

    def _take_outputs(self, group: Grouped, results: fx.Node) -> int:
        """Notes the outputs of a group's regions; returns their number."""
        n = 0
        for item in group.items:
            for i, value in enumerate(item.region.outputs):
                out = self._item(results, n)
                self.stored[item.region.name, i] = out if value.needs_grad else self._detach(out)
                n += 1
        return n

    def _tail(self, losses: Mapping[fx.Node, list[_Attachment]]) -> None:
        for node in self.lifted.tail:
            self.trace = node.meta.get("stack_trace")
            split = self.lifted.splits.get(node)
            args, kwargs = node.args, dict(node.kwargs)
            if split is not None and split.outer is not None:
                made = split.outer(self._emit, self._value(split.inner))
            elif split is not None:
                first = self._value(split.inner)
                rest = fx.map_arg(node.args[1:], self._get)
                made = self._emit(
                    node.target, first, *rest, **{**fx.map_arg(kwargs, self._get), **split.kwargs}
                )
            else:
                made = self._emit(
                    applied(node), *fx.map_arg(args, self._get), **fx.map_arg(kwargs, self._get)
                )
            for attach, args in losses.get(node, []):
                made = self._emit(attach, made, *args)
            self.outer[node] = made
            self._remember_sizes(made, node.meta.get("val"))

    def _deferrals(self, output: fx.Node) -> tuple[list[Deferral], list[fx.Node]]:
        flat = list(output.args[0])
        lowered_results = self.lowered.results
        extra: list[fx.Node] = []
        detached: dict[fx.Node, fx.Node] = {}
        placeholders = [n for n in self.new.nodes if n.op == "placeholder"]
        deferrals = []
        n_kept = sum(1 for arg in flat if not self._is_deferred(arg, lowered_results))
        for node in self.lifted.deferred:
            positions = [
                i for i, arg in enumerate(flat) if self._is_deferred(arg, lowered_results, node)
            ]
            graph, inputs = _wide_graph(self.lowered, node)
            needs_grad = node in self.lowered.needs_grad

            def source(value: Any, needs_grad: bool = needs_grad) -> Any:
                new = self._get(value) if isinstance(value, fx.Node) else self._size(value)
                if not isinstance(new, fx.Node):
                    return int(new)
                if new in placeholders:
                    return ("input", placeholders.index(new))
                if self.memory.written and not needs_grad and isinstance(value, fx.Node):
                    # Else what computes it would be differentiated for nobody, from what has been
                    # written. (AOTAutograd fails for some detached views of inputs, torch 2.13.)
                    new = detached[new] if new in detached else self._detach(new)
                    detached[self._get(value)] = new
                if new not in extra:
                    extra.append(new)
                return ("output", n_kept + extra.index(new))

            val = node.meta["val"]
            deferrals.append(
                Deferral(
                    node=node,
                    positions=tuple(positions),
                    graph=graph,
                    inputs=tuple(source(n) for n in inputs),
                    shape=tuple(source(s) for s in val.shape),
                    strides=tuple(source(s) for s in val.stride()),
                    val=val,
                    needs_grad=needs_grad,
                    claims=any(self._claims(flat[i]) for i in positions),
                    symbolic=tuple(_symbolic_dims(n.meta["val"]) for n in inputs),
                )
            )
        return deferrals, extra

    def _is_deferred(
        self, arg: Any, lowered_results: Sequence[Any], wanted: fx.Node | None = None
    ) -> bool:
        if not isinstance(arg, fx.Node) or arg not in self.lowered.outputs:
            return False
        lowered_node = lowered_results[self.lowered.outputs.index(arg)]
        return (
            lowered_node is wanted if wanted is not None else (lowered_node in self.lifted.deferred)
        )

    def _claims(self, arg: Any) -> bool:
        """Whether an output requires a gradient, by what Dynamo recorded, that never arrives."""
        if not isinstance(arg, fx.Node) or arg not in self.lowered.outputs:
            return False
        node, value = self.lowered.results[self.lowered.outputs.index(arg)], fake(arg)
        says = is_differentiable(value) and value.requires_grad
        return says and node not in self.lowered.needs_grad

    def _returned(self, arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        if arg not in self.lowered.outputs:
            return self._alias(arg)
        node = self.lowered.results[self.lowered.outputs.index(arg)]
        return self._get(node) if isinstance(node, fx.Node) else node

    def _alias(self, node: fx.Node) -> fx.Node:
        """What stayed outside, or shares memory with it: a write returns what it wrote to."""
        if node not in self.from_dynamo:
            if is_alias(node):
                self.from_dynamo[node] = self.new.node_copy(node, self._alias)
            else:
                self.from_dynamo[node] = self._alias(written_arguments(node)[0])
        return self.from_dynamo[node]

    def _recording_at_end(self) -> bool:
        """Whether autograd records where the cone now runs, behind everything else."""
        output = self.gm.graph.output_node()
        return recording_of(self.gm.graph)[output]

    def _write_back(self, records: bool) -> None:
        """Writes what the cone wrote to inputs and buffers, in the end: nobody else reads it."""
        enabled = records or bool(self.lowered.needs_grad)
        for node, value in self.lowered.written.items():
            new = self._get(value)
            recorded = value in self.lowered.needs_grad
            if recorded != enabled:
                self.new.call_function(SET_GRAD, (recorded,))
            self._emit(aten.copy_.default, self.from_dynamo[node], new)
            if recorded != enabled:
                self.new.call_function(SET_GRAD, (enabled,))

    # ---- values

    def _get(self, node: fx.Node) -> Any:
        """The new node (or number) of a lowered node."""
        if node in self.outer:
            return self.outer[node]
        if is_size(node) and not isinstance(node.meta["val"], torch.SymFloat):
            return self._size(node.meta["val"])
        if node in self.lifted.values:
            return self._value(self.lifted.values[node], node)
        self._copy(node)
        return self.outer[node]

    def _copy(self, node: fx.Node) -> None:
        """Copies an outer node of the lowered graph, after those it needs."""
        if node.op == "get_attr":  # the tensor that a list of indices has become
            name = f"autochunk{node.target}"
            self.constants[name] = getattr(self.lowered.graph, node.target)
            self.outer[node] = self.new.get_attr(name)
            return
        for arg in node.all_input_nodes:
            self._get(arg)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._get)
        saved, self.trace = self.trace, node.meta.get("stack_trace")
        self.outer[node] = self._emit(node.target, *args, **kwargs)
        self.trace = saved
        self._remember_sizes(self.outer[node], node.meta.get("val"))

    def _value(self, value: RowValue, node: fx.Node | None = None) -> fx.Node:
        """A region's output in the user's shape."""
        if node is not None and node in self.logical:
            return self.logical[node]
        for item in (item for group in self.groups for item in group.items):
            index = output_index(value, item.region)
            if index is not None:
                out = self.stored[item.region.name, index]
                break
        else:
            raise KeyError(f"{value} is no region's output")
        shape = [*value.computed_row_shape, *value.features]
        if len(shape) != 1 + len(value.features):
            out = self._emit(aten.view.default, out, [self._size(s) for s in shape])
        features = [self._size(f) for f in value.features]
        out = self._select_rows(out, value.selected, value.computed_row_shape, features)
        if value.selected and str(value.selected[-1].out_shape) != str(value.row_shape):
            out = self._emit(
                aten.reshape.default, out, [*(self._size(s) for s in value.row_shape), *features]
            )
        order = logical_order(value.is_row)
        if order != sorted(order):
            out = self._emit(aten.permute.default, out, order)
        if not value.needs_grad:
            out = self._detach(out)
        if node is not None:
            self.logical[node] = out
        return out

    def _row_input(self, spec: RowInput, region: Region) -> fx.Node:
        """An outer value as ``[rows, *features]``, with the region's selection of rows."""
        features = row_input_features(spec)
        if spec.position is not None:
            out = self._position(spec, spec.position)
        else:
            out = self._rows_first(spec)
        sizes = [self._size(f) for f in features]
        steps = (*spec.own, *region.chain[len(spec.chain) :])
        out = self._select_rows(out, steps, spec.row_shape, sizes)
        if len(steps[-1].out_shape if steps else spec.row_shape) != 1:
            out = self._emit(aten.reshape.default, out, [-1, *sizes])
        return out

    def _rows_first(self, spec: RowInput) -> fx.Node:
        """An outer value as ``[*row_shape, *features]``."""
        out = self._get(spec.source)
        for d in spec.repeated:
            out = self._emit(aten.slice.Tensor, out, d, 0, 1)
        shape = list(spec.shape)
        pad = len(spec.is_row) - len(shape)
        if pad:
            out = self._emit(aten.view.default, out, [1] * pad + [self._size(s) for s in shape])
            shape = [1] * pad + shape
        rows = iter(spec.row_shape)
        full = [next(rows) if row else s for s, row in zip(shape, spec.is_row, strict=True)]
        if [str(s) for s in full] != [str(s) for s in shape]:
            out = self._emit(aten.expand.default, out, [self._size(s) for s in full])
        order = logical_order(spec.is_row)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        if inverse != sorted(inverse):
            out = self._emit(aten.permute.default, out, inverse)
        return out

    def _position(self, spec: RowInput, dim: int) -> fx.Node:
        """Where each of the rows stands along one row dimension, ``[*row_shape]``."""
        size, device = self._size(spec.row_shape[dim]), spec.source.meta["val"].device
        out = self._emit(aten.arange.default, size, device=device)
        ones = [1] * len(spec.row_shape)
        out = self._emit(aten.view.default, out, [*ones[:dim], size, *ones[dim + 1 :]])
        return self._emit(aten.expand.default, out, [self._size(s) for s in spec.row_shape])

    def _select_rows(
        self, x: fx.Node, steps: Sequence[RowOp], rows: Sequence[Any], features: Sequence[Any]
    ) -> fx.Node:
        """Row ops on a ``[*rows, *features]`` node; the result has the last one's row shape."""
        current = tuple(rows)
        for step in steps:
            if [str(s) for s in current] != [str(s) for s in step.in_shape]:
                view = [*(self._size(s) for s in step.in_shape), *features]
                x = self._emit(aten.reshape.default, x, view)
            args = fx.map_arg(step.args, self._get)
            if step.target is aten.permute.default:
                n = len(step.in_shape)
                args = ([*args[0], *range(n, n + len(features))],)
            x = self._emit(step.target, x, *args)
            self._note_selected(x, step.out_shape)
            current = step.out_shape
        return x

    def _cotangents(self, known: Cotangents) -> list[fx.Node]:
        """Inlines the graph that computes a region's cotangents."""
        placeholders = [n for n in known.graph.graph.nodes if n.op == "placeholder"]
        env: dict[fx.Node, Any] = {}
        for placeholder, node in zip(placeholders[known.first :], known.inputs, strict=False):
            if any(not is_size(user) for user in placeholder.users):
                env[placeholder] = self._get(node)

        def get(node: fx.Node) -> Any:
            return self._size(node.meta["val"]) if is_size(node) else env[node]

        for node in known.graph.graph.nodes:
            if node.op == "call_function" and not is_size(node):
                args, kwargs = fx.map_arg((node.args, node.kwargs), get)
                env[node] = self._emit(node.target, *args, **kwargs)
            elif node.op == "output":
                return [env[arg] for arg in node.args[0]]
        raise AssertionError("a graph without an output")

    # ---- small things

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.new.call_function(target, args, kwargs)
        if self.trace:
            node.meta["stack_trace"] = self.trace
        return node

    def _item(self, results: fx.Node, index: int) -> fx.Node:
        return self._emit(operator.getitem, results, index)

    def _detach(self, node: fx.Node) -> fx.Node:
        return self._emit(aten.detach.default, node)

    def _trace_of(self, region: Region) -> str | None:
        for node, candidate in self.lowered.heads.items():
            if candidate.name in region.heads:
                return node.meta.get("stack_trace")
        return None

    def _remember_sizes(self, node: fx.Node, val: Any) -> None:
        """Notes which symbols a new node can provide."""
        if isinstance(val, torch.SymInt | torch.SymFloat):
            expr = val.node.expr
            if isinstance(expr, sympy.Symbol):
                self.sizes.setdefault(expr, node)
        elif isinstance(val, torch.Tensor):
            for d, size in enumerate(val.shape):
                if isinstance(size, torch.SymInt) and not size.node.is_nested_int():
                    expr = size.node.expr
                    if isinstance(expr, sympy.Symbol) and expr not in self.sizes:
                        self.sizes[expr] = self._emit(aten.sym_size.int, node, d)

    def _note_selected(self, node: fx.Node, shape: Sequence[Any]) -> None:
        """Notes where sizes can be had that only exist once rows have been selected, by a mask."""
        for d, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and size.node.hint is None:
                self.selected.setdefault(size.node.expr, (node, d))

    def _size(self, size: Any) -> Any:
        """A number, or the new node that computes a symbolic one."""
        if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
            return size
        expr = size.node.expr
        if expr.is_number:
            return int(expr) if isinstance(size, torch.SymInt) else size
        if expr in self.sizes:
            return self.sizes[expr]
        for symbol in expr.free_symbols & self.selected.keys() - self.sizes.keys():
            self.sizes[symbol] = self._emit(aten.sym_size.int, *self.selected[symbol])
        if expr in self.sizes:
            return self.sizes[expr]
        env = {s: fx.Proxy(self.sizes[s]) for s in expr.free_symbols}
        made = sympy_interp(PythonReferenceAnalysis, env, expr)
        self.sizes[expr] = made.node
        return made.node


def _symbolic_dims(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(dim for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt))


def _wide_graph(lowered: Lowered, wide: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The part of the lowered graph that computes a wide value from what is outside of it.

    Nodes that depend on a head are inside, and sizes; everything else is an input.
    """
    dependent: set[fx.Node] = set(lowered.heads)
    for node in lowered.graph.graph.nodes:
        if any(a in dependent for a in node.all_input_nodes):
            dependent.add(node)
    needed: set[fx.Node] = set()
    stack = [wide]
    while stack:
        node = stack.pop()
        inside = node in dependent or (is_size(node) and node.op != "placeholder")
        if node in needed or not inside:
            continue
        needed.add(node)
        stack.extend(node.all_input_nodes)
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    inputs: list[fx.Node] = []
    ordered = [n for n in lowered.graph.graph.nodes if n in needed]
    for node in ordered:
        for arg in node.all_input_nodes:
            if arg not in needed and arg not in env:
                env[arg] = graph.placeholder(arg.name)
                inputs.append(arg)
    for node in ordered:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(env[wide])
    graph.lint()
    return fx.GraphModule({}, graph), inputs
