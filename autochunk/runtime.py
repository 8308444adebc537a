"""Runtime: the ops in the rewritten graph, and the chunk loop behind them.

    forward(rows, shared)                   values; its backward is ``backward``
    backward(rows, shared, cotangents)      gradients, recomputing each chunk
    fused(rows, shared, cotangents)         values and gradients in one pass; not differentiable
    attach(loss, inputs, gradients)         the loss unchanged; in backward, gradients × upstream
    fused_kept(rows, shared, cotangents)    as ``fused``; keeps the gradients (``keeping.py``) and
                                            returns a ticket for them
    attach_kept(loss, …, ticket)            as ``attach``; its backward is ``settle``
    settle(upstream, ticket, …)             the kept gradients × upstream, or computed again

The ops are opaque to AOTAutograd and Inductor; a string argument names their regions in
``REGIONS`` (``group_key``). A name is a hash of everything that changes the result, since the
compiler's caches know the op by its arguments alone. A fresh process fills the registry before a
cached graph runs, because it runs the backend first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
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
from autochunk.keeping import open_ticket, take
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


@dataclass(frozen=True)
class Group:
    """Regions that one op runs, one after the other.

    Attributes:
        loops: Of the regions.
        places: For each loop, for each of its shared gradients, the sum that it is added to:
            regions of one weight have one gradient of it.
        inputs: Whether the weights are inputs of the graph, and thus the same memory in each call.
    """

    loops: tuple[Loop, ...]
    places: tuple[tuple[int, ...], ...]
    inputs: bool = False

    @property
    def n_outputs(self) -> int:
        return sum(len(loop.spec.outputs) for loop in self.loops)

    @property
    def sums(self) -> list[tuple[int, int]]:
        """For each sum the first gradient in it: the loop, and the position in ``shared``."""
        first: dict[int, tuple[int, int]] = {}
        for n, (loop, places) in enumerate(zip(self.loops, self.places, strict=True)):
            for place, i in zip(places, loop.spec.shared_grads, strict=True):
                first.setdefault(place, (n, i))
        return [first[place] for place in range(len(first))]

    @property
    def sum_specs(self) -> list[TensorSpec]:
        """Of each sum."""
        return [self.loops[n].spec.shared[i] for n, i in self.sums]

    def gradient_positions(self) -> tuple[list[int], list[int]]:
        """Positions among ``rows`` and ``shared`` of the inputs that the gradients are of."""
        rows = [
            begin + i
            for begin, loop in zip(self._begins("rows"), self.loops, strict=True)
            for i in loop.spec.row_grads
        ]
        begins = self._begins("shared")
        return rows, [begins[n] + i for n, i in self.sums]

    def split(
        self, rows: Sequence[Any], shared: Sequence[Any], cotangents: Sequence[Any]
    ) -> list[tuple[Sequence[Any], Sequence[Any], Sequence[Any]]]:
        """The arguments of each loop."""
        parts = []
        for n, loop in enumerate(self.loops):
            spec = loop.spec
            r, s, c = (self._begins(name)[n] for name in ("rows", "shared", "grad_outputs"))
            parts.append(
                (
                    rows[r : r + len(spec.rows)],
                    shared[s : s + len(spec.shared)],
                    cotangents[c : c + len(spec.grad_outputs)],
                )
            )
        return parts

    def _begins(self, name: str) -> list[int]:
        counts = [len(getattr(loop.spec, name)) for loop in self.loops]
        return list(itertools.accumulate(counts[:-1], initial=0))


def group_key(members: Sequence[tuple[str, Sequence[int]]], inputs: bool) -> str:
    """The string that finds a group: names of its regions, with their ``places``."""
    parts = [f"{key}:{','.join(map(str, places))}" for key, places in members]
    return ";".join([*parts, "inputs"] if inputs else parts)


def _group(key: str) -> Group:
    *parts, last = key.split(";")
    inputs = last == "inputs"
    loops, places = [], []
    for part in parts if inputs else (*parts, last):
        name, _, numbers = part.partition(":")
        loop = REGIONS.get(name)
        if loop is None:
            raise RuntimeError(
                f"autochunk: region {name} is not registered in this process; the compiled "
                "function it belongs to was not compiled here or no longer exists"
            )
        loops.append(loop)
        places.append(tuple(int(n) for n in numbers.split(",") if n))
    return Group(tuple(loops), tuple(places), inputs)


def gradient_positions(key: str) -> tuple[list[int], list[int]]:
    """Positions among a group's rows and shared inputs of those that its gradients are of."""
    return _group(key).gradient_positions()


def alone(loop: Loop) -> Group:
    """A group of one region."""
    return Group((loop,), (tuple(range(len(loop.spec.shared_grads))),))


def run_group(
    group: Group,
    kernel: str,
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    gradients: bool = True,
) -> list[Tensor]:
    """Runs each region of a group.

    Args:
        kernel: Which kernel of the loops, an attribute of :class:`Loop`.
        rows, shared, cotangents: Of the regions, one after the other; see :func:`run_loop`.
        gradients: Whether to make the gradients that the kernel has.

    Returns:
        The outputs (if the kernel has them), then row gradients, then shared gradients.
    """
    kernels: list[Kernel] = [getattr(loop, kernel) for loop in group.loops]
    parts = group.split(rows, shared, cotangents)
    terms = [0] * len(group.sums)
    for loop, run, part, places in zip(group.loops, kernels, parts, group.places, strict=True):
        _, starts = _chunks(part[0][0].shape[0], loop.spec.chunk_rows, run.symbolic)
        for gradient, place in zip(run.shared_grads, places, strict=False):
            terms[place] += len(starts) * len(gradient)
    sums = [
        _Sum(group.loops[n].spec.shared[i], count, group.loops[n].accumulate)
        for (n, i), count in zip(group.sums, terms, strict=True)
        if gradients and kernels[n].shared_grads
    ]
    outputs: list[Tensor] = []
    row_grads: list[Tensor] = []
    for loop, run, part, places in zip(group.loops, kernels, parts, group.places, strict=True):
        found = run_loop(loop, run, *part, [sums[i] for i in places] if sums else [], gradients)
        outputs += found[0]
        row_grads += found[1]
    return [*outputs, *row_grads, *(s.finish() for s in sums)]


def run_loop(
    loop: Loop,
    kernel: Kernel,
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    sums: Sequence[_Sum],
    gradients: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs a kernel chunk by chunk.

    Chunks are near-equal and all of one size: the last one begins early enough to be whole, and
    the cotangents of rows it shares with the one before are zero.

    Args:
        rows: ``[R, *features]`` each.
        shared: Passed whole to each chunk.
        cotangents: ``[R, *features]`` for each differentiable output.
        sums: Of the shared gradients, where the kernel has them and they are wanted.
        gradients: Whether row gradients are wanted.

    Returns:
        The outputs (if the kernel has them) and the row gradients.
    """
    spec = loop.spec
    total = rows[0].shape[0]
    check_indices(loop, rows, shared)
    rows = [r.contiguous() for r in rows]
    cotangents = [c.contiguous() for c in cotangents]
    shared = [_as_expected(t, s) for t, s in zip(shared, spec.shared, strict=True)]
    size, starts = _chunks(total, spec.chunk_rows, kernel.symbolic)
    outputs = [_empty(total, s) for s in spec.outputs[: kernel.values]]
    wanted = kernel.row_grads if gradients else ()
    row_grads = [_empty(total, spec.rows[i]) for i in spec.row_grads if wanted]
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
        for out, gradient in zip(row_grads, wanted, strict=True):
            _write_rows(out[done:end], gradient, at_hand, fresh, size)
        for shared_sum, gradient in zip(sums, kernel.shared_grads, strict=False):
            shared_sum.add(gradient, at_hand)
        del results, at_hand
        done = end
    return outputs, row_grads


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
    """A shared gradient, summed over chunks (and regions) in place."""

    def __init__(self, like: TensorSpec, terms: int, requested: torch.dtype | None) -> None:
        self.like = like
        self.dtype = accumulate_dtype(like.dtype, terms, requested)
        self.out: Tensor | None = None
        self.product: Tensor | None = None  # of a tile

    def add(self, gradient: Gradient, at_hand: Mapping[str, Sequence[Tensor]]) -> None:
        for term in gradient:
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


@torch.library.custom_op(
    "autochunk::fused",
    mutates_args=(),
    schema="(Tensor[] rows, Tensor[] shared, Tensor[] cotangents, str key) -> Tensor[]",
)
def fused(
    rows: list[Tensor], shared: list[Tensor], cotangents: list[Tensor], key: str
) -> list[Tensor]:
    """Outputs, row gradients and shared gradients of regions, in one pass."""
    return run_group(_group(key), "full_kernel", rows, shared, cotangents)


@torch.library.custom_op(
    "autochunk::forward",
    mutates_args=(),
    schema="(Tensor[] rows, Tensor[] shared, str key) -> Tensor[]",
)
def forward(rows: list[Tensor], shared: list[Tensor], key: str) -> list[Tensor]:
    """Outputs of regions."""
    return run_group(_group(key), "value_kernel", rows, shared, (), gradients=False)


@torch.library.custom_op(
    "autochunk::backward",
    mutates_args=(),
    schema="(Tensor[] rows, Tensor[] shared, Tensor[] cotangents, str key) -> Tensor[]",
)
def backward(
    rows: list[Tensor], shared: list[Tensor], cotangents: list[Tensor], key: str
) -> list[Tensor]:
    """Row gradients and shared gradients of regions, each chunk recomputed."""
    return run_group(_group(key), "grad_kernel", rows, shared, cotangents)


@torch.library.custom_op(
    "autochunk::attach",
    mutates_args=(),
    schema="(Tensor loss, Tensor[] inputs, Tensor[] gradients) -> Tensor",
)
def attach(loss: Tensor, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """``loss``, with known gradients with respect to ``inputs``."""
    return loss.clone()


@torch.library.custom_op(
    "autochunk::fused_kept",
    mutates_args=(),
    schema="(Tensor[] rows, Tensor[] shared, Tensor[] cotangents, str key) -> Tensor[]",
)
def fused_kept(
    rows: list[Tensor], shared: list[Tensor], cotangents: list[Tensor], key: str
) -> list[Tensor]:
    """Outputs of regions, and a ticket for their gradients."""
    group = _group(key)
    ticket = open_ticket(
        key,
        memory={shared[i].untyped_storage().data_ptr() for i in group.gradient_positions()[1]}
        if group.inputs
        else {key},
        is_larger=_gradient_bytes(group, rows) > _logits_bytes(group, rows),
    )
    found = run_group(group, "full_kernel", rows, shared, cotangents, gradients=ticket.early)
    ticket.gradients = found[group.n_outputs :] if ticket.early else None
    return [*found[: group.n_outputs], ticket.as_tensor()]


@torch.library.custom_op(
    "autochunk::attach_kept",
    mutates_args=(),
    schema="(Tensor loss, Tensor[] rows, Tensor[] shared, Tensor[] cotangents, Tensor ticket, "
    "str key) -> Tensor",
)
def attach_kept(
    loss: Tensor,
    rows: list[Tensor],
    shared: list[Tensor],
    cotangents: list[Tensor],
    ticket: Tensor,
    key: str,
) -> Tensor:
    """``loss``, with the gradients that ``ticket`` stands for."""
    return loss.clone()


@torch.library.custom_op(
    "autochunk::settle",
    mutates_args=(),
    schema="(Tensor upstream, Tensor[] rows, Tensor[] shared, Tensor[] cotangents, "
    "Tensor ticket, str key) -> Tensor[]",
)
def settle(
    upstream: Tensor,
    rows: list[Tensor],
    shared: list[Tensor],
    cotangents: list[Tensor],
    ticket: Tensor,
    key: str,
) -> list[Tensor]:
    """Row gradients and shared gradients of regions: those kept, or computed now."""
    again = torch._C._autograd._get_current_graph_task_keep_graph()
    kept = take(int(ticket), again)
    if kept is not None:
        return [_scaled(gradient, upstream, in_place=not again) for gradient in kept]
    group = _group(key)
    weights = [_scaled(c, upstream, in_place=False) for c in cotangents]
    return run_group(group, "full_kernel", rows, shared, weights)[group.n_outputs :]


def _scaled(t: Tensor, upstream: Tensor, in_place: bool) -> Tensor:
    """``t`` × ``upstream``, multiplied in float32 at least and rounded once."""
    out = t if in_place else t.clone(memory_format=torch.preserve_format)
    if upstream.device.type == "cpu" and upstream.item() == 1:
        return out
    factor = upstream.reshape(()).to(torch.promote_types(t.dtype, torch.float32))
    if factor.dtype == t.dtype:
        return out.mul_(factor)
    flat = out.view(-1) if out.is_contiguous() else out
    for tile in flat.split(_TILE_SIZE_CUDA if out.is_cuda else _TILE_SIZE):
        tile.copy_(tile.to(factor.dtype) * factor)
    return out


def _gradient_bytes(group: Group, rows: Sequence[Tensor]) -> int:
    positions, _ = group.gradient_positions()
    return sum(rows[i].nbytes for i in positions) + sum(
        prod(spec.sizes) * spec.dtype.itemsize for spec in group.sum_specs
    )


def _logits_bytes(group: Group, rows: Sequence[Tensor]) -> int:
    """What an unchunked model would keep from forward to backward, at least."""
    parts = group.split(rows, (), ())
    return sum(
        part[0][0].shape[0] * head.features * head.dtype.itemsize
        for loop, part in zip(group.loops, parts, strict=True)
        if loop.full_kernel is not None
        for head in loop.full_kernel.heads
    )


def _fake_outputs(group: Group, rows: list[Tensor]) -> list[Tensor]:
    return [
        torch.empty((part[0][0].shape[0], *s.sizes), dtype=s.dtype, device=s.device)
        for loop, part in zip(group.loops, group.split(rows, (), ()), strict=True)
        for s in loop.spec.outputs
    ]


def _fake_gradients(group: Group, rows: list[Tensor]) -> list[Tensor]:
    positions, _ = group.gradient_positions()
    device = group.loops[0].spec.device
    return [
        *(
            torch.empty(rows[i].shape, dtype=rows[i].dtype, device=rows[i].device)
            for i in positions
        ),
        *(torch.empty(s.sizes, dtype=s.dtype, device=device) for s in group.sum_specs),
    ]


@fused.register_fake
def _(rows: list[Tensor], shared: list[Tensor], cotangents: list[Tensor], key: str) -> list[Tensor]:
    group = _group(key)
    return [*_fake_outputs(group, rows), *_fake_gradients(group, rows)]


@forward.register_fake
def _(rows: list[Tensor], shared: list[Tensor], key: str) -> list[Tensor]:
    return _fake_outputs(_group(key), rows)


@backward.register_fake
def _(rows: list[Tensor], shared: list[Tensor], cotangents: list[Tensor], key: str) -> list[Tensor]:
    return _fake_gradients(_group(key), rows)


@fused_kept.register_fake
def _(rows: list[Tensor], shared: list[Tensor], cotangents: list[Tensor], key: str) -> list[Tensor]:
    ticket = torch.empty((1,), dtype=torch.int64, device="cpu")
    return [*_fake_outputs(_group(key), rows), ticket]


@settle.register_fake
def _(
    upstream: Tensor,
    rows: list[Tensor],
    shared: list[Tensor],
    cotangents: list[Tensor],
    ticket: Tensor,
    key: str,
) -> list[Tensor]:
    return _fake_gradients(_group(key), rows)


@attach_kept.register_fake
def _(
    loss: Tensor,
    rows: list[Tensor],
    shared: list[Tensor],
    cotangents: list[Tensor],
    ticket: Tensor,
    key: str,
) -> Tensor:
    return torch.empty_like(loss)


@attach.register_fake
def _(loss: Tensor, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    return torch.empty_like(loss)


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    rows, shared, key = inputs
    ctx.save_for_backward(*rows, *shared)
    ctx.n_rows, ctx.key = len(rows), key
    ctx.meta = [(o.shape, o.dtype, o.device) for o in output]


def _forward_backward(ctx: Any, grads: list[Tensor | None]) -> Any:
    group = _group(ctx.key)
    rows, shared = ctx.saved_tensors[: ctx.n_rows], ctx.saved_tensors[ctx.n_rows :]
    cotangents = []
    begin = 0
    for loop in group.loops:
        for i in loop.spec.grad_outputs:
            shape, dtype, device = ctx.meta[begin + i]
            grad = grads[begin + i]
            zeros = grad is None
            cotangents.append(torch.zeros(shape, dtype=dtype, device=device) if zeros else grad)
        begin += len(loop.spec.outputs)
    found = backward(list(rows), list(shared), cotangents, ctx.key)
    return *_by_input(group, found, len(rows), len(shared)), None


def _by_input(
    group: Group, found: Sequence[Tensor], n_rows: int, n_shared: int
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients as autograd wants them: one for each input, or None."""
    row_grads: list[Tensor | None] = [None] * n_rows
    shared_grads: list[Tensor | None] = [None] * n_shared
    rows, shared = group.gradient_positions()
    for i, grad in zip(rows, found[: len(rows)], strict=True):
        row_grads[i] = grad
    for i, grad in zip(shared, found[len(rows) :], strict=True):
        shared_grads[i] = grad
    return row_grads, shared_grads


def _attach_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, given, gradients = inputs
    ctx.save_for_backward(*gradients)
    ctx.n = len(given)


def _attach_backward(ctx: Any, grad: Tensor) -> Any:
    _refuse_double_backward()
    upstream = grad.reshape(())
    scaled = [
        g * upstream.to(torch.promote_types(g.dtype, torch.float32)) for g in ctx.saved_tensors
    ]
    scaled = [s.to(g.dtype) for s, g in zip(scaled, ctx.saved_tensors, strict=True)]
    return grad, scaled, [None] * ctx.n


def _attach_kept_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, rows, shared, cotangents, ticket, key = inputs
    ctx.save_for_backward(*rows, *shared, *cotangents, ticket)
    ctx.counts, ctx.key = (len(rows), len(shared), len(cotangents)), key


def _attach_kept_backward(ctx: Any, grad: Tensor) -> Any:
    _refuse_double_backward()
    n_rows, n_shared, n_cotangents = ctx.counts
    *saved, ticket = ctx.saved_tensors
    rows, shared = saved[:n_rows], saved[n_rows : n_rows + n_shared]
    found = settle(grad, rows, shared, saved[n_rows + n_shared :], ticket, ctx.key)
    gradients = _by_input(_group(ctx.key), found, n_rows, n_shared)
    return grad, *gradients, [None] * n_cotangents, None, None


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "autochunk: double backward is not supported: the gradients of a chunked head are "
            "computed in its forward pass, and how they depend on its inputs is not recorded"
        )


forward.register_autograd(_forward_backward, setup_context=_forward_context)
attach.register_autograd(_attach_backward, setup_context=_attach_context)
attach_kept.register_autograd(_attach_kept_backward, setup_context=_attach_kept_context)
