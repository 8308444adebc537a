"""Body: a region's graph as a compiled kernel for one chunk of rows.

    1. Trace value and vjp of the body through autograd, with the chunk's shape.
    2. Run Inductor's joint-graph passes, as AOTAutograd would.
    3. Peel: a gradient of a shared input that ends in a matrix product leaves the graph as its two
       factors, so that the loop can add the product into one accumulator in place.
    4. Compile with Inductor. One kernel serves all chunks; a symbolic number of rows is compiled
       once for all numbers of rows.

All of this happens while the backend runs: autograd and the compiler cannot be entered from
inside the op that runs the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

aten = torch.ops.aten

#: The smallest number of rows a kernel with symbolic rows is run with (sizes 0 and 1 are special
#: to the compiler).
MIN_SYMBOLIC_ROWS = 2

#: Widths of an index up to which a scatter is written as comparisons, which fuse.
_MAX_COMPARED = 4


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
    inductor: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        return self.rows[0].device


@dataclass(frozen=True)
class SharedGrad:
    """Where a kernel leaves a shared input's gradient.

    Attributes:
        terms: Positions in the kernel's results: one for a partial gradient to be added, two for
            the factors ``a @ b`` of one.
        transposed: For each term, whether its transpose is the gradient.
    """

    terms: tuple[tuple[int, ...], ...]
    transposed: tuple[bool, ...]


@dataclass(frozen=True)
class Kernel:
    """A compiled chunk.

    Attributes:
        run: Takes row inputs, shared inputs and cotangents of one chunk, returns the results.
        values: Whether the results begin with the outputs.
        row_grads: Positions of the row gradients in the results.
        shared_grads: Where the shared gradients are.
        graph: The graph that was compiled, for the debug directory.
    """

    run: Callable[[list[Any]], Sequence[torch.Tensor]]
    values: bool
    row_grads: tuple[int, ...]
    shared_grads: tuple[SharedGrad, ...]
    graph: str


def compile_body(spec: BodySpec, *, values: bool, grads: bool) -> Kernel:
    """Compiles a body.

    Args:
        values: Return the outputs.
        grads: Take cotangents of ``spec.grad_outputs`` and return gradients.
    """
    shape_env = ShapeEnv()
    fake_mode = FakeTensorMode(shape_env=shape_env)
    with (
        torch._C._DisableAutocast(),
        tracing(TracingContext(fake_mode)),
        V.set_fake_mode(fake_mode),
        inductor_config.patch(_inductor_config(spec)),
    ):
        inputs = _fakes(spec, fake_mode, shape_env, cotangents=grads)
        with fake_mode, enable_python_dispatcher(), torch.no_grad():
            gm = make_fx(
                _function(spec, values=values, grads=grads),
                decomposition_table={**select_decomp_table(), **_DECOMPOSITIONS},
                tracing_mode="real",
            )(*inputs)
        gm = joint_graph_passes(gm)
        n_values = len(spec.outputs) if values else 0
        n_row_grads = len(spec.row_grads) if grads else 0
        shared_grads = _peel(gm, n_values + n_row_grads)
        graph = gm.print_readable(print_output=False)
        run = compile_fx_inner(gm, inputs)
    return Kernel(
        run=run,
        values=values,
        row_grads=tuple(range(n_values, n_values + n_row_grads)),
        shared_grads=shared_grads,
        graph=graph,
    )


def _inductor_config(spec: BodySpec) -> dict[str, Any]:
    # Indices are checked before the loop with an error that names them; the assertion in a CPU
    # kernel would abort the process.
    return {**spec.inductor, "assert_indirect_indexing": False}


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
            torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)
        ]
        return [*(o.detach() for o in outputs if values), *gradients]

    return function


def _scatter_add(
    x: torch.Tensor, dim: int, index: torch.Tensor, src: torch.Tensor
) -> torch.Tensor:
    """The gradient of a gather of few indices, as comparisons that fuse with their neighbours.

    ``x + Σ_j where(iota == index[:, j], src[:, j], 0)``; without it Inductor keeps a chunk-sized
    buffer of zeros to scatter into.
    """
    dim = dim % x.dim() if x.dim() else 0
    others = [d for d in range(x.dim()) if d != dim]
    if (
        x.dim() == 0
        or not isinstance(index.shape[dim], int)
        or index.shape[dim] > _MAX_COMPARED
        or any(index.shape[d] != x.shape[d] or src.shape[d] != x.shape[d] for d in others)
    ):
        return NotImplemented
    shape = [1] * x.dim()
    shape[dim] = x.shape[dim]
    iota = torch.arange(x.shape[dim], device=x.device).view(shape)
    for j in range(index.shape[dim]):
        picked, value = index.narrow(dim, j, 1), src.narrow(dim, j, 1)
        x = x + torch.where(iota == picked, value, torch.zeros((), dtype=x.dtype, device=x.device))
    return x


_DECOMPOSITIONS = {aten.scatter_add.default: _scatter_add}


# ---- peeling ---------------------------------------------------------------------------------


def _peel(gm: fx.GraphModule, first: int) -> tuple[SharedGrad, ...]:
    """Replaces the graph's results from ``first`` on by the factors they are products of."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    results = list(output.args[0])  # type: ignore[arg-type]
    kept, peeled = results[:first], []
    for result in results[first:]:
        terms, transposed = [], []
        for product, is_transposed in _products(result):
            if product is None:
                terms.append((len(kept),))
                kept.append(result)
            else:
                terms.append((len(kept), len(kept) + 1))
                kept.extend(product)
            transposed.append(is_transposed)
        peeled.append(SharedGrad(tuple(terms), tuple(transposed)))
    output.args = (tuple(kept),)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return tuple(peeled)


def _products(node: fx.Node) -> list[tuple[tuple[fx.Node, fx.Node] | None, bool]]:
    """``node`` as a sum of matrix products and their transposes, or one term None: itself."""
    if node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
        left, right = node.args
        if isinstance(left, fx.Node) and isinstance(right, fx.Node):
            terms = [*_products(left), *_products(right)]
            if all(product is not None for product, _ in terms):
                return terms
    transposed, inner = False, node
    while inner.target in (aten.t.default, aten.permute.default, aten.transpose.int):
        if inner.meta["val"].dim() != 2:
            break
        if inner.target is not aten.permute.default or list(inner.args[1]) == [1, 0]:  # type: ignore[arg-type]
            transposed = not transposed
        inner = inner.args[0]  # type: ignore[assignment]
    if inner.target is aten.mm.default:
        a, b = inner.args
        return [((a, b), transposed)]  # type: ignore[list-item]
    return [(None, False)]
