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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from autochunk.body import MIN_SYMBOLIC_ROWS, BodySpec, Kernel, SharedGrad
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
    name: str = "region"
    __weakref__: Any = field(init=False, repr=False, compare=False)


REGIONS: WeakValueDictionary[str, Loop] = WeakValueDictionary()


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
    check_indices(loop, rows)
    n_values = len(spec.outputs) if kernel.values else 0
    outputs = [
        torch.empty((total, *s.sizes), dtype=s.dtype, device=s.device)
        for s in (
            *spec.outputs[:n_values],
            *(spec.rows[i] for i in spec.row_grads if kernel.row_grads),
        )
    ]
    rows = [r.contiguous() for r in rows]
    cotangents = [c.contiguous() for c in cotangents]
    shared = [_as_expected(t, s) for t, s in zip(shared, spec.shared, strict=True)]
    size, starts = _chunks(total, spec)
    sums = [
        _Sum(grad, spec.shared[i], accumulate_dtype(spec.shared[i].dtype, len(starts), loop.accumulate))
        for grad, i in zip(kernel.shared_grads, spec.shared_grads, strict=False)
    ]
    done = 0
    for start in starts:
        begin = min(start, max(total - size, 0))
        fresh = done - begin  # rows of this chunk that the one before has done already
        part = [_cut(t, begin, size) for t in rows]
        weights = [_cut(t, begin, size) for t in cotangents]
        padding = size - (min(begin + size, total) - begin)
        if weights and (fresh or padding):
            weights = [w.clone() for w in weights]
            for w in weights:
                w[:fresh].zero_()
                if padding:
                    w[size - padding :].zero_()
        end = begin + size - padding
        results = kernel.run([*part, *shared, *weights])
        for out, result in zip(outputs, results, strict=False):
            out[done:end].copy_(result[fresh : size - padding])
        for total_ in sums:
            total_.add(results)
        del results
        done = end
    return [*outputs, *(s.finish() for s in sums)]


class _Sum:
    """A shared gradient, summed over chunks in place."""

    def __init__(self, grad: SharedGrad, like: Any, dtype: torch.dtype) -> None:
        self.grad = grad
        self.like = like
        self.dtype = dtype
        self.out: Tensor | None = None

    def add(self, results: Sequence[Tensor]) -> None:
        for term, transposed in zip(self.grad.terms, self.grad.transposed, strict=True):
            factors = [results[i] for i in term]
            if transposed and len(factors) == 2:
                factors = [factors[1].t(), factors[0].t()]
            if self.out is None:
                self.out = self._first(factors)
            elif len(factors) == 1:
                self.out.add_(factors[0])
            elif factors[0].dtype == self.dtype:
                self.out.addmm_(*factors)
            else:
                self.out.add_(_mm(factors, self.dtype))

    def finish(self) -> Tensor:
        if self.out is None:
            return torch.zeros(self.like.sizes, dtype=self.like.dtype, device=self.like.device)
        return self.out if self.out.dtype == self.like.dtype else self.out.to(self.like.dtype)

    def _first(self, factors: Sequence[Tensor]) -> Tensor:
        out = torch.empty(self.like.sizes, dtype=self.dtype, device=self.like.device)
        if len(factors) == 1:
            return out.copy_(factors[0])
        if factors[0].dtype == self.dtype:
            return torch.mm(*factors, out=out)
        return out.copy_(_mm(factors, self.dtype))


def _mm(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A product of half precision factors, in float32 where the device's library can do that."""
    if factors[0].is_cuda and dtype == torch.float32:
        return torch.mm(*factors, out_dtype=dtype)  # type: ignore[call-overload]
    return torch.mm(*factors)


def _chunks(total: int, spec: BodySpec) -> tuple[int, range]:
    """Rows of a chunk, and where chunks start (before the last is moved to be whole)."""
    if not spec.symbolic:
        return spec.chunk_rows, range(0, total, spec.chunk_rows)
    count = -(-total // spec.chunk_rows)
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


def check_indices(loop: Loop, rows: Sequence[Tensor]) -> None:
    """Raises what eager PyTorch would raise for an index that no feature has.

    On CUDA the check would wait for the device; the device's own assertion is left to report it.

    Raises:
        IndexError: naming the index, its row and the user's line.
    """
    for check in loop.checks:
        inputs = [rows[i] for i in check.row_inputs]
        if inputs[0].device.type != "cpu" or inputs[0].shape[0] == 0:
            continue
        (index,) = check.graph(*inputs)
        low = -check.size if check.wraps else 0
        bad = (index < low) | (index >= check.size)
        if bad.any():
            at = bad.nonzero()[0]
            where = f" ({check.source})" if check.source else ""
            raise IndexError(
                f"Target {int(index[tuple(at)])} is out of bounds: row {int(at[0])} of the "
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
    upstream = grad.reshape(())
    scaled = [g * upstream.to(torch.promote_types(g.dtype, torch.float32)) for g in ctx.saved_tensors]
    scaled = [s.to(g.dtype) for s, g in zip(scaled, ctx.saved_tensors, strict=True)]
    return grad, scaled, [None] * ctx.n


forward.register_autograd(_forward_backward, setup_context=_forward_context)
attach.register_autograd(_attach_backward, setup_context=_attach_context)
