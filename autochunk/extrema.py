"""Extrema over rows and features: ties between rows share the gradient as the uncut op's do.

An uncut extremum gives each of the C elements that attain it 1/C of the gradient. Cut in two it
would share between the rows first, and within each row afterwards. So the body returns three
numbers a row, along one feature dimension: the row's extremum y (detached), the number c of
elements that attain it, and a term s that is zero in value and has the gradient of their sum.
Outside, s counts for the rows that attain the extremum of all, divided by the sum of their c.

Derivatives are autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten

#: Applies an op: adds a node to a graph, or calls it.
Emit = Callable[..., Any]

#: Numbers a row that the body returns.
PACKED = 3


def packed_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the packed numbers: counts of more than 256 need more than half precision."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def pack(
    emit: Emit, target: Any, x: Any, dims: Sequence[int], dtype: torch.dtype, nan_ties: bool
) -> Any:
    """The body's part, ``[R, *features]`` → the same with ``dims`` one and ``dims[0]`` three.

    Args:
        emit: Applies an op in the body.
        target: ``aten.amax.default`` or ``aten.amin.default``.
        x: The values.
        dims: The feature dimensions that are reduced.
        dtype: Of the result, see :func:`packed_dtype`.
        nan_ties: Whether nan attains an extremum of nan (``max`` and ``min``, not ``amax``).
    """
    fixed = emit(aten.detach.default, x)
    y = emit(target, fixed, dims, True)
    hit = _attains(emit, fixed, y, nan_ties)
    finite = _is_finite(emit, fixed)
    base = emit(aten.masked_fill.Scalar, fixed, emit(aten.logical_not.default, finite), 0.0)
    # Zero where x is finite. A product, so that a gradient of nan reaches every element.
    term = emit(aten.mul.Tensor, emit(aten.sub.Tensor, x, base), hit)
    lost = emit(aten.logical_not.default, emit(aten.logical_or.default, hit, finite))
    term = emit(aten.masked_fill.Scalar, term, lost, 0.0)
    count = emit(aten.sum.dim_IntList, hit, dims, True, dtype=dtype)
    term = emit(aten.sum.dim_IntList, term, dims, True, dtype=dtype)
    return emit(
        aten.cat.default, [emit(aten._to_copy.default, y, dtype=dtype), count, term], dims[0]
    )


def combine(
    emit: Emit,
    target: Any,
    packed: Any,
    along: int,
    dims: Sequence[int],
    keepdim: bool,
    dtype: torch.dtype,
    nan_ties: bool,
) -> Any:
    """The outer part: the extremum of all of :func:`pack`'s rows.

    Args:
        emit: Applies an op outside of the body.
        target, nan_ties: As for :func:`pack`.
        packed: In the user's order of dimensions.
        along: The dimension that holds the three numbers.
        dims: All dimensions that are reduced.
        keepdim: Whether they stay, with size one.
        dtype: Of the result.
    """
    y, count, term = (emit(aten.slice.Tensor, packed, along, i, i + 1) for i in range(PACKED))
    y, count = emit(aten.detach.default, y), emit(aten.detach.default, count)
    extremum = emit(target, y, dims, True)
    tied = _attains(emit, y, extremum, nan_ties)
    total = emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, count, tied), dims, True)
    share = emit(aten.mul.Tensor, term, emit(aten.div.Tensor, tied, total))
    finite = _is_finite(emit, emit(aten.detach.default, term))
    lost = emit(aten.logical_not.default, emit(aten.logical_or.default, tied, finite))
    share = emit(aten.masked_fill.Scalar, share, lost, 0.0)
    share = emit(aten.sum.dim_IntList, share, dims, True)
    out = emit(aten._to_copy.default, emit(aten.add.Tensor, extremum, share), dtype=dtype)
    return out if keepdim else emit(aten.squeeze.dims, out, dims)


def _attains(emit: Emit, x: Any, extremum: Any, nan_ties: bool) -> Any:
    hit = emit(aten.eq.Tensor, x, extremum)
    return emit(aten.logical_or.default, hit, emit(aten.ne.Tensor, x, x)) if nan_ties else hit


def _is_finite(emit: Emit, x: Any) -> Any:
    return emit(aten.lt.Scalar, emit(aten.abs.default, x), float("inf"))
