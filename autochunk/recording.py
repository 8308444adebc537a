"""Recording: ops on deferred logits are remembered until a narrow result is asked for.

    logits = compiled_model(x)                                 # deferred
    loss = F.cross_entropy(logits.view(-1, V), y.view(-1))     # view: recorded; the loss: evaluated

A functional op on deferred tensors whose result is as wide as the logits gives a deferred tensor,
with the op as its step. An op with a narrow result is *evaluated*: the formula of the logits, the
steps and the op become the source of one function, which is compiled with this backend, where the
head is chunked as if the model itself had returned the loss. What cannot be is computed from the
values instead, and :func:`events` says so.

Autograd sees two ways from an evaluated result to the inputs of the formula. Normally the gradient
goes there at once, as the chunked region computes it. If the logits themselves have been looked at
by then (their gradient may be asked for, a hook may want it), it goes through them, as in eager
PyTorch.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from autochunk import deferred
from autochunk.deferred import DeferredTensor, Formula, make
from autochunk.evaluation import evaluate
from autochunk.metadata import Meta, metadata_of
from autochunk.report import mebibytes
from autochunk.steps import (
    StepFormula,
    dims_indexed,
    is_intercepted,
    is_open,
    record,
    user_line,
)
from autochunk.types import NARROW

LOG = logging.getLogger("autochunk.deferred")

#: Functional methods of a tensor, and functions of these names in ``torch``.
_NAMES = """
    abs add all amax amin any argmax argmin argsort bfloat16 cat ceil clamp clamp_max
    clamp_min clip clone concat contiguous cos count_nonzero cumprod cumsum detach div divide
    double einsum eq erf exp expand_as expm1 flatten flip float floor fmod gather ge greater
    greater_equal gt half index_select isfinite isinf isnan kthvalue le less less_equal log
    log1p log2 log_softmax logaddexp logcumsumexp logical_and logical_not logical_or logsumexp
    lt masked_fill matmul max maximum mean median min minimum mm mode movedim mul multiply mv
    nan_to_num nanmean nansum narrow ne neg norm not_equal permute positive pow prod
    reciprocal relu remainder reshape roll round rsqrt rsub scatter scatter_add select sigmoid
    sign sin softmax sort sqrt square squeeze stack std std_mean sub subtract sum swapaxes t
    take_along_dim tanh to topk transpose true_divide type_as unflatten unsqueeze var var_mean
    view view_as where xlogy
""".split()  # noqa: SIM905
_OPERATORS = {
    "__getitem__": operator.getitem,
    "__rsub__": lambda a, b: b - a,
    "__rdiv__": lambda a, b: b / a,
    "__rpow__": lambda a, b: b**a,
    "__eq__": operator.eq,
    "__ne__": operator.ne,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__invert__": operator.invert,
    "__pow__": operator.pow,
    "__matmul__": operator.matmul,
}
_FUNCTIONS = [
    F.binary_cross_entropy_with_logits,
    F.cosine_similarity,
    F.cross_entropy,
    F.gelu,
    F.hardtanh,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.linear,
    F.log_softmax,
    F.logsigmoid,
    F.mse_loss,
    F.multi_margin_loss,
    F.nll_loss,
    F.relu,
    F.silu,
    F.smooth_l1_loss,
    F.softmax,
    F.softplus,
    F.softmin,
    torch.special.entr,
]

#: How a function that ``__torch_function__`` is told of is written in a program.
_SPELLINGS: dict[Any, Any] = {}
for _name in _NAMES:
    _method = getattr(Tensor, _name, None)
    if _method is not None:
        _SPELLINGS[_method] = _name
    if hasattr(torch, _name):
        _SPELLINGS[getattr(torch, _name)] = getattr(torch, _name)
for _name, _function in _OPERATORS.items():
    _SPELLINGS[getattr(Tensor, _name)] = _function
for _function in _FUNCTIONS:
    _SPELLINGS[_function] = _function

#: What needs the shape only.
_LIKE = {torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like}
_LIKE |= {torch.randn_like, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty}
_LIKE |= {Tensor.new_tensor}


def handle(func: Any, args: Any, kwargs: Any) -> Any:
    """Records or evaluates an op on deferred tensors; ``NotImplemented`` where neither is done."""
    result = _record(func, args, kwargs)
    if result is NotImplemented and LOG.isEnabledFor(logging.INFO):
        leaves = pytree.tree_leaves((args, kwargs))
        opened = [x for x in leaves if type(x) is DeferredTensor and not x._formula.seen]
        for root in dict.fromkeys(x._formula.root for x in opened):
            name, size = getattr(func, "__name__", str(func)), root.numel * root.dtype.itemsize
            shape = "×".join(map(str, root.shape))
            line = user_line()
            LOG.info("%s:%s: %s computes logits, %s, %s", *line, name, shape, mebibytes(size))
    return result


def _record(func: Any, args: Any, kwargs: Any) -> Any:
    if func in _LIKE and type(args[0]) is DeferredTensor and not is_intercepted():
        x = args[0]
        stand_in = torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape)
        return func(stand_in, *args[1:], **kwargs)
    if func in _PIECES:
        return _PIECES[func](*args, **kwargs)
    if func not in _SPELLINGS or is_intercepted() or _writes(kwargs):
        return NotImplemented
    if func is Tensor.__getitem__:
        args = _positions_of_masks(*args)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    deferred_leaves = [leaf for leaf in leaves if type(leaf) is DeferredTensor]
    if not deferred_leaves or not all(map(_is_usable, leaves)):
        return NotImplemented
    if not all(map(is_open, deferred_leaves)):
        return NotImplemented
    step = record(func, _SPELLINGS[func], leaves, spec)
    root = step.root
    try:
        shown = metadata_of(step)
    except _ERRORS_OF_OPS:  # the user's: it is raised again by the op on the values
        return NotImplemented
    if shown.returned is not None:
        return leaves[shown.returned]
    tensors = shown.tensors
    if not tensors or any(t.device != deferred_leaves[0].device for t in tensors):
        return NotImplemented
    if not any(_is_wide(t, root) for t in tensors):
        return evaluate(step, root.compiler, any(t.requires_grad for t in tensors))
    if not shown.is_single:
        return NotImplemented
    (one,) = tensors
    formula = StepFormula(step, root, one.requires_grad, shown.is_view)
    return make(formula, one.shape, one.strides, one, one.requires_grad)


#: What PyTorch raises for arguments that do not fit.
_ERRORS_OF_OPS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


def _writes(kwargs: Any) -> bool:
    return kwargs.get("out") is not None or bool(kwargs.get("inplace"))


_CONSTANTS: tuple[Any, ...] = (
    *(bool, int, float, str, type(None), type(Ellipsis)),
    *(torch.Size, torch.device, torch.dtype, torch.memory_format, torch.layout),
)


def _is_usable(leaf: Any) -> bool:
    if isinstance(leaf, slice):
        return all(isinstance(x, int | None) for x in (leaf.start, leaf.stop, leaf.step))
    if isinstance(leaf, Tensor):
        return type(leaf) in (Tensor, torch.nn.Parameter, DeferredTensor)
    return isinstance(leaf, _CONSTANTS)


def _is_wide(tensor: Meta, root: Formula) -> bool:
    return prod(tensor.shape) * NARROW > root.numel or root.features in tensor.shape


def _positions_of_masks(x: Any, index: Any) -> tuple[Any, Any]:
    """``logits[mask]`` → ``logits[mask.nonzero(as_tuple=True)]``: the number of rows is known."""
    items = index if isinstance(index, tuple) else (index,)
    masks = [type(i) is Tensor and i.dtype == torch.bool and i.dim() > 0 for i in items]
    if type(x) is not DeferredTensor or not any(masks):
        return x, index
    found: list[Any] = []
    for item, is_mask, dim in zip(items, masks, dims_indexed(x.dim(), items), strict=True):
        if is_mask and item.shape != x.shape[dim : dim + item.dim()]:
            return x, index  # PyTorch's error
        found += item.nonzero(as_tuple=True) if is_mask else [item]
    return x, tuple(found)


def _pieces(whole: Callable[..., Sequence[Any]]) -> Callable[..., Any]:
    """A function that cuts a tensor, from one that gives the indices of its pieces."""

    def cut(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else None
        if type(x) is not DeferredTensor or is_intercepted() or not is_open(x) or x.dim() < 2:
            return NotImplemented
        try:
            indices = whole(x.shape, *args[1:], **kwargs)
        except (TypeError, IndexError, ValueError, ZeroDivisionError):
            return NotImplemented  # the user's error: PyTorch raises it
        return tuple(x[index] for index in indices)

    return cut


def _along(shape: Sequence[int], dim: int) -> tuple[Any, ...]:
    """What comes before the index of a dimension."""
    return (slice(None),) * (range(len(shape))[dim])


def _unbound(shape: Sequence[int], dim: int = 0) -> list[Any]:
    if range(len(shape))[dim] == len(shape) - 1:
        raise ValueError("one piece for each feature")
    return [(*_along(shape, dim), i) for i in range(shape[dim])]


def _split(
    shape: Sequence[int], split_size: Any = None, dim: int = 0, split_size_or_sections: Any = None
) -> list[Any]:
    sizes = split_size_or_sections if split_size is None else split_size
    if isinstance(sizes, int):
        sizes = [sizes] * (shape[dim] // sizes) + [shape[dim] % sizes] * (shape[dim] % sizes > 0)
    ends = list(itertools.accumulate(sizes))
    if not sizes or min(sizes) < 0 or ends[-1] != shape[dim]:
        raise ValueError("sizes do not add up")
    before = _along(shape, dim)
    return [(*before, slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def _chunks(shape: Sequence[int], chunks: int, dim: int = 0) -> list[Any]:
    return _split(shape, -(-shape[dim] // chunks), dim)


_PIECES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys([Tensor.unbind, torch.unbind], _pieces(_unbound)),
    **dict.fromkeys([Tensor.split, torch.split, torch.functional.split], _pieces(_split)),
    **dict.fromkeys([Tensor.chunk, torch.chunk], _pieces(_chunks)),
}


def _iterate(x: Any) -> Any:
    pieces = _PIECES[Tensor.unbind](x)
    return pieces if pieces is NotImplemented else iter(pieces)


def _broadcast(*tensors: Any) -> Any:
    if is_intercepted() or not all(isinstance(t, Tensor) for t in tensors):
        return NotImplemented
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    except RuntimeError:
        return NotImplemented  # the user's error: PyTorch raises it
    return tuple(t if t.shape == shape else t.expand(shape) for t in tensors)


_PIECES[Tensor.__iter__] = _iterate
_PIECES[torch.broadcast_tensors] = _PIECES[torch.functional.broadcast_tensors] = _broadcast


deferred.on_use = handle
