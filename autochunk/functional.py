"""The functional form: for code that has no model to compile, only a loss to write.

It is the backend applied to one function: the same regions, strategies and kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autochunk.backend import autochunk
from autochunk.config import OptionError, Options
from autochunk.types import RefusedError

__all__ = ["RefusedError", "chunked_linear"]


def chunked_linear(
    function: Callable[..., Any],
    x: Tensor,
    weight: Tensor,
    *tensors: Any,
    bias: Tensor | None = None,
    batch_chunk: int | None = None,
    sequence_chunk: int | None = None,
    **options: Any,
) -> Any:
    """``function(F.linear(x, weight, bias), *tensors)``, without the logits.

    The value and all gradients are those of the plain expression; autograd derives them. The
    function sees logits of the full shape and may reduce them as it likes: to a loss, to numbers
    per row, to several results. It is compiled once for each new function (by its code, so that a
    lambda written in a loop counts once), dtype and layout.

    Inside of a function that is itself compiled this call is a graph break, whatever the backend.
    (With ``backend="autochunk"`` it is not needed there: write the plain expression.)

    Args:
        function: From logits ``[*rows, out_features]`` and ``tensors`` to a result, made of torch
            operations that keep rows apart until numbers per row are left.
        x: Hidden states ``[*rows, in_features]``.
        weight: ``[out_features, in_features]``, in the dtype of ``x``.
        *tensors: Whatever else the function takes: labels, masks, a reference's log-probabilities.
        bias: ``[out_features]``.
        batch_chunk, sequence_chunk: The chunk's size where ``x`` is ``[batch, sequence,
            in_features]``: chunks have ``batch_chunk · sequence_chunk`` rows (all of a dimension
            where its size is not given), taken in the order of memory.
        **options: ``chunk_rows``, ``num_chunks``, ``memory_budget``, ``strategy``,
            ``accumulate_dtype`` and all others of :class:`autochunk.Options`.

    Raises:
        OptionError: for options that are unknown, ill-typed or contradict each other.
        RefusedError: if the function does something that chunks cannot; it names op and line.
        TypeError: if ``function`` cannot be called, or ``x`` or ``weight`` is no tensor.

    Example:
        >>> x, weight = torch.randn(2, 16, 8), torch.randn(512, 8, requires_grad=True)
        >>> labels = torch.randint(0, 512, (2, 16))
        >>> def loss(logits, labels):
        ...     return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        >>> chunked_linear(loss, x, weight, labels, chunk_rows=8).backward()
        >>> weight.grad.shape
        torch.Size([512, 8])
    """
    if not callable(function):
        raise TypeError(f"chunked_linear: function is {function!r}; it must be callable")
    for name, value in (("x", x), ("weight", weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"chunked_linear: {name} is {value!r}; it must be a tensor")
    rows = _chunk_rows(x, batch_chunk, sequence_chunk)
    if rows is not None:
        clash = {"chunk_rows", "num_chunks", "memory_budget"} & options.keys()
        if clash:
            raise OptionError(
                f"chunked_linear: batch_chunk and sequence_chunk say how large a chunk is, and so "
                f"does {clash.pop()}; give one of them"
            )
        options["chunk_rows"] = rows
    Options.parse(options)
    return _call(function, options, x, weight, bias, tensors)


def _chunk_rows(x: Tensor, batch: int | None, sequence: int | None) -> int | None:
    if batch is None and sequence is None:
        return None
    if x.dim() != 3:
        raise OptionError(
            f"chunked_linear: batch_chunk and sequence_chunk need x of [batch, sequence, "
            f"in_features]; it is {list(x.shape)}. Give chunk_rows instead"
        )
    for name, value in (("batch_chunk", batch), ("sequence_chunk", sequence)):
        if value is not None and (type(value) is not int or value < 1):
            raise OptionError(f"chunked_linear: {name} is {value!r}; it must be an int ≥ 1")
    sizes = [min(n or size, size) for n, size in zip((batch, sequence), x.shape[:2], strict=True)]
    return max(sizes[0] * sizes[1], 1)


_COMPILED: dict[tuple[Any, str], Callable[..., Any]] = {}


@torch.compiler.disable(recursive=False)
def _call(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tensors: tuple[Any, ...],
) -> Any:
    # By code, not identity: a lambda is another object each time its line runs.
    key = (getattr(function, "__code__", function), repr(sorted(options.items())))
    if key not in _COMPILED:
        _COMPILED[key] = _compiled(options, len(_COMPILED))
    return _COMPILED[key](function, x, weight, bias, *tensors)


def _compiled(options: Mapping[str, Any], number: int) -> Callable[..., Any]:
    # Dynamo keeps what it compiles per code object, and only so much of it: each function has a
    # code object of its own here.
    def apply(
        function: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Any
    ) -> Any:
        return function(F.linear(x, weight, bias), *tensors)

    apply.__code__ = apply.__code__.replace(co_name=f"chunked_linear_{number}")
    backend = functools.partial(autochunk, options={"min_bytes": 0, **options}, required=True)
    return torch.compile(apply, backend=backend)
