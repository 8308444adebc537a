"""Runtime: the ops in the rewritten graph, and the chunk loop behind them.

    fused(rows, shared, cotangents)   values and gradients in one pass; not differentiable
    forward(rows, shared)             values; its backward is ``backward``
    backward(rows, shared, cotangents) gradients, recomputing each chunk
    attach(loss, inputs, gradients)   the loss unchanged; in backward, gradients × upstream

The ops are opaque to AOTAutograd and Inductor; a string argument finds their region in
``REGIONS``. It is a hash of everything that changes the result, since the compiler's caches know
the op by its arguments alone. A fresh process fills the registry before a cached graph runs,
because it runs the backend first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autochunk.body import (
    MIN_SYMBOLIC_ROWS,
    BodySpec,
    Factor,
    Gradient,
    Head,
    Kernel,
    TensorSpec,
)
from autochunk.plan import accumulate_dtype
from autochunk.types import IndexCheck


@dataclass(frozen=True)
class Loop:
    """A region ready to run.

    Attributes:
        spec: Shapes and dtypes.
        checks: Index ranges to verify before the loop.
        accumulate: Requested dtype for sums over chunks; None decides by their number.
        value_kernel: Values only.
        full_kernel: Values and gradients.
        grad_kernel: Gradients only.
    """

    spec: BodySpec
    checks: tuple[IndexCheck, ...]
    accumulate: torch.dtype | None
    value_kernel: Kernel | None = None
    full_kernel: Kernel | None = None
    grad_kernel: Kernel | None = None


#: Elements of a weight gradient's tile, where a product cannot be added in place: on a CPU it is
#: still in the cache when it is added, on CUDA it only has to be small.
_TILE_SIZE, _TILE_SIZE_CUDA = 2**21, 2**25

#: Never shrinks, as Inductor's own modules do not: a backward pass may run after the function it
#: came from was collected.
REGIONS: dict[str, Loop] = {}


def run_loop(
    loop: Loop,
    kernel: Kernel,
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """Runs a kernel chunk by chunk.

    Chunks are near-equal and all of one size: the last one begins early enough to be whole, and
    the cotangents of rows it shares with the one before are zero.

    Args:
        rows: ``[R, *features]`` each.
        shared: Passed whole to each chunk.
        cotangents: ``[R, *features]`` for each differentiable output.

    Returns:
        The outputs (if the kernel has them), then row gradients, then shared gradients.
    """
    spec = loop.spec
    total = rows[0].shape[0]
    check_indices(loop, rows, shared)
    rows = [r.contiguous() for r in rows]
    cotangents = [c.contiguous() for c in cotangents]
    shared = [_as_expected(t, s) for t, s in zip(shared, spec.shared, strict=True)]
    size, starts = _chunks(total, spec.chunk_rows, kernel.symbolic)
    outputs = [_empty(total, s) for s in spec.outputs[: kernel.values]]
    row_grads = [_empty(total, spec.rows[i]) for i in spec.row_grads if kernel.row_grads]
    sums = [
        _Sum(grad, spec.shared[i], len(starts), loop.accumulate)
        for grad, i in zip(kernel.shared_grads, spec.shared_grads, strict=False)
    ]
    buffers = [
        _buffer(size, head, spec.device, kernel.transposed) for head in kernel.heads if total
    ]
    done = 0
    for start in starts:
        begin = min(start, max(total - size, 0))
        end = min(begin + size, total)
        fresh = slice(done - begin, end - begin)  # rows of the chunk no earlier one has done
        part = [_cut(t, begin, size) for t in rows]
        weights = [_cut(t, begin, size) for t in cotangents]
        if fresh != slice(0, size):
            weights = [_zero_outside(w, fresh) for w in weights]
        inputs = [*part, *shared]
        for i, head in enumerate(kernel.heads):
            _fill(head, inputs, buffers[i], kernel.transposed)
        results = kernel.run([*inputs, *weights, *buffers])
        at_hand = {"input": inputs, "buffer": buffers, "result": results}
        for out, result in zip(outputs, results, strict=False):
            out[done:end].copy_(result[fresh])
        for out, gradient in zip(row_grads, kernel.row_grads, strict=True):
            _write_rows(out[done:end], gradient, at_hand, fresh, size)
        for shared_sum in sums:
            shared_sum.add(at_hand)
        del results, at_hand
        done = end
    buffers.clear()  # before sums in a wider dtype are converted
    return [*outputs, *row_grads, *(s.finish() for s in sums)]


def _buffer(size: int, head: Head, device: torch.device, transposed: bool) -> Tensor:
    if transposed:
        return torch.empty((head.features, size), dtype=head.dtype, device=device).t()
    return torch.empty((size, head.features), dtype=head.dtype, device=device)


def _fill(head: Head, inputs: Sequence[Tensor], buffer: Tensor, transposed: bool) -> None:
    a, b = (_take(f, {"input": inputs}) for f in (head.a, head.b))
    bias = None if head.bias is None else inputs[head.bias.index]
    if transposed:
        a, b, buffer = b.t(), a.t(), buffer.t()
        bias = None if bias is None else bias.unsqueeze(-1)
    if bias is None:
        torch.mm(a, b, out=buffer)
    else:
        torch.addmm(bias, a, b, out=buffer)


def _take(factor: Factor, at_hand: Mapping[str, Sequence[Tensor]]) -> Tensor:
    tensor = at_hand[factor.kind][factor.index]
    return tensor.t() if factor.transposed else tensor


def _write_rows(
    out: Tensor,
    gradient: Gradient,
    at_hand: Mapping[str, Sequence[Tensor]],
    fresh: slice,
    size: int,
) -> None:
    """Writes a row gradient where it belongs; a whole chunk's product without a temporary."""
    whole = out.shape[0] == size and out.dim() == 2
    for n, term in enumerate(gradient):
        factors = [_take(f, at_hand) for f in term]
        if len(factors) == 1:
            out.copy_(factors[0][fresh]) if n == 0 else out.add_(factors[0][fresh])
        elif not whole:
            product = torch.mm(*factors)[fresh].view(out.shape)
            out.copy_(product) if n == 0 else out.add_(product)
        elif n == 0:
            torch.mm(*factors, out=out)
        else:
            out.addmm_(*factors)


class _Sum:
    """A shared gradient, summed over chunks in place."""

    def __init__(
        self, gradient: Gradient, like: TensorSpec, chunks: int, requested: torch.dtype | None
    ) -> None:
        self.gradient = gradient
        self.like = like
        self.dtype = accumulate_dtype(like.dtype, chunks * len(gradient), requested)
        self.out: Tensor | None = None
        self.product: Tensor | None = None  # of a tile

    def add(self, at_hand: Mapping[str, Sequence[Tensor]]) -> None:
        for term in self.gradient:
            factors = [_take(f, at_hand) for f in term]
            first = self.out is None
            if self.out is None:
                self.out = torch.empty(self.like.sizes, dtype=self.dtype, device=self.like.device)
            if len(factors) == 1:
                self.out.copy_(factors[0]) if first else self.out.add_(factors[0])
            elif factors[0].dtype != self.dtype:
                self._add_tiled(self.out, factors[0], factors[1], first)
            elif first:
                torch.mm(*factors, out=self.out)
            else:
                self.out.addmm_(*factors)

    def _add_tiled(self, out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
        """``out += a @ b`` with a wider ``out``, without a temporary of its size.

        cuBLAS can write a float32 product of half precision factors; elsewhere each tile's product
        is rounded once before it is added.
        """
        height = max(1, (_TILE_SIZE_CUDA if out.is_cuda else _TILE_SIZE) // out.shape[1])
        wide = (
            out.is_cuda and out.dtype == torch.float32 and a.dtype in (torch.half, torch.bfloat16)
        )
        if self.product is None and not wide:
            height = min(height, out.shape[0])
            self.product = torch.empty((height, out.shape[1]), dtype=a.dtype, device=out.device)
        for tile, left in zip(out.split(height), a.split(height), strict=True):
            if self.product is None:
                product = torch.mm(left, b, out_dtype=out.dtype)
            else:
                product = torch.mm(left, b, out=self.product[: tile.shape[0]])
            tile.copy_(product) if first else tile.add_(product)

    def finish(self) -> Tensor:
        """The gradient; the sum is not kept."""
        out, self.out, self.product = self.out, None, None
        if out is None:
            return torch.zeros(self.like.sizes, dtype=self.like.dtype, device=self.like.device)
        return out.to(self.like.dtype)


def _empty(total: int, spec: TensorSpec) -> Tensor:
    return torch.empty((total, *spec.sizes), dtype=spec.dtype, device=spec.device)


def _zero_outside(weights: Tensor, fresh: slice) -> Tensor:
    kept = torch.zeros_like(weights)
    kept[fresh] = weights[fresh]
    return kept


def _chunks(total: int, most: int, symbolic: bool) -> tuple[int, range]:
    """Rows of a chunk, and where chunks start (before the last is moved to be whole)."""
    if not symbolic:
        return most, range(0, total, most)
    count = -(-total // most)
    size = max(-(-total // count) if count else 1, MIN_SYMBOLIC_ROWS)
    return size, range(0, total, size)


def _cut(t: Tensor, begin: int, size: int) -> Tensor:
    """Rows ``[begin, begin + size)``, the last repeated where there are fewer."""
    part = t[begin : begin + size]
    if part.shape[0] < size:
        part = torch.cat([part, part[-1:].expand(size - part.shape[0], *part.shape[1:])])
    return part


def _as_expected(t: Tensor, spec: Any) -> Tensor:
    """A shared input with the strides its kernel was compiled for."""
    if t.stride() == spec.strides or t.dim() == 0:
        return t
    made = torch.empty_strided(spec.sizes, spec.strides, dtype=spec.dtype, device=spec.device)
    return made.copy_(t)


def check_indices(loop: Loop, rows: Sequence[Tensor], shared: Sequence[Tensor]) -> None:
    """Raises what eager PyTorch would raise for an index that no feature has.

    On CUDA the check would wait for the device; the device's own assertion is left to report it.

    Raises:
        IndexError: naming the index, where it stands and the user's line.
    """
    for check in loop.checks:
        inputs = [rows[i] for i in check.row_inputs] + [shared[i] for i in check.shared_inputs]
        if inputs[0].device.type != "cpu" or rows[0].shape[0] == 0:
            continue
        (index,) = check.graph(*inputs)
        low = -check.size if check.wraps else 0
        bad = (index < low) | (index >= check.size)
        if bad.any():
            at = bad.nonzero()[0]
            place = f"row {int(at[0])} of the" if check.row_inputs else "the"
            where = f" ({check.source})" if check.source else ""
            raise IndexError(
                f"Target {int(index[tuple(at)])} is out of bounds: {place} "
                f"chunked head addresses one of {check.size} features{where}"
            )


# ---- the ops ---------------------------------------------------------------------------------


def _region(key: str) -> Loop:
    loop = REGIONS.get(key)
    if loop is None:
        raise RuntimeError(
            f"autochunk: region {key} is not registered in this process; the compiled function "
            "it belongs to was not compiled here or no longer exists"
        )
    return loop


@torch.library.custom_op(
    "autochunk::fused",
    mutates_args=(),
    schema="(Tensor[] rows, Tensor[] shared, Tensor[] cotangents, str key) -> Tensor[]",
)
def fused(
    rows: list[Tensor], shared: list[Tensor], cotangents: list[Tensor], key: str
) -> list[Tensor]:
    """Outputs, row gradients and shared gradients of a region, in one pass."""
    loop = _region(key)
    assert loop.full_kernel is not None
    return run_loop(loop, loop.full_kernel, rows, shared, cotangents)


@torch.library.custom_op(
    "autochunk::forward",
    mutates_args=(),
    schema="(Tensor[] rows, Tensor[] shared, str key) -> Tensor[]",
)
def forward(rows: list[Tensor], shared: list[Tensor], key: str) -> list[Tensor]:
    """Outputs of a region."""
    loop = _region(key)
    assert loop.value_kernel is not None
    return run_loop(loop, loop.value_kernel, rows, shared, ())


@torch.library.custom_op(
    "autochunk::backward",
    mutates_args=(),
    schema="(Tensor[] rows, Tensor[] shared, Tensor[] cotangents, str key) -> Tensor[]",
)
def backward(
    rows: list[Tensor], shared: list[Tensor], cotangents: list[Tensor], key: str
) -> list[Tensor]:
    """Row gradients and shared gradients of a region, each chunk recomputed."""
    loop = _region(key)
    assert loop.grad_kernel is not None
    return run_loop(loop, loop.grad_kernel, rows, shared, cotangents)


@torch.library.custom_op(
    "autochunk::attach",
    mutates_args=(),
    schema="(Tensor loss, Tensor[] inputs, Tensor[] gradients) -> Tensor",
)
def attach(loss: Tensor, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """``loss``, with known gradients with respect to ``inputs``."""
    return loss.clone()


def _fake_outputs(loop: Loop, total: Any) -> list[Tensor]:
    return [
        torch.empty((total, *s.sizes), dtype=s.dtype, device=s.device) for s in loop.spec.outputs
    ]


def _fake_gradients(loop: Loop, rows: list[Tensor]) -> list[Tensor]:
    spec = loop.spec
    return [
        *(
            torch.empty(rows[i].shape, dtype=rows[i].dtype, device=rows[i].device)
            for i in spec.row_grads
        ),
        *(
            torch.empty(spec.shared[i].sizes, dtype=spec.shared[i].dtype, device=spec.device)
            for i in spec.shared_grads
        ),
    ]


@fused.register_fake
def _(rows: list[Tensor], shared: list[Tensor], cotangents: list[Tensor], key: str) -> list[Tensor]:
    loop = _region(key)
    return [*_fake_outputs(loop, rows[0].shape[0]), *_fake_gradients(loop, rows)]


@forward.register_fake
def _(rows: list[Tensor], shared: list[Tensor], key: str) -> list[Tensor]:
    return _fake_outputs(_region(key), rows[0].shape[0])


@backward.register_fake
def _(rows: list[Tensor], shared: list[Tensor], cotangents: list[Tensor], key: str) -> list[Tensor]:
    return _fake_gradients(_region(key), rows)


@attach.register_fake
def _(loss: Tensor, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    return torch.empty_like(loss)


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    rows, shared, key = inputs
    ctx.save_for_backward(*rows, *shared)
    ctx.n_rows, ctx.key = len(rows), key
    ctx.meta = [(o.shape, o.dtype, o.device) for o in output]


def _forward_backward(ctx: Any, grads: list[Tensor | None]) -> Any:
    loop = _region(ctx.key)
    spec = loop.spec
    rows, shared = ctx.saved_tensors[: ctx.n_rows], ctx.saved_tensors[ctx.n_rows :]
    cotangents = []
    for i in spec.grad_outputs:
        shape, dtype, device = ctx.meta[i]
        grad = grads[i]
        cotangents.append(torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad)
    found = backward(list(rows), list(shared), cotangents, ctx.key)
    row_grads: list[Tensor | None] = [None] * len(rows)
    shared_grads: list[Tensor | None] = [None] * len(shared)
    n = len(spec.row_grads)
    for i, grad in zip(spec.row_grads, found[:n], strict=True):
        row_grads[i] = grad
    for i, grad in zip(spec.shared_grads, found[n:], strict=True):
        shared_grads[i] = grad
    return row_grads, shared_grads, None


def _attach_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, given, gradients = inputs
    ctx.save_for_backward(*gradients)
    ctx.n = len(given)


def _attach_backward(ctx: Any, grad: Tensor) -> Any:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "autochunk: double backward is not supported: the gradients of a chunked head are "
            "computed in its forward pass, and how they depend on its inputs is not recorded"
        )
    upstream = grad.reshape(())
    scaled = [
        g * upstream.to(torch.promote_types(g.dtype, torch.float32)) for g in ctx.saved_tensors
    ]
    scaled = [s.to(g.dtype) for s, g in zip(scaled, ctx.saved_tensors, strict=True)]
    return grad, scaled, [None] * ctx.n


forward.register_autograd(_forward_backward, setup_context=_forward_context)
attach.register_autograd(_attach_backward, setup_context=_attach_context)
