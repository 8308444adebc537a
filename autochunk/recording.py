"""Recording: ops on deferred logits are remembered until a narrow result is asked for.

    logits = compiled_model(x)                                 # deferred
    loss = F.cross_entropy(logits.view(-1, V), y.view(-1))     # view: recorded; the loss: evaluated

A functional op on deferred tensors whose result is as wide as the logits gives a deferred tensor,
with the op as its step. An op with a narrow result is *evaluated*: the formula of the logits, the
steps and the op become the source of one function, which is compiled with this backend, where the
head is chunked as if the model itself had returned the loss. What cannot be is computed from the
values instead, and :func:`events` says so. A narrow *view* (``logits[:, 3]``) is recorded, for it
may be written to; it is evaluated when its numbers are read.

Autograd sees two ways from an evaluated result to the inputs of the formula. Normally the gradient
goes there at once, as the chunked region computes it. If the logits themselves have been looked at
by then (their gradient may be asked for, a hook may want it), it goes through them, as in eager
PyTorch.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from autochunk import deferred
from autochunk.deferred import DeferredTensor, make
from autochunk.evaluation import evaluate
from autochunk.metadata import Shown, is_wide, metadata_of
from autochunk.modes import claimed
from autochunk.report import mebibytes
from autochunk.spelling import part_of, spelling_of
from autochunk.steps import (
    Step,
    StepFormula,
    dims_indexed,
    is_intercepted,
    is_open,
    is_waiting_view,
    record,
    user_line,
)

LOG = logging.getLogger("autochunk.deferred")

#: What needs the shape only.
_LIKE = {torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like}
_LIKE |= {torch.randn_like, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty}
_LIKE |= {Tensor.new_tensor}


def handle(func: Any, args: Any, kwargs: Any) -> Any:
    """Records or evaluates an op on deferred tensors; ``NotImplemented`` where neither is done."""
    result = _record(func, args, kwargs)
    if result is NotImplemented and func in _MOVES:  # to another device
        result = _read(func, args, kwargs)
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
    if func in _READS:
        return _read(func, args, kwargs)
    spelling = spelling_of(func)
    if spelling is None or is_intercepted() or _writes(kwargs):
        return NotImplemented
    if func is Tensor.__getitem__:
        args = _positions_of_masks(*args)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    deferred_leaves = [leaf for leaf in leaves if type(leaf) is DeferredTensor]
    if not deferred_leaves or not all(map(_is_usable, leaves)):
        return NotImplemented
    is_all_open = all(map(is_open, deferred_leaves))
    if not is_all_open and not all(map(is_waiting_view, deferred_leaves)):
        return NotImplemented
    step = record(func, spelling, leaves, spec)
    root = step.root
    try:
        shown = metadata_of(step)
    except _ERRORS_OF_OPS:  # the user's: it is raised again by the op on the values
        return NotImplemented
    if shown.returned is not None:
        return leaves[shown.returned]
    if not is_all_open and not shown.shares_memory:
        return NotImplemented
    if shown.refusal is not None:
        LOG.info("%s:%s: cannot be chunked: %s", *step.line, shown.refusal)
        return NotImplemented
    tensors = shown.tensors
    if not tensors or any(t.device != deferred_leaves[0].device for t in tensors):
        return NotImplemented
    if not shown.shares_memory and not any(is_wide(t.shape, root) for t in tensors):
        wanted = step.grad and any(t.requires_grad for t in tensors)
        found = evaluate(step, root.compiler, wanted)
        return pytree.tree_map(claimed, found) if _claims(step, shown) else found
    if not shown.is_single:
        return _each_result(func, args, kwargs, shown)
    (one,) = tensors
    wanted = one.requires_grad and step.grad
    formula = StepFormula(
        step.with_copies(), root, wanted, shown.shares_memory, _claims(step, shown)
    )
    made = make(formula, one.shape, one.strides, one, wanted)
    if shown.shares_memory:
        for whole in deferred_leaves:
            whole.has_view(made)
    return made


#: Ops that read numbers, of a tensor that nobody can write to by their result.
_READS = {Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__}
_READS |= {Tensor.__format__, Tensor.__index__}
_MOVES = {Tensor.cpu, Tensor.cuda, Tensor.to}


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """Reads a narrow view's numbers without the values of all the logits."""
    x = args[0]
    if type(x) is not DeferredTensor or is_intercepted() or not is_open(x):
        return NotImplemented
    formula = x._formula
    if not isinstance(formula, StepFormula) or is_wide(x.shape, formula.root):
        return NotImplemented
    wanted = func in _MOVES and torch.is_grad_enabled() and x.requires_grad
    value = evaluate(formula.step, formula.root.compiler, wanted)
    return value if value is NotImplemented else func(value, *args[1:], **kwargs)


def _claims(step: Step, shown: Shown) -> bool:
    """Whether results say that they have a gradient, and have none (``modes.py``)."""
    says = any(t.requires_grad for t in shown.tensors)
    if step.grad:
        return step.claims and not says
    return says or (step.claims and shown.is_view)


#: What PyTorch raises for arguments that do not fit.
_ERRORS_OF_OPS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)

#: An op with more results than this is done on the logits' values.
_MOST_RESULTS = 32


def _each_result(func: Any, args: Any, kwargs: Any, shown: Shown) -> Any:
    """Each result of an op that has several, as an op of its own."""
    if shown.spec is None or len(shown.tensors) > _MOST_RESULTS:
        return NotImplemented
    parts = [_record(part_of(func, i), args, kwargs) for i in range(len(shown.tensors))]
    if any(part is NotImplemented for part in parts):
        return NotImplemented
    return pytree.tree_unflatten(parts, shown.spec)


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
        if type(x) is not DeferredTensor or is_intercepted() or x.dim() < 2:
            return NotImplemented
        if not is_open(x) and not is_waiting_view(x):
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
