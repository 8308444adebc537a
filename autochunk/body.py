"""Body: a region's graph as a compiled kernel for one chunk of rows.

    1. Trace value and vjp of the body through autograd, with the chunk's shape, and make the
       trace functional (``kernel_writes``).
    2. Run Inductor's joint-graph passes and AOTAutograd's elimination of common subexpressions,
       as a compiled backward pass would, and the passes of ``gathers``.
    3. Peel the matrix products off, so that the loop does them in place:
         first    a product of two inputs (the head) fills the chunk's one logits buffer;
         last     a gradient that ends in a product leaves the graph as its two factors, and a
                  factor of the buffer's shape and dtype overwrites the buffer.
       What is left is row-wise work that reads the logits and writes their gradient over them.
    4. Choose the layout of the buffer (``layout``) and compile with Inductor. One kernel serves
       all chunks; a symbolic number of rows is compiled once for all numbers of rows.

All of this happens while the backend runs: autograd and the compiler cannot be entered from
inside the op that runs the loop.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from autochunk.gathers import (
    gather_masked,
    hoist_gathers,
    scatter_compared,
    simplify_masked_sums,
)
from autochunk.kernel_writes import check_writes, functionalised, same_memory
from autochunk.layout import transpose_buffers
from autochunk.local_buffers import only_in_untiled_loops

aten = torch.ops.aten

_COMPARISONS = frozenset(
    getattr(aten, name).Tensor for name in ("eq", "ne", "lt", "le", "gt", "ge")
)

#: Their results are elements of their argument, or where they are.
_PICKS = frozenset(
    getattr(aten, name)
    for name in (
        *("gather", "index", "index_select", "select", "slice", "topk", "sort", "kthvalue"),
        *("amax", "amin", "max", "min", "argmax", "argmin", "median", "mode"),
    )
)

#: Their results are all elements of their argument.
_PASS_ON = frozenset(
    {
        operator.getitem,
        aten.alias.default,
        aten.clone.default,
        aten.detach.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.view.default,
    }
)

#: The smallest number of rows a kernel with symbolic rows is run with (sizes 0 and 1 are special
#: to the compiler).
MIN_SYMBOLIC_ROWS = 2


@dataclass(frozen=True)
class TensorSpec:
    """What a kernel expects of an input: features or full sizes, strides, dtype and device."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class BodySpec:
    """Everything a kernel depends on, besides the versions of the libraries.

    Attributes:
        body: The region's graph: row inputs, then shared inputs → outputs.
        rows: Specs of the row inputs; sizes and strides without the row dimension.
        shared: Specs of the shared inputs.
        outputs: Specs of the outputs, as for ``rows``.
        row_grads, shared_grads: Inputs to differentiate, by position.
        grad_outputs: Outputs that have a cotangent.
        chunk_rows: Rows of a chunk (the most, where symbolic).
        symbolic: Whether any number of rows up to ``chunk_rows`` may come.
        checked: Whether all indices are known to be in range before the loop runs (on a CPU).
        inductor: Options for Inductor.
    """

    body: fx.GraphModule
    rows: tuple[TensorSpec, ...]
    shared: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    row_grads: tuple[int, ...]
    shared_grads: tuple[int, ...]
    grad_outputs: tuple[int, ...]
    chunk_rows: int
    symbolic: bool
    checked: bool
    inductor: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        return self.rows[0].device


@dataclass(frozen=True)
class Factor:
    """A tensor the loop has at hand, possibly transposed.

    Attributes:
        kind: ``"input"`` (row inputs, then shared inputs), ``"buffer"`` or ``"result"``.
        index: Position among those.
        transposed: Whether its transpose is meant.
    """

    kind: str
    index: int
    transposed: bool = False


@dataclass(frozen=True)
class Head:
    """A product of inputs that fills a buffer before the kernel runs: ``bias + a @ b``."""

    a: Factor
    b: Factor
    bias: Factor | None
    features: int
    dtype: torch.dtype


#: A gradient as a sum of terms: one factor to be added as it is, or two to be multiplied.
Gradient = tuple[tuple[Factor, ...], ...]


@dataclass(frozen=True)
class Kernel:
    """A compiled chunk.

    Attributes:
        run: Takes row inputs, shared inputs, cotangents and buffers of one chunk, returns the
            results.
        symbolic: Whether it takes any number of rows.
        values: Number of outputs of the region, which the results begin with.
        heads: Products that fill the buffers.
        transposed: Whether the buffers lie transposed in memory (see ``layout``).
        row_grads, shared_grads: How to make the gradients.
        graph: The graph that was compiled, for the debug directory.
    """

    run: Callable[[list[Any]], Sequence[torch.Tensor]]
    symbolic: bool
    values: int
    heads: tuple[Head, ...]
    transposed: bool
    row_grads: tuple[Gradient, ...]
    shared_grads: tuple[Gradient, ...]
    graph: str


def compile_body(spec: BodySpec, *, values: bool, grads: bool, overwrite: bool = True) -> Kernel:
    """Compiles a body.

    Args:
        values: Return the outputs.
        grads: Take cotangents of ``spec.grad_outputs`` and return gradients.
        overwrite: Write the gradient of the logits over the logits. Inductor's C++ backend fails
            on some kernels that overwrite an input (pytorch/pytorch#196570); they are compiled
            again without.
    """
    shape_env = ShapeEnv()
    fake_mode = FakeTensorMode(shape_env=shape_env)
    n_inputs = len(spec.rows) + len(spec.shared)
    inputs = _fakes(spec, fake_mode, shape_env, cotangents=grads)
    with torch._C._DisableAutocast(), torch.no_grad(), fake_mode:
        bitwise = (not grads and _picks(spec.body)) or _compares(spec.body, inputs[:n_inputs])
    with (
        torch._C._DisableAutocast(),
        tracing(TracingContext(fake_mode)),
        V.set_fake_mode(fake_mode),
        inductor_config.patch(_inductor_config(spec, bitwise)),
    ):
        function = _function(spec, values=values, grads=grads)
        ours: dict[Any, Callable[..., Any]] = {}
        if spec.checked:
            ours[aten.scatter_add.default] = scatter_compared
        gm = _trace(function, inputs, fake_mode, ours)
        if not hoist_gathers(gm, fake_mode, bitwise) and spec.checked:
            ours[aten.gather.default] = gather_masked
            gm = _trace(function, inputs, fake_mode, ours)
        if spec.checked:
            simplify_masked_sums(gm)
        n_values = len(spec.outputs) if values else 0
        n_row_grads = len(spec.row_grads) if grads else 0
        heads, gradients = _peel(gm, n_inputs, n_values, overwrite)
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        buffers = placeholders[len(placeholders) - len(heads) :]
        # A product rounds as its layout has it, and values that several kernels make of the same
        # logits are compared with each other.
        transposed = not bitwise and transpose_buffers(gm, buffers, fake_mode)
        check_writes(gm.graph, buffers)
        inputs = [p.meta["val"] for p in placeholders]
        graph = gm.print_readable(print_output=False)
        try:
            on_cpu = spec.device.type == "cpu"
            with only_in_untiled_loops() if on_cpu else contextlib.nullcontext():
                run = compile_fx_inner(gm, inputs)
        except InductorError:
            if not overwrite:
                raise
            run = None
    if run is None:
        return compile_body(spec, values=values, grads=grads, overwrite=False)
    if spec.symbolic and not _holds_for_all_rows(shape_env, spec.chunk_rows):
        spec = replace(spec, symbolic=False)
        return compile_body(spec, values=values, grads=grads, overwrite=overwrite)
    return Kernel(
        run=run,
        symbolic=spec.symbolic,
        values=n_values,
        heads=heads,
        transposed=transposed,
        row_grads=gradients[:n_row_grads],
        shared_grads=gradients[n_row_grads:],
        graph=graph,
    )


def interpreted(spec: BodySpec) -> Kernel:
    """A kernel for values that runs a body op by op."""

    def run(args: list[Any]) -> Sequence[torch.Tensor]:
        with torch._C._DisableAutocast():
            return spec.body(*args)

    return Kernel(
        run=run,
        symbolic=True,
        values=len(spec.outputs),
        heads=(),
        transposed=False,
        row_grads=(),
        shared_grads=(),
        graph=spec.body.print_readable(print_output=False),
    )


def _trace(
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    fake_mode: FakeTensorMode,
    decompositions: Mapping[Any, Callable[..., Any]],
) -> fx.GraphModule:
    with fake_mode, enable_python_dispatcher(), torch.no_grad():
        table = {**select_decomp_table(), **decompositions}
        gm = make_fx(function, decomposition_table=table, tracing_mode="real")(*inputs)
        gm = functionalised(gm, inputs, table)
    return _without_repeats(joint_graph_passes(gm))


def _without_repeats(gm: fx.GraphModule) -> fx.GraphModule:
    """Each expression is there once; equal results are one (the loop only reads them)."""
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        # ``fx_graph_cse`` keeps equal results apart. It finds the results by their metadata, and
        # this node has none.
        output.args = (gm.graph.call_function(tuple, output.args),)
    gm.graph = fx_graph_cse(gm.graph)
    output = gm.graph.output_node()
    (packed,) = output.args
    output.args = packed.args
    gm.graph.erase_node(packed)
    gm.recompile()
    return gm


def _picks(body: fx.GraphModule) -> bool:
    """Whether an output is some of the values themselves, which may be compared with the rest."""
    (outputs,) = body.graph.output_node().args
    for node in outputs:
        while isinstance(node, fx.Node) and node.target in _PASS_ON:
            node = node.args[0]
        if isinstance(node, fx.Node) and getattr(node.target, "overloadpacket", None) in _PICKS:
            return True
    return False


class _Comparisons(fx.Interpreter):
    """Runs a body on fake tensors and notes whether it compares floating-point tensors."""

    found = False

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _COMPARISONS:
            self.found |= all(t.is_floating_point() for t in args)
        return super().call_function(target, args, kwargs)


def _compares(body: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> bool:
    comparisons = _Comparisons(body)
    comparisons.run(*inputs)
    return comparisons.found


def _inductor_config(spec: BodySpec, bitwise: bool) -> dict[str, Any]:
    # A kernel that overwrites its input is no graph of its own; the outer graph may be one.
    patches = {**spec.inductor, "triton.cudagraphs": False}
    if spec.checked and spec.device.type == "cpu":
        # Checked indices raise an error that names them before the loop; the assertion in a CPU
        # kernel would abort the process.
        patches["assert_indirect_indexing"] = False
    if bitwise:
        # ``logits == logits.amax(-1, keepdim=True)`` in half precision: Inductor rounds what a
        # kernel returns and what it realizes, and compares it with what it has not rounded.
        patches["emulate_precision_casts"] = True
    return patches


def _holds_for_all_rows(shape_env: ShapeEnv, most: int) -> bool:
    """Whether what the compiler assumed of the symbolic number of rows is true up to ``most``."""
    return all(
        guard.expr.subs(dict.fromkeys(guard.expr.free_symbols, rows)) == sympy.true
        for guard in shape_env.guards
        for rows in range(MIN_SYMBOLIC_ROWS, most + 1)
    )


def _fakes(
    spec: BodySpec, fake_mode: FakeTensorMode, shape_env: ShapeEnv, cotangents: bool
) -> list[torch.Tensor]:
    rows: Any = spec.chunk_rows
    if spec.symbolic:
        source = ConstantSource("rows")
        hint = max(spec.chunk_rows, MIN_SYMBOLIC_ROWS + 1)
        symbol = shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        rows = shape_env.create_symintnode(symbol, hint=hint, source=source)
    outputs = [spec.outputs[i] for i in spec.grad_outputs] if cotangents else []
    with fake_mode:
        chunked = [
            torch.empty((rows, *s.sizes), dtype=s.dtype, device=s.device)
            for s in (*spec.rows, *outputs)
        ]
        shared = [
            torch.empty_strided(s.sizes, s.strides, dtype=s.dtype, device=s.device)
            for s in spec.shared
        ]
    n = len(spec.rows)
    return [*chunked[:n], *shared, *chunked[n:]]


def _function(spec: BodySpec, *, values: bool, grads: bool) -> Callable[..., list[torch.Tensor]]:
    n_inputs = len(spec.rows) + len(spec.shared)
    wanted = [*spec.row_grads, *(len(spec.rows) + i for i in spec.shared_grads)]

    def function(*args: torch.Tensor) -> list[torch.Tensor]:
        inputs, cotangents = list(args[:n_inputs]), args[n_inputs:]
        if not grads:
            return list(spec.body(*inputs))
        with torch.enable_grad():
            for i in wanted:
                inputs[i] = inputs[i].detach().requires_grad_()
            outputs = spec.body(*inputs)
            leaves = [inputs[i] for i in wanted]
            found = torch.autograd.grad(
                [outputs[i] for i in spec.grad_outputs],
                leaves,
                grad_outputs=list(cotangents),
                allow_unused=True,
            )
        gradients = [
            torch.zeros_like(leaf) if g is None else g
            for g, leaf in zip(found, leaves, strict=True)
        ]
        return [*(o.detach() for o in outputs if values), *gradients]

    return function


# ---- the traced graph ------------------------------------------------------------------------


def _peel(
    gm: fx.GraphModule, n_inputs: int, n_values: int, overwrite: bool
) -> tuple[tuple[Head, ...], tuple[Gradient, ...]]:
    """Takes the first and last products out of the graph (step 3 above)."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    inputs = {node: i for i, node in enumerate(placeholders[:n_inputs])}
    output = gm.graph.output_node()
    results = list(output.args[0])
    heads, buffers = _peel_heads(gm, placeholders[-1], inputs)
    kept = results[:n_values]
    overwritten: dict[fx.Node, fx.Node] = {}

    def factor(node: fx.Node) -> Factor:
        base, transposed = _strip_transposes(node)
        if base in inputs:
            return Factor("input", inputs[base], transposed)
        if base in buffers:
            free = base
        elif base in overwritten:
            return Factor("buffer", list(buffers).index(overwritten[base]), transposed)
        else:
            free = _free_buffer(base, buffers, overwritten) if overwrite else None
            if free is not None:
                overwritten[base] = free
                return Factor("buffer", list(buffers).index(free), transposed)
            if base not in kept:
                kept.append(base)
            return Factor("result", kept.index(base), transposed)
        kept.append(_copied(gm, output, free))
        return Factor("result", len(kept) - 1, transposed)

    gradients = tuple(
        tuple(tuple(factor(part) for part in term) for term in _terms(result))
        for result in results[n_values:]
    )
    stale = same_memory(gm.graph, overwritten.values())

    def safe(node: fx.Node) -> fx.Node:
        return _copied(gm, output, node) if node in stale else node

    kept = [safe(node) for node in kept]
    pairs = [(buffer, safe(value)) for value, buffer in overwritten.items()]
    with gm.graph.inserting_before(output):
        for pair in pairs:
            gm.graph.call_function(aten.copy_.default, pair).meta = dict(pair[1].meta)
    output.args = (tuple(kept),)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return heads, gradients


def _copied(gm: fx.GraphModule, output: fx.Node, node: fx.Node) -> fx.Node:
    """A copy of (a view of) a buffer, which leaves the kernel although that is overwritten."""
    with gm.graph.inserting_before(output):
        copied = gm.graph.call_function(aten.clone.default, (node,))
    copied.meta = {**node.meta, "val": node.meta["val"].clone()}
    return copied


def _peel_heads(
    gm: fx.GraphModule, last: fx.Node, inputs: Mapping[fx.Node, int]
) -> tuple[tuple[Head, ...], dict[fx.Node, Head]]:
    """Turns products of inputs into buffers, which are new placeholders."""
    buffers: dict[fx.Node, Head] = {}
    for node in list(gm.graph.nodes):
        if node.target is aten.mm.default:
            bias, (a, b) = None, node.args
        elif node.target is aten.addmm.default and not node.kwargs and node.args[0] in inputs:
            bias, a, b = node.args
        else:
            continue
        (a_base, a_t), (b_base, b_t) = _strip_transposes(a), _strip_transposes(b)
        if a_base not in inputs or b_base not in inputs:
            continue
        head = Head(
            a=Factor("input", inputs[a_base], a_t),
            b=Factor("input", inputs[b_base], b_t),
            bias=None if bias is None else Factor("input", inputs[bias]),
            features=node.meta["val"].shape[1],
            dtype=node.meta["val"].dtype,
        )
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(f"buffer{len(buffers)}")
        last.meta = dict(node.meta)
        buffers[last] = head
        node.replace_all_uses_with(last)
        gm.graph.erase_node(node)
    return tuple(buffers.values()), buffers


def _free_buffer(
    node: fx.Node, buffers: Mapping[fx.Node, Head], overwritten: Mapping[fx.Node, fx.Node]
) -> fx.Node | None:
    """A buffer of a node's shape and dtype that nothing has been assigned to."""
    val = node.meta["val"]
    for buffer in buffers:
        like = buffer.meta["val"]
        if (
            buffer not in overwritten.values()
            and val.dtype == like.dtype
            and val.dim() == 2
            and str(tuple(val.shape)) == str(tuple(like.shape))
        ):
            return buffer
    return None


def _terms(node: fx.Node) -> list[tuple[fx.Node, ...]]:
    """``node`` as a sum of products, a product as its two factors in order."""
    if node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
        left, right = node.args
        if isinstance(left, fx.Node) and isinstance(right, fx.Node):
            terms = [*_terms(left), *_terms(right)]
            if all(len(term) == 2 for term in terms):
                return terms
    base, transposed = _strip_transposes(node)
    if base.target is not aten.mm.default:
        return [(node,)]
    a, b = base.args
    if not transposed:
        return [(a, b)]
    return [(_transpose(b), _transpose(a))]


def _transpose(node: fx.Node) -> fx.Node:
    with node.graph.inserting_after(node):
        made = node.graph.call_function(aten.permute.default, (node, [1, 0]))
    made.meta = {"val": node.meta["val"].t()}
    return made


def _strip_transposes(node: fx.Node) -> tuple[fx.Node, bool]:
    """The node under transposes of matrices, and whether it is transposed in the end."""
    transposed = False
    while node.target in (aten.t.default, aten.permute.default, aten.transpose.int):
        if node.meta["val"].dim() != 2:
            break
        if node.target is not aten.permute.default or list(node.args[1]) == [1, 0]:
            transposed = not transposed
        node = node.args[0]
    return node, transposed
