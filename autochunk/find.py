"""Find: which linears of a Dynamo graph amplify, and may end in a reduction?

A *candidate* is a linear with at least ``AMPLIFY`` times as many output as input features. The
walk here is cheap (shapes only) and rejects what a glance can reject: small outputs, and wide
outputs that enter another layer. Of the linears that follow on each other the last is the head: an
MLP's inner layer may be wider than the vocabulary. Everything subtler is for ``lift`` to decide.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autochunk.deferred import DeferredTensor
from autochunk.types import NARROW, Candidate, Refusal

#: Output features per input feature from which on a linear counts as amplifying.
AMPLIFY = 4

_aten = torch.ops.aten
_MATMUL = {torch.matmul, operator.matmul, torch.mm, "matmul", "mm", "__matmul__", _aten.mm.default}
_ADDMM = {torch.addmm, "addmm", _aten.addmm.default}
#: Ops besides linears that make a network of what enters them.
LAYERS = {F.scaled_dot_product_attention, torch.bmm, F.conv1d, F.conv2d, "bmm"}
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
_INPLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imatmul", "setitem"}

#: Calls of a Dynamo graph that may draw random numbers.
_RANDOM = """
    alpha_dropout bernoulli dropout dropout1d dropout2d dropout3d feature_alpha_dropout
    feature_dropout gumbel_softmax multinomial normal poisson rand rand_like randint randint_like
    randn randn_like randperm rrelu scaled_dot_product_attention
""".split()  # noqa: SIM905


def find(
    gm: fx.GraphModule, min_bytes: int, amplify: float = AMPLIFY
) -> tuple[tuple[Candidate, ...], tuple[tuple[Candidate, Refusal], ...]]:
    """Candidates of a Dynamo graph.

    Args:
        gm: Nodes carry ``meta["example_value"]``, as Dynamo leaves them.
        min_bytes: Outputs below this are refused as ``small``.
        amplify: Least ratio of output to input features. Below a ratio of one a linear counts only
            if it is not computed from another one that does.

    Returns:
        The candidates worth analysing, and those refused at a glance with the reason. Linears
        that do not amplify are in neither. Heads inside the body of a higher-order op (a
        checkpointed block) are among the refused.
    """
    kept: list[Candidate] = []
    refused: list[tuple[Candidate, Refusal]] = []
    last: set[fx.Node] = set()  # linears that feed no other layer, or none that leads to a head
    found = [
        (candidate, owner)
        for node, owner in _with_bodies(gm, owner=None)
        if (candidate := as_candidate(node)) is not None and _ratio(candidate) >= amplify
    ]
    nodes = [candidate.node for candidate, _ in found]
    for i, (candidate, owner) in reversed(list(enumerate(found))):
        node = candidate.node
        if _ratio(candidate) < 1 and any(_leads_to(other, {node}) for other in nodes[:i]):
            continue
        layer = layer_fed_by(node, last)
        if layer is None and _ratio(candidate) >= AMPLIFY:
            last.add(node)
        refusal = _refuse_at_a_glance(candidate, min_bytes, layer)
        if refusal is None and owner is not None:
            detail = f"the head is inside {op_name(owner)}"
            refusal = Refusal("higher-order", op_name(owner), detail, candidate.source)
        if refusal is None:
            kept.append(candidate)
        else:
            refused.append((candidate, refusal))
    return tuple(reversed(kept)), tuple(reversed(refused))


def _ratio(candidate: Candidate) -> float:
    return candidate.out_features / max(candidate.in_features, 1)


def _with_bodies(
    gm: fx.GraphModule, owner: fx.Node | None
) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """The nodes of a graph and of the bodies of its higher-order ops, with the op they are in."""
    for node in gm.graph.nodes:
        yield node, owner
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            for arg in node.all_input_nodes:
                body = getattr(gm, str(arg.target), None) if arg.op == "get_attr" else None
                if isinstance(body, fx.GraphModule):
                    yield from _with_bodies(body, owner or node)


def as_candidate(node: fx.Node) -> Candidate | None:
    """The candidate that ``node`` is, if it is an amplifying linear."""
    parsed = parse_linear(node)
    if parsed is None:
        return None
    x, weight, bias, layout = parsed
    x_val, w_val, out = fake(x), fake(weight), fake(node)
    if not (
        isinstance(x_val, torch.Tensor)
        and isinstance(w_val, torch.Tensor)
        and isinstance(out, torch.Tensor)
    ):
        return None
    if x_val.dim() < 2 or out.dim() < 2 or not out.is_floating_point():
        return None
    if layout in ("VH", "HV") and w_val.dim() != 2:
        return None
    in_features = x_val.shape[features_dim(layout)]
    rows = x_val.numel() // in_features if hint(in_features) else 0
    out_features = hint(out.numel()) // max(hint(rows), 1)
    if layout in ("VH", "HV"):  # also of no rows
        rows, out_features = out.numel() // out.shape[-1], hint(out.shape[-1])
    return Candidate(
        node=node,
        x=x,
        weight=weight,
        bias=bias,
        weight_layout=layout,
        rows=rows,
        in_features=hint(in_features),
        out_features=out_features,
        logits_bytes=hint(out.numel()) * out.element_size(),
        source=source_line(node),
    )


def features_dim(layout: str) -> int:
    """The dimension of the hidden states that a product contracts."""
    return 1 if layout == "conv" else -1


def fake(node: fx.Node) -> Any:
    """The fake value Dynamo recorded for a node, or None."""
    return node.meta.get("example_value")


def tensors_of(value: Any) -> list[torch.Tensor]:
    """A value itself, or the tensors in it if it is several."""
    found = value if isinstance(value, (tuple, list)) else (value,)
    return [t for t in found if isinstance(t, torch.Tensor)]


def wrapper_class(value: Any) -> str | None:
    """The class of a tensor whose ops are redefined (quantised, nested, distributed), if it is one.

    What the ops of such a tensor compute only its class knows. Deferred logits are not meant.
    """
    for tensor in tensors_of(value):
        if is_traceable_wrapper_subclass(tensor) and type(tensor) is not DeferredTensor:
            return f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    return None


def refuse_subclass(node: fx.Node, source: str = "") -> Refusal | None:
    """A call whose result or an operand is a tensor subclass."""
    for value in (*node.all_input_nodes, node):
        name = wrapper_class(fake(value))
        if name is not None:
            detail = f"{value.name} is a {name}"
            return Refusal("tensor-subclass", op_name(node), detail, source or source_line(node))
    return None


def is_differentiable(value: Any) -> bool:
    """Whether a value, or one of several, is of a dtype that has gradients: real or complex."""
    if isinstance(value, (tuple, list)):
        return any(is_differentiable(v) for v in value)
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def hint(size: int | torch.SymInt) -> int:
    """A size as a number: a symbolic one by the value it was first seen with.

    Symbols without a hint (unbacked: they depend on data) count as 4096.
    """
    if isinstance(size, torch.SymInt):
        if size.node.is_nested_int():
            return 1  # the length of a nested tensor's rows, which is no number
        if size.node.hint is not None:
            return int(size.node.hint)
        expr = size.node.expr
        unbacked = {s: sympy.Integer(4096) for s in expr.free_symbols if str(s).startswith("u")}
        expr = expr.xreplace(unbacked)
        return int(expr if expr.is_number else size.node.shape_env.size_hint(expr))
    return int(size)


def source_line(node: fx.Node) -> str:
    """``file:line: code`` of the innermost frame that is the user's, from the node's trace.

    Frames inside torch are skipped; where there is nothing else the last frame is taken.
    """
    trace = node.meta.get("stack_trace") or ""
    frames = []
    for line in trace.splitlines():
        stripped = line.strip()
        if stripped.startswith('File "') and '", line ' in stripped:
            path, _, rest = stripped[len('File "') :].partition('", line ')
            number = rest.split(",", 1)[0]
            frames.append([path, number, ""])
        elif frames and stripped and not set(stripped) <= {"^", "~"} and not frames[-1][2]:
            frames[-1][2] = stripped
    if not frames:
        return ""
    own = [f for f in frames if "/torch/" not in f[0]] or frames
    path, number, code = own[-1]
    return f"{path}:{number}" + (f": {code}" if code else "")


def op_name(node: fx.Node) -> str:
    """The op of a node as a user would write it."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__.lstrip("_")
    if isinstance(target, str):
        return target
    return getattr(target, "__name__", str(target))


def is_inplace(node: fx.Node) -> bool:
    """Whether a call of a Dynamo graph writes to a tensor."""
    name = op_name(node)
    if node.kwargs.get("out") is not None:
        return True
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    aten_op = name.endswith("_") and "aten" in str(node.target)
    return node.op == "call_function" and (name in _INPLACE_OPERATORS or aten_op)


def is_random(node: fx.Node) -> bool:
    """Whether a call of a Dynamo graph may draw random numbers: a second one would draw others."""
    return node.op in ("call_function", "call_method") and op_name(node) in _RANDOM


def is_grad_function(target: Any) -> bool:
    """Whether a call's target is a custom autograd Function's ``apply``."""
    owner = getattr(target, "__self__", None)
    return isinstance(owner, type) and issubclass(owner, torch.autograd.Function)


def is_derivative(node: fx.Node) -> bool:
    """Whether a call of a Dynamo graph differentiates what the graph computes."""
    return node.target in (torch.autograd.grad, torch.autograd.backward) or (
        node.op == "call_method" and node.target == "backward"
    )


def parse_linear(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, str] | None:
    """(x, weight, bias, weight layout) of a linear-like node."""
    if node.op not in ("call_function", "call_method"):
        return None
    args, kwargs, target = node.args, node.kwargs, node.target
    if target is F.linear or target is torch._C._nn.linear:
        names = ("input", "weight", "bias")
        got = {**dict(zip(names, args, strict=False)), **kwargs}
        operands: list[object] = [got.get("input"), got.get("weight"), got.get("bias")]
        layout = "VH"
    elif target in _MATMUL:
        second = kwargs.get("other", kwargs.get("mat2"))
        pair = [*args, *([] if second is None else [second])]
        if len(pair) != 2:
            return None
        operands, layout = [*pair, None], "HV"
    elif target in _ADDMM:
        if (
            len(args) != 3
            or kwargs.keys() - {"beta", "alpha"}
            or any(v != 1 for v in kwargs.values())
        ):
            return None
        operands, layout = [args[1], args[2], args[0]], "HV"
    elif target in _CONVOLUTIONS:
        return _parse_convolution(node)
    elif target is torch.einsum and len(args) >= 2 and isinstance(args[0], str):
        return _parse_einsum(args[0], args[1:])
    else:
        return None
    x, weight, bias = operands
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if bias is not None and not isinstance(bias, fx.Node):
        return None
    return x, weight, bias, layout


def _parse_convolution(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, str] | None:
    """Convolutions that are a linear for each position: a kernel of one, one group."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    got = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, weight, bias = got.get("input"), got.get("weight"), got.get("bias")
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if bias is not None and not isinstance(bias, fx.Node):
        return None
    x_val, w_val = fake(x), fake(weight)
    if not isinstance(x_val, torch.Tensor) or not isinstance(w_val, torch.Tensor):
        return None
    is_batch = x_val.dim() == w_val.dim()
    kernel = all(isinstance(size, int) and size == 1 for size in w_val.shape[2:])
    stride, padding = got.get("stride", 1), got.get("padding", 0)
    strides = stride if isinstance(stride, (tuple, list)) else (stride,)
    paddings = padding if isinstance(padding, (tuple, list)) else (padding,)
    whole = all(s == 1 for s in strides) and all(p in (0, "valid", "same") for p in paddings)
    if not (is_batch and kernel and whole and got.get("groups", 1) == 1):
        return None
    return x, weight, bias, "conv"


def _parse_einsum(
    equation: str, rest: tuple[object, ...]
) -> tuple[fx.Node, fx.Node, None, str] | None:
    """Einsums that are a linear: ``bth,vh->btv``, ``nh,hv->nv``, either order of operands.

    The weight may have several dimensions of output features: ``nh,kvh->nkv``.
    """
    operands = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or len(operands) != 2 or "." in equation:
        return None
    for i in (0, 1):
        x_term, w_term = terms[i], terms[1 - i]
        x, weight = operands[i], operands[1 - i]
        rows, h = x_term[:-1], x_term[-1:]
        v = output[len(rows) :]
        if (
            isinstance(x, fx.Node)
            and isinstance(weight, fx.Node)
            and output == rows + v
            and rows
            and v
            and w_term in (v + h, h + v)
            and len({*x_term, *v}) == len(x_term) + len(v)
        ):
            layout = "VH" if w_term == v + h else "HV"
            return x, weight, None, layout if len(v) == 1 else f"K{layout}"
    return None


def _refuse_at_a_glance(
    candidate: Candidate, min_bytes: int, layer: fx.Node | None
) -> Refusal | None:
    subclass = refuse_subclass(candidate.node, candidate.source)
    if subclass is not None:
        return subclass
    if candidate.logits_bytes < min_bytes:
        return Refusal(
            "small",
            op_name(candidate.node),
            f"{candidate.logits_bytes} bytes of logits; min_bytes is {min_bytes}",
            candidate.source,
        )
    if isinstance(candidate.rows, int) and candidate.rows < 2:
        detail = "one row of logits" if candidate.rows else "no rows of logits"
        return Refusal("single-row", op_name(candidate.node), detail, candidate.source)
    dynamic = _dynamic_features(candidate)
    if dynamic is not None:
        return Refusal("dynamic-features", op_name(candidate.node), dynamic, candidate.source)
    if layer is not None:
        return Refusal(
            "feeds-layer",
            op_name(layer),
            f"the {candidate.out_features}-wide output enters {op_name(layer)}",
            source_line(layer),
        )
    return None


def _dynamic_features(candidate: Candidate) -> str | None:
    """Why a head's features cannot be specialised to the numbers that they have, if they cannot.

    A parameter's can: its shape does not change from call to call. What the user has marked as
    dynamic never can.
    """
    weight = candidate.weight
    for node in (weight, candidate.x):
        val = fake(node)
        features = val.shape
        if node is not weight:
            features = (val.shape[features_dim(candidate.weight_layout)],)
        if any(map(is_marked_dynamic, features)):
            what = "the weight's" if node is weight else "the hidden states'"
            return f"{what} number of features is marked as dynamic (mark_dynamic)"
    val = fake(weight)
    if not any(isinstance(size, torch.SymInt) for size in val.shape):
        return None
    if weight.op == "placeholder" and val.is_leaf and val.requires_grad:
        return None
    return "the weight has a symbolic size and is no parameter"


def is_marked_dynamic(size: Any) -> bool:
    """Whether a size must stay symbolic: the user has said so (``torch._dynamo.mark_dynamic``).

    Dynamo raises ConstraintViolationError after the backend has returned if it was specialised.
    """
    if not isinstance(size, torch.SymInt):
        return False
    symbols = size.node.expr.free_symbols
    return any(
        constraint is not None and not constraint.warn_only and not symbols.isdisjoint(free)
        for constraint, free in _constraints(size.node.shape_env)
    )


def _constraints(shape_env: Any) -> Iterator[tuple[Any, set[sympy.Symbol]]]:
    """The constraint on each symbolic size of a graph's inputs, and the size's symbols."""
    for tracked in shape_env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None)
        if constraints is None or not isinstance(tracked.fake, torch.Tensor):
            continue
        for size, constraint in zip(tracked.fake.shape, constraints, strict=True):
            if isinstance(size, torch.SymInt):
                yield constraint, size.node.expr.free_symbols


def _is_layer(node: fx.Node) -> bool:
    return parse_linear(node) is not None or node.target in LAYERS


def layer_fed_by(
    head: fx.Node, last: Collection[fx.Node], is_layer: Callable[[fx.Node], bool] = _is_layer
) -> fx.Node | None:
    """A layer that the wide values downstream of ``head`` enter, if any.

    One with a narrow output counts if it leads to one of ``last``, and nothing else makes narrow
    values of the wide ones: an MLP's, but not ``softmax(logits) @ embeddings`` beside a loss.

    Args:
        is_layer: What counts as one.
    """
    wide_numel = hint(fake(head).numel())
    seen, stack = {head}, [head]
    entered: fx.Node | None = None
    reduced = False
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen or user.op == "output":
                continue
            seen.add(user)
            wide = _is_wide(fake(user), wide_numel)
            if is_layer(user):
                if wide:
                    return user
                if _leads_to(user, last):
                    entered = entered or user
                    continue
            if wide:
                stack.append(user)
            else:
                reduced = reduced or isinstance(fake(user), torch.Tensor)
    return None if reduced else entered


def _leads_to(node: fx.Node, ends: Collection[fx.Node]) -> bool:
    """Whether one of ``ends`` is computed from a node, or is it."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current in ends:
            return True
        new = [user for user in current.users if user not in seen]
        seen.update(new)
        stack.extend(new)
    return False


def _is_wide(value: object, wide_numel: int) -> bool:
    return any(hint(t.numel()) * NARROW > wide_numel for t in tensors_of(value))
