"""Lower: the candidates' cones, from Dynamo's torch-level calls to functional ATen.

The cone of a set of heads is every node that has to run after one of them: because it takes a
value that depends on it, or through memory (``memory.py``). It is run once under ``make_fx``
with the fake tensors Dynamo recorded, forward only. Loss functions that hide a reduction over
rows inside (``nll_loss_forward`` and its like) have it split off (``decompositions``), so that the
boundary falls where the rows are really mixed.

What must survive the lowering although autograd is off while it runs:
    autocast    the graph's own enter/exit calls are replayed; ambient autocast is simply on.
                Both leave ``_to_copy`` nodes.
    no_grad     values computed while gradients are switched off get a ``detach`` node (where some
                are computed while they are on; else nothing in the graph has a gradient).
    in-place    functionalised; what cannot be is a refusal. Tensors that are written to and made
                outside of the cone are inputs; their last values are :attr:`Lowered.writes`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from autochunk.decompositions import DECOMPOSITIONS, FUNCTIONS, REPLACED
from autochunk.find import (
    fake,
    is_derivative,
    is_differentiable,
    is_grad_function,
    op_name,
    refuse_subclass,
    source_line,
)
from autochunk.kernel_writes import views_argument, writing_nodes
from autochunk.memory import Conflict, Memory, storages, written_arguments
from autochunk.modes import ENTER_AUTOCAST, EXIT_AUTOCAST, recording_of
from autochunk.rules import rule_for
from autochunk.sink import producers
from autochunk.types import Candidate, Lowered, Refusal
from autochunk.writes import Inside, conflict_behind, describe, inside_of, refuse_writes

aten = torch.ops.aten

_HEAD = "autochunk_head"

#: Calls of a Dynamo graph that are lowered as others; ``z.data`` leaves no ATen op.
_CALLS = {**FUNCTIONS, getattr(torch._C._autograd, "_get_data_attr", None): torch.detach}


#: Cut into slices.
_CUTS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.chunk.default,
)


def refuse_to_lower(graph: fx.Graph, memory: Memory, candidate: Candidate) -> Refusal | None:
    """A construct in a candidate's cone that must not be lowered, as a refusal."""
    cone = memory.dependents(graph, [candidate.node])
    transform = _transform_around(graph, set(cone))
    if transform is not None:
        return Refusal(
            "higher-order", "torch.func", f"inside {op_name(transform)}", source_line(transform)
        )
    for node in cone:
        refusal = _refuse_call(node)
        if refusal is not None:
            conflict = conflict_behind(cone, node)
            return refusal if conflict is None else _cannot_follow(memory, conflict, node)
    return refuse_writes(graph, memory, cone)


def _refuse_call(node: fx.Node) -> Refusal | None:
    target = node.target
    subclass = refuse_subclass(node)
    if subclass is not None:
        return subclass
    if isinstance(target, torch._ops.HigherOrderOperator):
        custom = "autograd_function" in str(target)
        code = "custom-function" if custom else "higher-order"
        return Refusal(code, str(target), f"{target} in its cone", source_line(node))
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and (
        str(target).split(".")[0] not in ("aten", "prims")
    ):
        detail = f"{target} is a custom operator"
        return Refusal("custom-function", str(target), detail, source_line(node))
    if is_derivative(node):
        detail = "the graph differentiates what the logits lead to"
        return Refusal("unsupported-graph", op_name(node), detail, source_line(node))
    if node.op == "call_module" or (node.op == "call_function" and is_grad_function(target)):
        return Refusal("custom-function", op_name(node), f"{target}", source_line(node))
    return None


def _cannot_follow(memory: Memory, conflict: Conflict, node: fx.Node) -> Refusal:
    """A call that cannot be lowered depends on the head through memory alone."""
    detail = f"{describe(memory, conflict)}, and {op_name(node)} cannot move along with them"
    return Refusal("mutation", op_name(conflict.writer), detail, source_line(conflict.writer))


def _transform_around(graph: fx.Graph, cone: set[fx.Node]) -> fx.Node | None:
    """The call that begins a ``torch.func`` transform (grad, vmap, jvp) with ``cone`` inside."""
    begun: list[fx.Node] = []
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name.endswith("_increment_nesting"):
            begun.append(node)
        elif name.endswith("_decrement_nesting"):
            begun.pop()
        elif begun and node in cone:
            return begun[-1]
    return None


def lower(graph: fx.Graph, memory: Memory, candidates: Sequence[Candidate]) -> Lowered:
    """Lowers the union of the candidates' cones, and what computes wide values for them alone.

    Args:
        graph: The Dynamo graph; it is not modified.
        memory: Of the graph.
        candidates: Heads for which :func:`refuse_to_lower` is None.

    Raises:
        Exception: whatever tracing raises; the backend turns it into a fallback.
    """
    cone = memory.dependents(graph, [c.node for c in candidates])
    moved = producers(graph, memory, cone, candidates)
    lowered = _lower(graph, memory, candidates, frozenset(cone), moved)
    if moved and any(_is_random(node) for node in lowered.graph.graph.nodes):
        # Random numbers are drawn in order.
        return _lower(graph, memory, candidates, frozenset(cone), frozenset())
    return lowered


def _is_random(node: fx.Node) -> bool:
    target = node.target
    is_op = isinstance(target, torch._ops.OpOverload)
    return is_op and torch.Tag.nondeterministic_seeded in target.tags


def _lower(
    graph: fx.Graph,
    memory: Memory,
    candidates: Sequence[Candidate],
    cone: frozenset[fx.Node],
    moved: frozenset[fx.Node],
) -> Lowered:
    heads = {c.node: c for c in candidates}
    inside = inside_of(graph, memory, cone, moved, _repeated(graph, memory) - cone)
    run_here, inputs, outputs = inside.nodes, inside.inputs, inside.outputs
    recording = recording_of(graph)
    is_recorded = any(recording[node] for node in run_here)

    def run(*values: Any) -> list[Any]:
        env: dict[fx.Node, Any] = dict(zip(inputs, values, strict=True))
        contexts: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.target is ENTER_AUTOCAST:
                contexts[node] = ENTER_AUTOCAST(*node.args)
            elif node.target is EXIT_AUTOCAST:
                EXIT_AUTOCAST(contexts.pop(node.args[0]))
            elif node in inside.same:
                env[node] = env[inside.same[node]]
            elif node in run_here:
                with _source_of(node, heads):
                    env[node] = _call(node, env, heads, recording[node] or not is_recorded)
        return [env[node] for node in outputs]

    # Functionalisation copies what was written back into its inputs: not into Dynamo's own fakes.
    fakes = [
        value.detach() if isinstance(value, torch.Tensor) else value for value in map(fake, inputs)
    ]
    with contextlib.ExitStack() as stack:
        for value in fakes:
            if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
                stack.enter_context(value.fake_mode)
                break
        stack.enter_context(torch.no_grad())
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(fx_traceback.preserve_node_meta())
        lowered = make_fx(
            torch.func.functionalize(run),
            decomposition_table=dict(DECOMPOSITIONS),
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*fakes)
    _differentiable(lowered)
    _remove_fresh_mutations(lowered)
    writes = _take_writes(lowered, inside)
    _copies_to_values(lowered)
    _cast_before_transpose(lowered)
    _split_to_slices(lowered)
    _sized_constants(lowered)
    _numbers_to_tensors(lowered)
    lowered.graph.eliminate_dead_code()
    lowered.recompile()
    return Lowered(
        graph=lowered,
        inputs=inputs,
        outputs=outputs,
        writes=writes,
        heads=_head_nodes(lowered.graph, heads),
        needs_grad=needs_grad(
            lowered.graph, [is_recorded and node in inside.needing for node in inputs]
        ),
        cone=cone,
        inside=run_here,
    )


#: What an op is where its arguments have no gradient, and what it is where they have.
_WITHOUT_DERIVATIVE = {
    aten._embedding_bag_forward_only.default: aten._embedding_bag.default,
}


def _differentiable(gm: fx.GraphModule) -> None:
    """Puts ops that have a derivative in place of those that were chosen while autograd was off."""
    for node in gm.graph.nodes:
        node.target = _WITHOUT_DERIVATIVE.get(node.target, node.target)


def _take_writes(gm: fx.GraphModule, inside: Inside) -> tuple[fx.Node, ...]:
    """Makes outputs of what functionalisation writes back into inputs, where that can be seen.

    Returns:
        The Dynamo nodes that are written to; the last outputs of the graph are their values.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    sources = dict(zip(placeholders, inside.inputs, strict=True))
    output = gm.graph.output_node()
    writes, values = [], []
    for node in list(gm.graph.nodes):
        if node.target is aten.copy_.default and node.args[0] in sources:
            written, value = node.args[0], node.args[1]
            node.replace_all_uses_with(value)
            gm.graph.erase_node(node)
            if sources[written].op in ("placeholder", "get_attr"):
                writes.append(sources[written])
                values.append(value)
    output.args = ((*output.args[0], *values),)
    return tuple(writes)


def _repeated(graph: fx.Graph, memory: Memory) -> set[fx.Node]:
    """``arange`` calls and their views, and shapes: computed inside the cone again.

    There ``logp[arange(N), labels]`` can be seen to be a gather; and a shape, a tuple of symbolic
    numbers, could not be one input of the lowered graph.
    """
    repeated: set[fx.Node] = set()
    views = {"getitem", "unsqueeze", "view", "reshape"}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        value = fake(node)
        if isinstance(value, torch.Tensor):
            tensors = [a for a in node.all_input_nodes if isinstance(fake(a), torch.Tensor)]
            is_range = node.target is torch.arange and not tensors
            is_range = is_range and memory.written.isdisjoint(storages(value))
            is_view = op_name(node) in views and tensors and all(t in repeated for t in tensors)
            if is_range or is_view:
                repeated.add(node)
        elif isinstance(value, tuple) and not any(isinstance(v, torch.Tensor) for v in value):
            repeated.add(node)
    return repeated


def uses_autocast(graph: fx.Graph) -> bool:
    """Whether autocast is on around the graph, or anywhere inside it."""
    ambient = torch._C._is_any_autocast_enabled()
    return ambient or any(node.target is ENTER_AUTOCAST for node in graph.nodes)


def remaining_write(lowered: Lowered) -> Refusal | None:
    """A call of the lowered graph that still writes to one of its arguments, as a refusal."""
    for node in writing_nodes(lowered.graph.graph):
        detail = f"{op_name(node)} writes to a tensor and has no functional form"
        return Refusal("mutation", op_name(node), detail, source_line(node))
    return None


def _call(
    node: fx.Node,
    env: dict[fx.Node, Any],
    heads: dict[fx.Node, Candidate],
    grad_enabled: bool,
) -> Any:
    """The value of a node; one that is computed with gradients switched off is detached.

    An in-place call returns what it writes to, which keeps the gradients that it had.
    """
    if node in heads:
        made = _call_head(heads[node], env)
        return made if grad_enabled else made.detach()
    written = written_arguments(node)

    def value_of(arg: fx.Node) -> Any:
        value = env[arg]
        read = written and arg not in written and isinstance(value, torch.Tensor)
        return value.detach() if read and not grad_enabled else value

    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    if node.op == "call_function":
        value = _CALLS.get(node.target, node.target)(*args, **kwargs)
    elif node.op == "call_method":
        value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        raise NotImplementedError(f"cannot lower a {node.op} node: {node.format_node()}")
    if grad_enabled or written:
        return value
    return _without_history(node, value, env)


def _without_history(node: fx.Node, value: Any, env: dict[fx.Node, Any]) -> Any:
    """The results of a call with gradients switched off: detached, but what it returns as it is.

    ``z.type_as(z)`` is ``z`` itself, with its gradients, whatever the mode. Dynamo's fakes tell:
    functionalisation makes another object of some of those.
    """
    given = {}
    for arg in node.all_input_nodes:
        fakes, values = (
            [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, torch.Tensor)]
            for made in (fake(arg), env[arg])
        )
        given.update({id(a): b for a, b in zip(fakes, values, strict=True)})
    made, form = pytree.tree_flatten(value)
    recorded = pytree.tree_leaves(fake(node))
    for i, leaf in enumerate(made):
        if isinstance(leaf, torch.Tensor):
            same = given.get(id(recorded[i])) if len(recorded) == len(made) else None
            made[i] = leaf.detach() if same is None else same
    return pytree.tree_unflatten(made, form)


def _call_head(candidate: Candidate, env: dict[fx.Node, Any]) -> torch.Tensor:
    """The head as one matrix product over flattened rows, whatever it was written as."""
    x, weight = env[candidate.x], env[candidate.weight]
    bias = None if candidate.bias is None else env[candidate.bias]
    layout = candidate.weight_layout
    is_conv, hidden_last = layout == "conv", layout in ("VH", "KVH", "conv")
    x = x.movedim(1, -1) if is_conv else x
    rows = x.reshape(-1, x.shape[-1])
    features = weight.shape[:1] if is_conv else weight.shape[:-1]
    if not hidden_last:
        features = weight.shape[1:]
    if weight.dim() > 2:
        weight = weight.flatten(0, -2) if layout == "KVH" else weight.flatten(1)
    if hidden_last:
        out = F.linear(rows, weight, bias)
    elif bias is None:
        out = torch.mm(rows, weight)
    else:
        out = torch.addmm(bias, rows, weight)
    out = out.view(*x.shape[:-1], *features)
    if not is_conv:
        return out
    out = out.movedim(-1, 1)
    return out.contiguous() if fake(candidate.node).is_contiguous() else out


@contextlib.contextmanager
def _source_of(node: fx.Node, heads: dict[fx.Node, Candidate]) -> Iterator[None]:
    """Gives the ATen nodes made inside the stack trace of ``node``, and marks heads."""
    marked = fx.Node(node.graph, node.name, "call_function", aten.detach.default, (), {})
    marked.meta = {"stack_trace": node.meta.get("stack_trace", "")}
    if node in heads:
        marked.meta["custom"] = {_HEAD: node.name}
    with fx_traceback.set_current_meta(marked):
        yield


def _head_nodes(graph: fx.Graph, heads: dict[fx.Node, Candidate]) -> dict[fx.Node, Candidate]:
    by_name = {node.name: candidate for node, candidate in heads.items()}
    found = {}
    for node in graph.nodes:
        name = (node.meta.get("custom") or {}).get(_HEAD)
        if name in by_name and node.target in (aten.mm.default, aten.addmm.default):
            found[node] = by_name[name]
    return found


def needs_grad(graph: fx.Graph, inputs_need: Sequence[bool]) -> frozenset[fx.Node]:
    """The nodes through which a gradient flows, given the placeholders that have one."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    needs = {node for node, need in zip(placeholders, inputs_need, strict=True) if need}
    for node in graph.nodes:
        if node.op != "call_function" or node.target is aten.detach.default:
            continue
        if is_differentiable(node.meta.get("val")) and not needs.isdisjoint(node.all_input_nodes):
            needs.add(node)
    return frozenset(needs)


def _copies_to_values(gm: fx.GraphModule) -> None:
    """``copy(a, b)``, which functionalisation leaves of ``a.copy_(b)`` → ``b`` as ``a`` is.

    Autograd has no derivative of it.
    """
    for node in list(gm.graph.nodes):
        if node.target is not aten.copy.default:
            continue
        source, val = node.args[1], node.meta["val"]
        with gm.graph.inserting_before(node):
            if (source.meta["val"].dtype, source.meta["val"].device) != (val.dtype, val.device):
                kwargs = {"dtype": val.dtype, "device": val.device}
                cast = gm.graph.call_function(aten._to_copy.default, (source,), kwargs)
                cast.meta = {**node.meta, "val": source.meta["val"].to(**kwargs)}
                source = cast
            if [*map(str, source.meta["val"].shape)] != [*map(str, val.shape)]:
                sizes = [_size_of(gm.graph, node.args[0], d) for d in range(val.dim())]
                wide = gm.graph.call_function(aten.expand.default, (source, sizes))
                wide.meta = {**node.meta, "val": source.meta["val"].expand(val.shape)}
                source = wide
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)


def _size_of(graph: fx.Graph, node: fx.Node, dim: int) -> Any:
    """A size of a node as a number, or as the node that computes it."""
    size = node.meta["val"].shape[dim]
    if not isinstance(size, torch.SymInt):
        return size
    made = graph.call_function(aten.sym_size.int, (node, dim))
    made.meta = {"val": size}
    return made


def _cast_before_transpose(gm: fx.GraphModule) -> None:
    """``W.t().to(bf16)`` → ``W.to(bf16).t()``: the gradient then has the weight's own layout."""
    for node in list(gm.graph.nodes):
        if node.target is not aten._to_copy.default:
            continue
        (transposed,) = node.all_input_nodes
        if transposed.target is not aten.t.default:
            continue
        with gm.graph.inserting_before(node):
            cast = gm.graph.call_function(node.target, transposed.args, node.kwargs)
            cast.meta = {**node.meta, "val": node.meta["val"].t()}
            back = gm.graph.call_function(aten.t.default, (cast,))
            back.meta = dict(node.meta)
        node.replace_all_uses_with(back)
        gm.graph.erase_node(node)


def _split_to_slices(gm: fx.GraphModule) -> None:
    """``split``, ``unbind`` → one ``slice`` or ``select`` per piece: pieces are row ops then."""
    for node in list(gm.graph.nodes):
        target = node.target
        if target not in _CUTS:
            continue
        x = node.args[0]
        dim = node.args[-1] if len(node.args) > (1 if target is aten.unbind.int else 2) else 0
        start: Any = 0
        pieces = list(node.meta["val"])
        sizes = [1 if target is aten.unbind.int else piece.shape[dim] for piece in pieces]
        if not all(isinstance(size, int) for size in sizes[:-1]):
            continue
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        ends = [*starts[1:], sys.maxsize]  # the size of the last one may be symbolic
        for user in list(node.users):
            start, end = starts[user.args[1]], ends[user.args[1]]
            with gm.graph.inserting_before(user):
                if target is aten.unbind.int:
                    piece = gm.graph.call_function(aten.select.int, (x, dim, start))
                else:
                    piece = gm.graph.call_function(aten.slice.Tensor, (x, dim, start, end))
                piece.meta = dict(user.meta)
            user.replace_all_uses_with(piece)
            gm.graph.erase_node(user)


_SIZED = {
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_empty.default: 0,
}
_CONSTANTS = {aten.zeros.default: 0, aten.ones.default: 1}


def _sized_constants(gm: fx.GraphModule) -> None:
    """``x.new_zeros(size)``, ``zeros(size)`` → ``full(size, 0)``.

    The number that is assigned in ``x[..., 0] = 3`` is a tensor kept in the module: a ``full`` too.
    """
    for node in list(gm.graph.nodes):
        if node.target is aten.lift_fresh_copy.default and node.args[0].op == "get_attr":
            tensor = getattr(gm, node.args[0].target)
            if tensor.dim() != 0:
                continue
            size, fill = [], tensor.item()
        elif node.target in _SIZED:
            size, fill = node.args[1], _SIZED[node.target]
        elif node.target in _CONSTANTS:
            size, fill = node.args[0], _CONSTANTS[node.target]
        elif node.target is aten.new_full.default:
            size, fill = node.args[1], node.args[2]
        elif node.target is aten.zero.default and _has_numbers(node.meta["val"].shape):
            size, fill = list(node.meta["val"].shape), 0
        else:
            continue
        val = node.meta["val"]
        with gm.graph.inserting_before(node):
            constant = gm.graph.call_function(
                aten.full.default, (size, fill), {"dtype": val.dtype, "device": val.device}
            )
            constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        gm.graph.erase_node(node)


def _has_numbers(shape: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in shape)


_WITH_TENSOR = {
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.gt.Scalar: aten.gt.Tensor,
    aten.ge.Scalar: aten.ge.Tensor,
    aten.lt.Scalar: aten.lt.Tensor,
    aten.le.Scalar: aten.le.Tensor,
}


def _numbers_to_tensors(gm: fx.GraphModule) -> None:
    """``logits / s`` of a symbolic number → of a tensor without dimensions, an input like others.

    A Python float that changes from call to call (a schedule's temperature) arrives as such a
    number. The tensor is made by a product: the only way from a float to a tensor at which
    AOTAutograd does not specialise the graph to the float's present value.
    """
    for node in list(gm.graph.nodes):
        target = _WITH_TENSOR.get(node.target, node.target)
        if not isinstance(target, torch._ops.OpOverload):
            continue
        out = node.meta.get("val")
        for i, (arg, spec) in enumerate(zip(node.args, target._schema.arguments, strict=False)):
            number = arg.meta.get("val") if isinstance(arg, fx.Node) else None
            if str(spec.type) != "Tensor" or not isinstance(number, torch.SymFloat | torch.SymInt):
                continue
            others = [a.meta["val"] for a in node.all_input_nodes if a is not arg]
            dtype = _dtype_of_number(number, [o for o in others if isinstance(o, torch.Tensor)])
            kwargs = {"dtype": dtype, "device": out.device}
            meta = {**node.meta, "val": out.new_empty((), dtype=dtype)}
            with gm.graph.inserting_before(node):
                if isinstance(number, torch.SymInt):
                    made = gm.graph.call_function(aten.scalar_tensor.default, (arg,), kwargs)
                else:
                    one = gm.graph.call_function(aten.full.default, ([], 1.0), kwargs)
                    one.meta = dict(meta)
                    made = gm.graph.call_function(aten.mul.Tensor, (one, arg))
            made.meta = meta
            node.update_arg(i, made)
            node.target = target


def _dtype_of_number(
    number: torch.SymFloat | torch.SymInt, others: Sequence[torch.Tensor]
) -> torch.dtype:
    """The dtype with which a tensor takes part in type promotion as the number does.

    Where another operand has dimensions, any dtype of the number's kind does; where none has, a
    tensor would count and a number would not.
    """
    kind = torch.float64 if isinstance(number, torch.SymFloat) else torch.int64
    if not others or any(o.dim() for o in others):
        return kind
    like = others[0].dtype
    for other in others[1:]:
        like = torch.promote_types(like, other.dtype)
    if like.is_floating_point or (kind == torch.int64 and like != torch.bool):
        return like
    return torch.get_default_dtype() if kind == torch.float64 else kind


def _remove_fresh_mutations(gm: fx.GraphModule) -> None:
    """Rewrites ``x.op_(…)`` to ``x = x.op(…)`` where ``x`` is a temporary nobody aliases.

    Composite ops (cross entropy with label smoothing) use such calls inside, beneath
    functionalisation. ``remaining_write`` finds those that had to stay.
    """
    for node in list(gm.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        functional = _functional_twin(node.target)
        if functional is None:
            continue
        written = node.args[0]
        if not isinstance(written, fx.Node) or _is_aliased(written):
            continue
        with gm.graph.inserting_before(node):
            twin = gm.graph.call_function(functional, node.args, node.kwargs)
            twin.meta = dict(node.meta)
        order = {n: i for i, n in enumerate(gm.graph.nodes)}
        for user in list(written.users):
            if user is not twin and order[user] > order[node]:
                user.replace_input_with(written, twin)
        node.replace_all_uses_with(twin)
        gm.graph.erase_node(node)


def _functional_twin(target: torch._ops.OpOverload) -> Any:
    """``aten.div_.Tensor`` → ``aten.div.Tensor``; None for ops that do not mutate."""
    schema_name = target._schema.name.split("::")[1]
    if not target._schema.is_mutable or not schema_name.endswith("_"):
        return None
    packet = getattr(aten, schema_name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _is_aliased(node: fx.Node) -> bool:
    """Whether a node's memory can be seen through another node: it is a view, or has views."""
    if node.op != "call_function" or views_argument(node.target):
        return True
    return any(views_argument(user.target) for user in node.users)


def is_liftable(op: Any) -> bool:
    """Whether an ATen op on logits has a rule, or is lowered to ops that have."""
    named = (DECOMPOSITIONS, REPLACED, _CUTS, _SIZED, (aten.new_full.default,))
    return any(op in table for table in named) or rule_for(op) is not None
