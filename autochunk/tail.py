"""Tail: are the loss's derivatives with respect to a region's outputs known before it runs?

They are if the path from the outputs to the loss is affine (sums, means, masks, divisions by
counts). That is not decided by a table of ops: the tail's vjp is traced through autograd, and the
loss is affine in the outputs exactly where the traced cotangents do not use them. The trace is
then the very graph that computes the cotangents in advance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from autochunk.types import Cotangents, Lifted, Lowered, Region, RowValue
from autochunk.walk import is_size

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def differentiable_outputs(lowered: Lowered, lifted: Lifted, region: Region) -> set[fx.Node]:
    """Outputs of the graph that a gradient could come back from, into ``region``."""
    return _reached(lowered, lifted, region, without=None)


def cotangents(lowered: Lowered, lifted: Lifted, region: Region) -> Cotangents | str:
    """The region's cotangents as a graph of outer values, or one sentence why there is none.

    Of the scalars that all gradients pass through, the last one is taken that is affine in the
    outputs: the more of the tail is inside, the nearer are the cotangents to those that the
    unchunked model has (with all rows ignored they are 0, where 0 × the gradient of 0/0 is not).
    """
    reason = "its per-row values reach more than one differentiable output"
    for loss in reversed(_common_scalars(lowered, lifted, region)):
        known = _cotangents_at(loss, lifted, region)
        if isinstance(known, Cotangents):
            return known
        reason = known
    return reason


def _cotangents_at(loss: fx.Node, lifted: Lifted, region: Region) -> Cotangents | str:
    nodes = _between(lifted, region, loss)
    try:
        graph, inputs = _trace_vjp(lifted, region, loss, nodes)
    except RuntimeError as error:  # autograd's; a mistake of our own is another
        return f"the derivative of the loss could not be traced ({error})"
    if any(node.op == "get_attr" for node in graph.graph.nodes):
        return "the derivative of the loss has a constant tensor in it"
    placeholders = [p for p in graph.graph.nodes if p.op == "placeholder"]
    outputs, given = placeholders[: len(region.outputs)], placeholders[len(region.outputs) :]
    if any(not is_size(user) for placeholder in outputs for user in placeholder.users):
        return "the loss is not affine in its per-row values"
    dependent = set(lifted.tail) | set(lifted.values)
    for placeholder, node in zip(given, inputs, strict=False):
        if node in dependent and any(not is_size(user) for user in placeholder.users):
            return "its cotangents depend on the values of another region"
    return Cotangents(loss, graph, first=len(region.outputs), inputs=tuple(inputs))


def belongs(value: RowValue, region: Region) -> bool:
    """Whether a value is (a view of) one of a region's outputs."""
    return output_index(value, region) is not None


def output_index(value: RowValue, region: Region) -> int | None:
    """The position of a value among a region's outputs."""
    if value.chain != region.chain:
        return None
    for i, out in enumerate(region.outputs):
        if out.node is value.node:
            return i
    return None


def _entries(lifted: Lifted, region: Region) -> Iterable[tuple[fx.Node | None, fx.Node]]:
    """(value node, tail node) pairs at which a region's differentiable outputs enter the tail.

    A split has no value node of its own.
    """
    for tail_node in lifted.tail:
        split = lifted.splits.get(tail_node)
        if split is not None:
            if belongs(split.inner, region) and split.inner.needs_grad:
                yield None, tail_node
            continue
        for arg in tail_node.all_input_nodes:
            value = lifted.values.get(arg)
            if value is not None and value.needs_grad and belongs(value, region):
                yield arg, tail_node


def _reached(
    lowered: Lowered, lifted: Lifted, region: Region, without: fx.Node | None
) -> set[fx.Node]:
    """Graph outputs that gradients connect to a region, on paths that avoid ``without``."""
    output = lowered.graph.graph.output_node()
    returned = set(output.all_input_nodes)
    tail = set(lifted.tail)
    found = {
        node
        for node, value in lifted.values.items()
        if node in returned and value.needs_grad and belongs(value, region)
    }
    stack = [node for _, node in _entries(lifted, region)]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen or node is without or node not in lowered.needs_grad:
            continue
        seen.add(node)
        if node in returned:
            found.add(node)
        stack.extend(user for user in node.users if user in tail and user not in lifted.splits)
    return found


def _common_scalars(lowered: Lowered, lifted: Lifted, region: Region) -> list[fx.Node]:
    """The real scalars through which every gradient path of the region passes, in order."""
    found = []
    for node in lifted.tail:
        val = node.meta.get("val")
        if (
            isinstance(val, torch.Tensor)
            and val.is_floating_point()
            and node in lowered.needs_grad
            and statically_known_true(val.numel() == 1)
            and not _reached(lowered, lifted, region, without=node)
        ):
            found.append(node)
    return found


def _between(lifted: Lifted, region: Region, loss: fx.Node) -> list[fx.Node]:
    """Tail nodes from the region's outputs to the loss, in order."""
    depends: set[fx.Node] = set()
    for node in lifted.tail:
        split = lifted.splits.get(node)
        if split is not None:
            own = belongs(split.inner, region)
        else:
            own = any(
                a in depends or (a in lifted.values and belongs(lifted.values[a], region))
                for a in node.all_input_nodes
            )
        if own:
            depends.add(node)
    needed = {loss}
    for node in reversed(lifted.tail):
        if node in needed:
            needed.update(a for a in node.all_input_nodes if a in depends)
    return [node for node in lifted.tail if node in needed and node in depends]


def _trace_vjp(
    lifted: Lifted, region: Region, loss: fx.Node, nodes: Sequence[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    inner = set(nodes)
    inputs: dict[fx.Node, None] = {}
    for node in nodes:
        split_arg = node.args[0] if node in lifted.splits else None
        for arg in node.all_input_nodes:
            own = arg in lifted.values and belongs(lifted.values[arg], region)
            if arg not in inner and arg is not split_arg and not own:
                inputs[arg] = None
    stored = [_stored_fake(value) for value in region.outputs]
    grad_outputs = region.grad_outputs
    # Symbolic sizes in the trace are arguments, so that the tracer knows them.
    sizes: dict[str, Any] = {}
    seen = [*region.outputs, *(v for v in lifted.values.values() if belongs(v, region))]
    for value in seen:
        for size in (*value.row_shape, *value.computed_row_shape, value.rows, *value.features):
            if isinstance(size, torch.SymInt):
                sizes[str(size)] = size

    def vjp(*args: Any) -> list[torch.Tensor]:
        outputs, given = args[: len(stored)], args[len(stored) :][: len(inputs)]
        sized = dict(zip(sizes, args[len(stored) + len(inputs) :], strict=True))
        env: dict[fx.Node, Any] = dict(zip(inputs, given, strict=True))
        with torch.enable_grad():
            leaves = [y.detach().requires_grad_(i in grad_outputs) for i, y in enumerate(outputs)]

            def read(value: RowValue) -> torch.Tensor:
                index = output_index(value, region)
                assert index is not None
                out = _to_logical(leaves[index], value, sized)
                return out if value.needs_grad else out.detach()

            for node in nodes:
                split = lifted.splits.get(node)
                if split is not None and split.outer is not None:
                    env[node] = split.outer(_call, read(split.inner))
                    continue
                if split is not None:
                    args_ = (read(split.inner), *map_args(node.args[1:], env))
                    kwargs = {**map_args(node.kwargs, env), **split.kwargs}
                else:
                    for arg in node.all_input_nodes:
                        if arg not in env:
                            env[arg] = read(lifted.values[arg])
                    args_, kwargs = map_args(node.args, env), map_args(node.kwargs, env)
                env[node] = applied(node)(*args_, **kwargs)
            wanted = [leaves[i] for i in grad_outputs]
            end = env[loss]
            one = torch.ones([1] * end.dim(), dtype=end.dtype, device=end.device)
            found = torch.autograd.grad(end, wanted, grad_outputs=one, allow_unused=True)
        return [
            torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if g is None else g
            for g, leaf in zip(found, wanted, strict=True)
        ]

    fakes = [*stored, *(node.meta["val"] for node in inputs), *sizes.values()]
    fake_mode = next(f.fake_mode for f in fakes if isinstance(f, FakeTensor))
    with fake_mode, enable_python_dispatcher(), torch._C._DisableAutocast():
        graph = make_fx(vjp, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, list(inputs)


def applied(node: fx.Node) -> Any:
    """The op that a tail node applies: a region's outputs may have other strides than eager's."""
    return aten.reshape.default if node.target in _VIEWS else node.target


def _call(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def map_args(args: Any, env: dict[fx.Node, Any]) -> Any:
    """Arguments with nodes replaced by their values."""
    return fx.map_arg(args, env.__getitem__)


def _to_logical(stored: torch.Tensor, value: RowValue, sizes: dict[str, Any]) -> torch.Tensor:
    """``[rows, *features]`` → the user's shape; symbolic sizes are looked up by their text."""
    features = [sizes.get(str(s), s) for s in value.features]
    current = value.computed_row_shape
    out = stored.view([*(sizes.get(str(s), s) for s in current), *features])
    for step in value.selected:
        if current != step.in_shape:
            out = out.reshape([*(sizes.get(str(s), s) for s in step.in_shape), *features])
        out = step.target(out, *step.args)
        current = step.out_shape
    if current != value.row_shape:
        out = out.reshape([*(sizes.get(str(s), s) for s in value.row_shape), *features])
    order = logical_order(value.is_row)
    return out if order == sorted(order) else out.permute(order)


def logical_order(is_row: Sequence[bool]) -> list[int]:
    """The permutation that takes ``[*rows, *features]`` to the user's order of dimensions."""
    n_rows = sum(is_row)
    return [
        sum(is_row[:d]) if row else n_rows + d - sum(is_row[:d]) for d, row in enumerate(is_row)
    ]


def _stored_fake(value: RowValue) -> torch.Tensor:
    fake = stored_val(value)
    return fake.detach()


def stored_val(value: RowValue) -> torch.Tensor:
    """A fake of a region's output as the body returns it."""
    return value.val.new_empty([value.rows, *value.features])
