"""Walk: one pass of the rules over the lowered graph.

1. A head's product starts a row value; a rule lifts each op on row values into the body.
2. Where a rule says stop (a boundary), narrow arguments leave the body and the op stays
   outside, in the tail; a wide argument is a refusal of the heads it came from.
3. Row-only ops on wide values (``logits[:, :-1]``) are not executed on them: they are added to
   the value's chain, which is applied to the inputs of the body instead. Narrow values are
   selected outside.
4. Wide values that depend on no head (``sink.py``) start at one of their operands, and are
   lifted as far as the rules go.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from autochunk import write_rules  # noqa: F401
from autochunk.find import hint, is_differentiable, op_name, source_line
from autochunk.pieces import join, whole
from autochunk.rules import Boundary, aten, bind, rule_for, same_rows, same_shape, same_size
from autochunk.sink import ancestors, rows_of
from autochunk.types import (
    NARROW,
    Candidate,
    Lowered,
    Refusal,
    RowInput,
    RowOp,
    RowValue,
    Split,
)
from autochunk.writes import tensor_name

#: Calls of a Dynamo graph whose result repeats what they are given.
_EXPANSIONS = ("expand", "expand_as", "broadcast_to")

#: Ops of floating point results that carry no gradient.
_WITHOUT_GRADIENT = (
    aten.detach.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
)

_CONSTANTS = (aten.scalar_tensor.default, aten.full.default)


class Walk:
    """One pass over the lowered graph.

    Attributes:
        body: Graph under construction, shared by all regions of the walk.
        env: The row value (or tuple of them) of each lifted node.
        values: Row values that the outer graph reads.
        splits, tail, deferred: as in :class:`Lifted`.
        products: The head that each product in the body belongs to.
        without_gradient: Nodes of the body through which no gradient flows.
        sunk: Nodes that depend on no head and are tried all the same (``sink.sinkable``). Their
            values have a name of their own in ``RowValue.heads`` for each tensor they start at.
    """

    def __init__(
        self, lowered: Lowered, refused: frozenset[str], sunk: Mapping[fx.Node, fx.Node]
    ) -> None:
        self.lowered = lowered
        self.heads = {n: c for n, c in lowered.heads.items() if c.name not in refused}
        self.names = frozenset(c.name for c in self.heads.values())
        self.sunk = sunk if self.heads else {}
        self.body = fx.Graph()
        self.env: dict[fx.Node, RowValue | tuple[RowValue, ...]] = {}
        self.values: dict[fx.Node, RowValue] = {}
        self.splits: dict[fx.Node, Split] = {}
        self.tail: dict[fx.Node, None] = {}
        self.deferred: list[fx.Node] = []
        self.row_inputs: dict[fx.Node, RowInput] = {}
        self.shared_inputs: dict[fx.Node, fx.Node] = {}
        self.index_uses: list[tuple[fx.Node, Any, bool, str]] = []
        self.products: dict[fx.Node, Candidate] = {}
        self._found: dict[str, Refusal] = {}
        self._row_ops: list[RowOp] = []
        self._inputs: dict[Any, fx.Node] = {}
        self.without_gradient: set[fx.Node] = set()
        self._again: dict[Any, dict[fx.Node, fx.Node]] = {}
        self._current: fx.Node | None = None

    # ---- the loop

    def run(self) -> None:
        for node in self.lowered.graph.graph.nodes:
            if node.op == "output":
                self._outputs(node)
            elif node.op == "call_function":
                self._current = node
                self._visit(node)

    def refusals(self, defer: bool) -> dict[str, Refusal]:
        """Heads that turned out to be impossible, or that have nothing to return.

        Args:
            defer: Logits that are returned are enough.
        """
        found = dict(self._found)
        reached = {name for value in self.values.values() for name in value.heads}
        reached |= {name for split in self.splits.values() for name in split.inner.heads}
        if not found:
            for node, candidate in self.heads.items():
                if candidate.name not in reached:
                    returned = any(self._from(n, candidate.name) for n in self.deferred)
                    if returned and defer:
                        continue
                    code, detail = "not-reduced", "nothing in this graph uses the logits"
                    if returned:
                        detail = "the logits are returned and nothing in this graph reduces them"
                    elif node in self.tail:
                        code = "two-pass"
                        detail = "its hidden states are computed from another head's results"
                    found[candidate.name] = Refusal(code, op_name(node), detail, candidate.source)
        return found

    def join_pieces(self) -> None:
        """Computes once what a loop over rows computes piece by piece."""
        inner = {node: split.inner for node, split in self.splits.items()}
        joined = join({**self.values, **inner}, self.body, self.row_inputs)
        self.values = {node: joined[node] for node in self.values}
        for node, split in self.splits.items():
            self.splits[node] = replace(split, inner=joined[node])

    def drop_all_but(self, groups: Sequence[Sequence[RowValue]]) -> None:
        """Leaves values that are in no group, of sunk nodes only, to the outer graph."""
        self.values = {
            node: value
            for node, value in self.values.items()
            if any(
                value.chain == group[0].chain and any(value.node is out.node for out in group)
                for group in groups
            )
        }

    def depends_on_head(self, value: RowValue) -> bool:
        """Whether a value is computed from a head, not from sunk nodes alone."""
        return not self.names.isdisjoint(value.heads)

    def _from(self, node: fx.Node, name: str) -> bool:
        value = self.env.get(node)
        return isinstance(value, RowValue) and name in value.heads

    def _visit(self, node: fx.Node) -> None:
        args = node.all_input_nodes
        free = not self._depends_on_tail(args) and not any(a in self.env for a in args)
        if node in self.heads and free:
            self.env[node] = self._seed(node)
            return
        if node in self.sunk and not self._depends_on_tail(args):
            self._sink(node)
            return
        lifted = [a for a in node.all_input_nodes if a in self.env]
        if not lifted:
            if self._depends_on_tail(node.all_input_nodes):
                self.tail[node] = None
            return
        if is_size(node):
            return
        if node.target is operator.getitem:
            parts = self.env[node.args[0]]
            assert isinstance(parts, tuple)  # only ops with several results are indexed
            self.env[node] = parts[node.args[1]]
            return
        try:
            result = self._apply(node)
        except Boundary as boundary:
            self._stop(node, lifted, boundary)
            return
        if isinstance(result, Split):
            if self._is_wide(result.inner):
                self._stop(node, lifted, Boundary("mixes-rows", f"{node.target} reduces rows"))
                return
            self.splits[node] = result
            self.tail[node] = None
        else:
            self.env[node] = self._of_head(node, result) if node in self.heads else result

    def _of_head(self, node: fx.Node, result: RowValue) -> RowValue:
        """The output of a head whose hidden states were computed from another's, row by row."""
        self.products[result.node] = self.heads[node]
        return replace(result, heads=result.heads | {self.heads[node].name})

    def _sink(self, node: fx.Node) -> None:
        """Computes a node in the body that depends on no head, if there is a rule for it."""
        if node.target is operator.getitem:
            if node.args[0] in self.env:
                parts = self.env[node.args[0]]
                assert isinstance(parts, tuple)  # only ops with several results are indexed
                self.env[node] = parts[node.args[1]]
            return
        source = None
        if not any(a in self.env for a in node.all_input_nodes):
            source = self._source_of(node)
            if source is None:
                return
        try:
            result = self._apply(node)
            if not isinstance(result, Split):
                self.env[node] = result
        except Boundary:
            pass  # computed outside
        finally:
            if source is not None:
                del self.env[source]

    def _source_of(self, node: fx.Node) -> fx.Node | None:
        """Makes an operand of a sunk node a row value, one whose leading dimensions are rows."""
        wide = self.sunk[node].meta["val"].shape
        ndim = node.meta["val"].dim() if isinstance(node.meta["val"], torch.Tensor) else 0
        tensors = [a for a in node.all_input_nodes if isinstance(a.meta["val"], torch.Tensor)]
        for arg in sorted(tensors, key=lambda a: a.meta["val"].dim() != ndim):
            val = arg.meta["val"]
            is_row = rows_of(val.shape, wide)
            if is_row is None or arg.target in _CONSTANTS:
                continue
            self.env[arg] = self._start(arg, is_row, val.shape)
            return arg
        return self._broadcast_source_of(node, wide)

    def _broadcast_source_of(self, node: fx.Node, wide: Sequence[Any]) -> fx.Node | None:
        """As :meth:`_source_of`, where no operand of a pointwise op has all the rows."""
        target, val = node.target, node.meta["val"]
        if not isinstance(target, torch._ops.OpOverload) or not isinstance(val, torch.Tensor):
            return None
        is_row = rows_of(val.shape, wide) if torch.Tag.pointwise in target.tags else None
        if is_row is None:
            return None
        for arg in node.all_input_nodes:
            tensor = arg.meta["val"]
            if not isinstance(tensor, torch.Tensor) or not tensor.dim() or arg.target in _CONSTANTS:
                continue
            padded = [1] * (val.dim() - tensor.dim()) + list(tensor.shape)
            shape = [s if row else f for s, row, f in zip(val.shape, is_row, padded, strict=True)]
            self.env[arg] = self._start(arg, is_row, shape)
            return arg
        return None

    def _start(self, arg: fx.Node, is_row: tuple[bool, ...], shape: Sequence[Any]) -> RowValue:
        """An operand of a sunk node as the row value that the node starts at."""
        rows = tuple(s for s, row in zip(shape, is_row, strict=True) if row)
        return RowValue(
            node=self._row_input(RowInput(arg, is_row, rows, ())),
            is_row=is_row,
            shape=tuple(shape),
            chain=(),
            heads=frozenset({f"rows of {arg.name}"}),
            needs_grad=arg in self.lowered.needs_grad,
            val=arg.meta["val"],
        )

    def _apply(self, node: fx.Node) -> Any:
        if self._depends_on_tail(node.all_input_nodes):
            first = self._first_in_tail(node)
            line = f"{op_name(first)} at {source_line(first)}"
            raise Boundary("two-pass", f"an operand is computed from all the logits, by {line}")
        rule = rule_for(node.target)
        if rule is not None:
            return rule.apply(self, node)
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            if torch.Tag.nondeterministic_seeded in target.tags:
                raise Boundary("random", f"{target} draws random numbers")
            if target._schema.is_mutable:
                raise Boundary("mutation", f"{target} modifies its argument")
        raise Boundary("no-rule", f"there is no rule for {target}")

    def _stop(self, node: fx.Node, lifted: Sequence[fx.Node], boundary: Boundary) -> None:
        for arg in lifted:
            value = self.env[arg]
            if isinstance(value, tuple) or self._is_wide(value):
                refusal = Refusal(
                    boundary.code,
                    op_name(node),
                    boundary.detail,
                    source_line(node),
                )
                for part in parts(value):
                    for name in part.heads & self.names:
                        self._found.setdefault(name, refusal)
            else:
                self.values[arg] = value
        self.tail[node] = None

    def _outputs(self, node: fx.Node) -> None:
        written = {value: target for target, value in self.lowered.written.items()}
        for out in dict.fromkeys(node.all_input_nodes):
            value = self.env.get(out)
            if not isinstance(value, RowValue):
                continue
            if not self._is_wide(value):
                self.values[out] = value
            elif out in written:
                name = tensor_name(written[out])
                detail = f"the logits are written to {name}, which outlives the call"
                refusal = Refusal("mutation", op_name(out), detail, source_line(out))
                for head in value.heads & self.names:
                    self._found.setdefault(head, refusal)
            else:
                self.deferred.append(out)

    def _seed(self, node: fx.Node) -> RowValue:
        bound = bind(node)
        addmm = node.target is aten.addmm.default
        x, w = (bound["mat1"], bound["mat2"]) if addmm else (bound["self"], bound["mat2"])
        val = node.meta["val"]
        is_row = (True, False)
        like = RowValue(
            node=x,
            is_row=is_row,
            shape=tuple(val.shape),
            chain=(),
            heads=frozenset({self.heads[node].name}),
            needs_grad=False,
            val=val,
        )
        rows = self._row_input(RowInput(x, is_row, (val.shape[0],), ()))
        like = replace(like, node=rows)
        weight = self.shared(w)
        if addmm:
            bias = self.outer_operand(bound["self"], is_row, like)
            emitted = self.emit(node.target, bias, rows, weight)
        else:
            emitted = self.emit(node.target, rows, weight)
        self.products[emitted] = self.heads[node]
        grad = any(a in self.lowered.needs_grad for a in node.all_input_nodes)
        return replace(like, node=emitted, needs_grad=grad)

    def _depends_on_tail(self, nodes: Sequence[fx.Node]) -> bool:
        return any(n in self.tail for n in nodes)

    def _first_in_tail(self, node: fx.Node) -> fx.Node:
        """Where what a node takes of the tail left the rows."""
        while found := [arg for arg in node.all_input_nodes if arg in self.tail]:
            node = found[0]
        return node

    def _is_wide(self, value: RowValue) -> bool:
        names = value.heads & self.names or self.names
        widest = max(c.out_features for c in self.heads.values() if c.name in names)
        features = prod(hint(f) for f in value.features)
        return features > 1 and features * NARROW > widest

    # ---- what rules call

    def row_argument(self, node: fx.Node, arg: Any) -> RowValue:
        """The row value of an op's main argument."""
        value = self.env.get(arg)
        if not isinstance(value, RowValue):
            raise Boundary("no-rule", f"{node.target} takes the logits as a side argument")
        return value

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node of the body."""
        made = self.body.call_function(target, args, kwargs)
        if self._current is not None:
            made.meta["stack_trace"] = self._current.meta.get("stack_trace")
        return made

    def emit_bound(self, target: Any, bound: Mapping[str, Any]) -> fx.Node:
        """A new node from arguments by name; names that ``target`` does not take are dropped."""
        args, kwargs = [], {}
        for arg in target._schema.arguments:
            if arg.kwarg_only:
                if arg.name in bound and bound[arg.name] is not None:
                    kwargs[arg.name] = bound[arg.name]
            elif arg.name in bound:
                args.append(bound[arg.name])
            else:
                args.append(arg.default_value)
        return self.emit(target, *args, **kwargs)

    def view(self, x: fx.Node, features: Sequence[Any]) -> fx.Node:
        """``[rows, *features]`` of a body node."""
        if not all(isinstance(f, int) for f in features):
            raise Boundary("no-rule", "a view of features with symbolic sizes")
        rows = self.emit(aten.sym_size.int, x, 0)
        return self.emit(aten.view.default, x, [rows, *features])

    def result(
        self,
        node: fx.Node,
        emitted: fx.Node,
        is_row: tuple[bool, ...],
        like: RowValue,
        operands: Sequence[Any],
        val: torch.Tensor | None = None,
    ) -> RowValue:
        """The lifted value of ``node``; rows of static size one become features."""
        val = node.meta["val"] if val is None else val
        shape = tuple(val.shape)
        for d in range(len(shape)):
            if is_row[d] and statically_known_true(shape[d] == 1):
                at = 1 + sum(not row for row in is_row[:d])
                emitted = self.emit(aten.unsqueeze.default, emitted, at)
                is_row = (*is_row[:d], False, *is_row[d + 1 :])
        row_operands = [o for o in operands if isinstance(o, RowValue)]
        outer_grad = any(
            a in self.lowered.needs_grad for a in node.all_input_nodes if a not in self.env
        )
        grad = outer_grad or any(o.needs_grad for o in row_operands)
        grad = grad and is_differentiable(val) and node.target not in _WITHOUT_GRADIENT
        if not grad and not any(o.node is emitted for o in row_operands):
            self.without_gradient.add(emitted)
        return RowValue(
            node=emitted,
            is_row=is_row,
            shape=shape,
            chain=like.chain,
            heads=frozenset().union(*(o.heads for o in row_operands)),
            needs_grad=grad,
            val=val,
        )

    def results(
        self,
        node: fx.Node,
        emitted: fx.Node,
        is_row: tuple[bool, ...],
        like: RowValue,
        operands: Sequence[Any],
    ) -> RowValue | tuple[RowValue, ...]:
        """As :meth:`result`, for ops that may return several tensors."""
        vals = node.meta["val"]
        if isinstance(vals, torch.Tensor):
            return self.result(node, emitted, is_row, like, operands)
        return tuple(
            self.result(node, self.emit(operator.getitem, emitted, i), is_row, like, operands, val)
            for i, val in enumerate(vals)
        )

    def row_op(
        self,
        node: fx.Node,
        x: RowValue,
        target: Any,
        args: tuple[Any, ...],
        is_row: tuple[bool, ...],
        emitted: fx.Node | None = None,
        val: torch.Tensor | None = None,
    ) -> RowValue:
        """A selection of rows of a wide value, postponed to the body's inputs.

        Args:
            val: Of the selected rows, where the op does more than select them.
        """
        if not self._is_wide(x):
            raise Boundary("misaligned", "rows of a narrow value are selected outside")
        out = tuple((node.meta["val"] if val is None else val).shape)
        row_shape = tuple(s for s, row in zip(out, is_row, strict=True) if row)
        step = self._row_op(RowOp(target, args, x.row_shape, row_shape))
        moved = replace(x, chain=(*x.chain, step))
        return self.result(node, x.node if emitted is None else emitted, is_row, moved, [x], val)

    def _row_op(self, new: RowOp) -> RowOp:
        """The first row op made that does the same: functionalisation repeats views."""
        for old in self._row_ops:
            if (
                (old.target, str(old.args)) == (new.target, str(new.args))
                and same_shape(old.in_shape, new.in_shape)
                and same_shape(old.out_shape, new.out_shape)
            ):
                return old
        self._row_ops.append(new)
        return new

    def on_same_rows(self, operands: Sequence[RowValue]) -> list[RowValue]:
        """Operands with one chain: of two selections of wide rows the second is computed again.

        ``logits[:1] - logits[1:]``: the second term gets inputs of its own (``RowInput.own``), and
        a product of its own. Narrow values that do not line up are combined outside instead.
        """
        first = next((o for o in operands if self.depends_on_head(o)), operands[0])
        movable = any(self._is_wide(o) or not self.depends_on_head(o) for o in operands)
        if all(o.chain == first.chain for o in operands) or not movable:
            return list(operands)
        if not all(same_rows(o.row_shape, first.row_shape) for o in operands):
            return list(operands)
        return [o if o.chain == first.chain else self._compute_again(o, first) for o in operands]

    def joined(self, operands: Sequence[RowValue]) -> RowValue | None:
        """The value that operands are all the pieces of; the caller sets its shape."""
        return whole(operands, self.body, self.row_inputs)

    def _compute_again(self, value: RowValue, like: RowValue) -> RowValue:
        copies = self._again.setdefault((value.chain, like.chain), {})
        needed = ancestors([value.node])
        for node in [n for n in self.body.nodes if n in needed and n not in copies]:
            if node in self.row_inputs:
                spec = self.row_inputs[node]
                own = (*spec.own, *value.chain[len(spec.chain) :])
                copies[node] = self._row_input(replace(spec, chain=like.chain, own=own))
            elif node.op == "placeholder":
                copies[node] = node
            else:
                copies[node] = self.body.node_copy(node, copies.__getitem__)
                if node in self.products:
                    self.products[copies[node]] = self.products[node]
        self.index_uses += [
            (copies[index], size, wraps, source)
            for index, size, wraps, source in self.index_uses
            if index in needed and copies[index] is not index
        ]
        return replace(value, node=copies[value.node], chain=like.chain)

    def shared(self, source: fx.Node) -> fx.Node:
        """A body node for an outer value that every chunk sees whole."""
        if not isinstance(source, fx.Node):
            return source
        val = source.meta["val"]
        if source.target is aten.t.default and val.dim() == 2:
            return self.emit(aten.t.default, self.shared(source.args[0]))
        if source.target in _CONSTANTS and val.dim() == 0 and not source.all_input_nodes:
            return self.emit(source.target, *source.args, **source.kwargs)
        key = ("shared", source)
        if key not in self._inputs:
            self._inputs[key] = self._placeholder(f"shared{len(self.shared_inputs)}", val)
            self.shared_inputs[self._inputs[key]] = source
        return self._inputs[key]

    def outer_operand(
        self, source: fx.Node, is_row: tuple[bool, ...], like: RowValue, whole: bool = False
    ) -> fx.Node:
        """A body node for an outer operand of an op whose result is laid out as ``is_row``.

        Args:
            whole: Take it as row-aligned in any case, also where it does not span the rows.
        """
        val = source.meta["val"]
        if not isinstance(val, torch.Tensor):
            raise Boundary("no-rule", f"a symbolic number ({val}) is an operand")
        pad = len(is_row) - val.dim()
        if pad < 0:
            raise Boundary("misaligned", f"an operand has more dimensions than {list(is_row)}")
        row_sizes = dict(
            zip((d for d, row in enumerate(is_row) if row), like.row_shape, strict=True)
        )
        spans = whole
        for d in range(pad, len(is_row)):
            size = val.shape[d - pad]
            if is_row[d] and not statically_known_true(size == 1):
                if not same_size(size, row_sizes[d]):
                    raise Boundary(
                        "misaligned",
                        f"an operand of shape {list(val.shape)} does not line up with "
                        f"{list(like.row_shape)} rows",
                    )
                spans = True
        if spans:
            return self._rows_of(RowInput(source, is_row, like.row_shape, like.chain), like)
        shared = self.shared(source)
        rows_at = [d - pad for d in range(pad, len(is_row)) if is_row[d]]
        return self.emit(aten.squeeze.dims, shared, rows_at) if rows_at else shared

    def aligned_operand(self, arg: fx.Node, like: RowValue) -> fx.Node:
        """A body node for an operand that must have ``like``'s layout exactly (no broadcast)."""
        value = self.env.get(arg)
        if isinstance(value, RowValue):
            _, value = self.on_same_rows([like, value])
            if (
                value.is_row != like.is_row
                or value.chain != like.chain
                or not same_rows(value.row_shape, like.row_shape)
            ):
                raise Boundary("misaligned", "operands of different rows are combined")
            return value.node
        val = arg.meta["val"]
        if val.dim() != len(like.is_row):
            raise Boundary("misaligned", "operands of different rank are combined")
        sizes = [s for s, row in zip(val.shape, like.is_row, strict=True) if row]
        if not same_rows(sizes, like.row_shape):
            raise Boundary("misaligned", f"{list(val.shape)} does not have the logits' rows")
        return self._rows_of(RowInput(arg, like.is_row, like.row_shape, like.chain), like)

    def written_operand(
        self, arg: fx.Node, is_row: tuple[bool, ...], like: RowValue, whole: bool = False
    ) -> tuple[fx.Node, list[RowValue]]:
        """A body node for what is written over features of ``like``, and the row value it is.

        Args:
            is_row: Its layout.
            whole: As in :meth:`outer_operand`.
        """
        value = self.env.get(arg)
        if value is None:
            return self.outer_operand(arg, is_row, like, whole), []
        if not isinstance(value, RowValue) or (value.is_row, value.chain) != (is_row, like.chain):
            raise Boundary("misaligned", "operands of different rows are combined")
        return value.node, [value]

    def note_index(self, index: fx.Node, size: Any, *, wraps: bool, node: fx.Node) -> None:
        """Remembers that ``index`` must address ``size`` features."""
        self.index_uses.append((index, size, wraps, source_line(node)))

    # ---- inputs of the body

    def _rows_of(self, spec: RowInput, like: RowValue) -> fx.Node:
        """A row-aligned outer value; one number everywhere is written by each chunk."""
        features = row_input_features(spec)
        filled = spec.source.target is aten.full.default
        if not filled or not all(isinstance(f, int) for f in features):
            return self._row_input(spec)
        if isinstance(spec.source.args[1], fx.Node):
            return self._row_input(spec)
        rows = self.emit(aten.sym_size.int, like.node, 0)
        return self.emit(
            aten.full.default, [rows, *features], spec.source.args[1], **spec.source.kwargs
        )

    def _row_input(self, spec: RowInput) -> fx.Node:
        """A row-aligned outer value; what repeats itself along features is read once a row.

        Targets and masks that are broadcast against the logits are views of a few numbers a row.
        They enter the body as those, and are expanded there: as inputs of the loop they would be
        copies of the logits' size, and so would their gradients.
        """
        narrowest = self._narrowest(spec)
        features, kept = row_input_features(spec), row_input_features(narrowest)
        if same_shape(features, kept):
            return self._row_placeholder(replace(narrowest, repeated=()))
        if any(isinstance(f, torch.SymInt) and f.node.hint is None for f in features):
            return self._row_placeholder(spec)
        # int() specialises a symbolic size: everything but the rows is static in a kernel.
        sizes = [int(f) for f in features]
        return self.emit(aten.expand.default, self._row_placeholder(narrowest), [-1, *sizes])

    def _narrowest(self, spec: RowInput) -> RowInput:
        source = spec.source
        while source.target is aten.expand.default:
            source = source.args[0]
        val = source.meta["val"]
        pad = len(spec.is_row) - val.dim()
        repeated: list[int] = []
        if source not in self.lowered.needs_grad or not self._is_given_repeated(source):
            repeated = [
                d
                for d, (size, stride) in enumerate(zip(val.shape, val.stride(), strict=True))
                if not spec.is_row[pad + d] and statically_known_true(stride == 0) and size != 1
            ]
        return replace(spec, source=source, repeated=tuple(repeated))

    def _is_given_repeated(self, node: fx.Node) -> bool:
        """Whether a value could be a view of an input that repeats itself.

        A gradient of such an input has numbers of its own at each place; in one of ``expand`` in
        the graph they are summed.
        """
        given = self.lowered.sources
        return any(
            0 in n.meta["val"].stride() and op_name(given[n]) not in _EXPANSIONS
            for n in ancestors([node])
            if n in given and isinstance(n.meta["val"], torch.Tensor)
        )

    def _row_placeholder(self, spec: RowInput) -> fx.Node:
        key = (
            *("row", spec.source, spec.is_row, spec.chain, len(spec.row_shape), spec.own),
            spec.repeated,
        )
        if key not in self._inputs:
            features = row_input_features(spec)
            val = spec.source.meta["val"]
            fake = val.new_empty([prod(spec.row_shape), *features])
            self._inputs[key] = self._placeholder(f"rows{len(self.row_inputs)}", fake)
            self.row_inputs[self._inputs[key]] = spec
        return self._inputs[key]

    def _placeholder(self, name: str, val: Any) -> fx.Node:
        with self.body.inserting_before():
            placeholder = self.body.placeholder(name)
        placeholder.meta["val"] = val
        return placeholder


def parts(value: RowValue | tuple[RowValue, ...]) -> tuple[RowValue, ...]:
    """The results of an op that may have several."""
    return value if isinstance(value, tuple) else (value,)


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number that only depends on shapes."""
    val = node.meta.get("val")
    return not isinstance(val, torch.Tensor | tuple | list) and val is not None


def row_input_features(spec: RowInput) -> list[Any]:
    """Features of a row input: the source's, padded from the left with ones."""
    if spec.position is not None:
        return []
    pad = len(spec.is_row) - len(spec.shape)
    padded = [1] * pad + list(spec.shape)
    return [s for s, row in zip(padded, spec.is_row, strict=True) if not row]
