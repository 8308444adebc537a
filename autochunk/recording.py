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

import ast
import contextlib
import functools
import itertools
import logging
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autochunk import deferred
from autochunk.deferred import DeferredTensor, Formula, StaleError, make, no_saved_tensors_hooks
from autochunk.report import mebibytes
from autochunk.types import NARROW, RefusedError

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

#: Their numbers are sizes.
_SIZED = {Tensor.view, Tensor.reshape, Tensor.expand, torch.reshape}
_NARROW = {Tensor.narrow, torch.narrow}

#: What needs the shape only.
_LIKE = {torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like}
_LIKE |= {torch.randn_like, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty}
_LIKE |= {Tensor.new_tensor}


@dataclass(frozen=True, eq=False)
class Step:
    """An op that was recorded.

    Attributes:
        func: As ``__torch_function__`` was told.
        leaves, spec: Its arguments, flattened.
        deferred: Positions of those that were deferred tensors.
        versions: Of the other tensors.
        grad: Whether gradients were on.
        autocast: Of the device, as ``(enabled, dtype)``.
        device: Type of the device.
        line: ``(file, line)`` of the user's code.
    """

    func: Any
    leaves: tuple[Any, ...]
    spec: Any
    deferred: tuple[int, ...]
    versions: tuple[int, ...]
    grad: bool
    autocast: tuple[bool, torch.dtype]
    device: str
    line: tuple[str, int]

    def call(self, leaves: Sequence[Any], grad: bool = True) -> Any:
        """Does it, in the modes of then."""
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with torch.set_grad_enabled(self.grad and grad), self.autocast_then():
            return self.func(*args, **kwargs)

    def autocast_then(self) -> contextlib.AbstractContextManager[Any]:
        enabled, dtype = self.autocast
        return torch.autocast(self.device, dtype=dtype, enabled=enabled)

    def changed(self) -> bool:
        """Whether a tensor was modified in place since, those that were deferred left out."""
        return self.versions != _versions(self.leaves, self.deferred)

    @property
    def tensors(self) -> list[int]:
        """Positions of the tensors."""
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]


class StepFormula:
    """How a recorded value is computed: for what has been told of the wrapper by autograd or C++.

    The interface of :class:`autochunk.deferred.Formula`.

    Attributes:
        root: The formula of the logits it is made of (the largest, of several).
        is_view: Whether the value shares memory with a deferred tensor's.
        filled, seen: As there.
        used: Whether something evaluated leads to the wrapper in the autograd graph.
    """

    def __init__(self, step: Step, root: Formula, requires_grad: bool, is_view: bool) -> None:
        self.step = step
        self.root = root
        self.requires_grad = requires_grad
        self.is_view = is_view
        self.filled = False
        self.seen = False
        self.used = False

    @property
    def tensors(self) -> list[Tensor]:
        return [_edge(self.step.leaves[i]) for i in self.step.tensors]

    def fill(self, plain: Tensor) -> None:
        """Gives ``plain`` its value, once."""
        if not self.filled:
            plain.data = self.compute()
            self.filled = True

    def compute(self) -> Tensor:
        """The value, without its history."""
        self._check()
        with self.root.ambient(), torch.no_grad():
            leaves = [_value(leaf) for leaf in self.step.leaves]
            return self.step.call(leaves, grad=False).detach()

    def ordinary(self, plain: Tensor) -> Tensor:
        """The tensor that the wrapper becomes: with the history that eager PyTorch would give."""
        if self.used:
            self.fill(plain)
            return plain
        self._check()
        leaves = list(self.step.leaves)
        for i in self.step.deferred:
            if type(leaves[i]) is DeferredTensor:
                leaves[i] = leaves[i].materialize()
        with torch.inference_mode(self.root.inference):
            return self.step.call(leaves)

    def _check(self) -> None:
        stale = self.step.changed()
        for i in self.step.deferred:
            parent = self.step.leaves[i]
            modified = type(parent) is not DeferredTensor and parent._version > 0
            stale = stale or (modified and not self.is_view)
        if stale:
            name = getattr(self.step.func, "__name__", str(self.step.func))
            raise StaleError(
                f"autochunk: {name} at {':'.join(map(str, self.step.line))} was deferred, and a "
                "tensor that it reads has since been modified in place, so its value can no "
                "longer be computed; use it before that, or call .materialize() on it"
            )

    def gradients(self, upstream: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Gradients with respect to the ``wanted`` ones of ``tensors``."""
        with _modes_of_backward(self.root):
            return _gradients(self.step, [upstream], wanted)


def _edge(leaf: Tensor) -> Tensor:
    """What stands for a tensor in the autograd graph."""
    return leaf._plain if type(leaf) is DeferredTensor else leaf


def _value(leaf: Any) -> Any:
    """A leaf to compute with; a deferred one's value is not kept."""
    if type(leaf) is not DeferredTensor:
        return leaf.detach() if isinstance(leaf, Tensor) else leaf
    assert leaf._formula is not None
    return leaf._plain.detach() if leaf._formula.filled else leaf._formula.compute()


@contextlib.contextmanager
def _modes_of_backward(root: Formula) -> Iterator[None]:
    create_graph = torch.is_grad_enabled()
    with root.ambient(), torch.set_grad_enabled(create_graph):
        yield


def _gradients(step: Step, upstream: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """Gradients of a step's results with respect to the tensors among its leaves."""
    leaves = list(step.leaves)
    create_graph = torch.is_grad_enabled()
    for i, want in zip(step.tensors, wanted, strict=True):
        if create_graph:
            leaf = leaves[i]
            whole = leaf.materialize() if type(leaf) is DeferredTensor else leaf
            leaves[i] = whole.view_as(whole)
        else:
            leaves[i] = _value(leaves[i]).requires_grad_(want)
    with torch.enable_grad():
        results = step.call(leaves)
    outputs = [o for o in pytree.tree_leaves(results) if isinstance(o, Tensor)]
    pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    inputs = [leaves[i] for i, want in zip(step.tensors, wanted, strict=True) if want]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            inputs,
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if want else None for want in wanted]


# ---- recording -------------------------------------------------------------------------------


def handle(func: Any, args: Any, kwargs: Any) -> Any:
    """Records or evaluates an op on deferred tensors; ``NotImplemented`` where neither is done."""
    result = _record(func, args, kwargs)
    if result is NotImplemented and LOG.isEnabledFor(logging.INFO):
        leaves = pytree.tree_leaves((args, kwargs))
        opened = [x for x in leaves if type(x) is DeferredTensor and not x._formula.seen]
        for root in dict.fromkeys(x._formula.root for x in opened):
            name, size = getattr(func, "__name__", str(func)), root.numel * root.dtype.itemsize
            shape = "×".join(map(str, root.shape))
            line = _user_line()
            LOG.info("%s:%s: %s computes logits, %s, %s", *line, name, shape, mebibytes(size))
    return result


def _record(func: Any, args: Any, kwargs: Any) -> Any:
    if func in _LIKE and type(args[0]) is DeferredTensor and not _is_intercepted():
        x = args[0]
        stand_in = torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape)
        return func(stand_in, *args[1:], **kwargs)
    if func in _PIECES:
        return _PIECES[func](*args, **kwargs)
    if func not in _SPELLINGS or _is_intercepted() or _writes(kwargs):
        return NotImplemented
    if func is Tensor.__getitem__:
        args = _positions_of_masks(*args)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    at = tuple(i for i, leaf in enumerate(leaves) if type(leaf) is DeferredTensor)
    if not at or not all(map(_is_usable, leaves)) or not all(_is_open(leaves[i]) for i in at):
        return NotImplemented
    device = leaves[at[0]].device.type
    step = Step(
        func=func,
        leaves=tuple(leaves),
        spec=spec,
        deferred=at,
        versions=_versions(leaves, at),
        grad=torch.is_grad_enabled(),
        autocast=(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        device=device,
        line=_user_line(),
    )
    root = max((leaves[i]._formula.root for i in at), key=lambda r: r.numel)
    try:
        shown = _metadata(step)
    except Exception:  # the user's error: it is raised again by the op on the values
        return NotImplemented
    if shown.returned is not None:
        return leaves[shown.returned]
    tensors = shown.tensors
    if not tensors or any(t.device != leaves[at[0]].device for t in tensors):
        return NotImplemented
    if not any(_is_wide(t, root) for t in tensors):
        return _evaluate(step, root, any(t.requires_grad for t in tensors))
    if not shown.is_single:
        return NotImplemented
    (one,) = tensors
    formula = StepFormula(step, root, one.requires_grad, shown.is_view)
    return make(formula, one.shape, one.strides, one, one.requires_grad)


def _writes(kwargs: Any) -> bool:
    return kwargs.get("out") is not None or bool(kwargs.get("inplace"))


def _is_intercepted() -> bool:
    """Whether something watches what PyTorch does: it is shown the plain op."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or torch.is_anomaly_enabled()
    )


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


def _is_open(tensor: DeferredTensor) -> bool:
    """Whether a value is not there yet, can be computed, and its gradient interests nobody."""
    formula, plain = tensor._formula, tensor._plain
    if formula is None or formula.filled or formula.seen or tensor.is_shared_with_cpp():
        return False
    if formula.root.inference != torch.is_inference_mode_enabled():
        return False
    if plain._backward_hooks or plain.retains_grad:
        return False
    if isinstance(formula, Formula):
        return formula.compiler is not None and not formula.stale()
    parents = [formula.step.leaves[i] for i in formula.step.deferred]
    return not formula.step.changed() and all(
        type(parent) is DeferredTensor and _is_open(parent) for parent in parents
    )


def _is_wide(tensor: _Meta, root: Formula) -> bool:
    return prod(tensor.shape) * NARROW > root.numel or root.features in tensor.shape


def _versions(leaves: Sequence[Any], deferred: Sequence[int]) -> tuple[int, ...]:
    return tuple(
        0 if leaf.is_inference() else leaf._version
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and i not in deferred
    )


def _positions_of_masks(x: Any, index: Any) -> tuple[Any, Any]:
    """``logits[mask]`` → ``logits[mask.nonzero(as_tuple=True)]``: the number of rows is known."""
    items = index if isinstance(index, tuple) else (index,)
    masks = [type(i) is Tensor and i.dtype == torch.bool and i.dim() > 0 for i in items]
    if type(x) is not DeferredTensor or not any(masks):
        return x, index
    found: list[Any] = []
    for item, is_mask, dim in zip(items, masks, _dims_indexed(x.dim(), items), strict=True):
        if is_mask and item.shape != x.shape[dim : dim + item.dim()]:
            return x, index  # PyTorch's error
        found += item.nonzero(as_tuple=True) if is_mask else [item]
    return x, tuple(found)


def _dims_indexed(n_dims: int, items: Sequence[Any]) -> list[int]:
    """The dimension that each item of an index begins at."""
    taken = [_dims_taken(item) for item in items]
    rest = n_dims - sum(taken)
    widths = [rest if i is Ellipsis else n for i, n in zip(items, taken, strict=True)]
    return list(itertools.accumulate(widths, initial=0))[:-1]


def _pieces(whole: Callable[..., Sequence[Any]]) -> Callable[..., Any]:
    """A function that cuts a tensor, from one that gives the indices of its pieces."""

    def cut(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else None
        if type(x) is not DeferredTensor or _is_intercepted() or not _is_open(x) or x.dim() < 2:
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
    if _is_intercepted() or not all(isinstance(t, Tensor) for t in tensors):
        return NotImplemented
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    except RuntimeError:
        return NotImplemented  # the user's error: PyTorch raises it
    return tuple(t if t.shape == shape else t.expand(shape) for t in tensors)


_PIECES[Tensor.__iter__] = _iterate
_PIECES[torch.broadcast_tensors] = _PIECES[torch.functional.broadcast_tensors] = _broadcast


def _numbers_of(step: Step) -> set[int]:
    """Positions of the leaves that address rows or give sizes, and may change from call to call."""
    x = step.leaves[0]
    features = {step.leaves[i]._formula.root.features for i in step.deferred}
    args, kwargs = pytree.tree_unflatten(range(len(step.leaves)), step.spec)
    if step.func in _SIZED:
        sizes = range(1, len(step.leaves))
        return {i for i in sizes if step.leaves[i] not in features}
    if type(x) is not DeferredTensor:
        return set()
    if step.func in _NARROW:
        named = dict(zip(("input", "dim", "start", "length"), args, strict=False)) | kwargs
        dim = step.leaves[named["dim"]]
        return set() if x.shape[dim] in features else {named["start"], named["length"]}
    return {position for position, _, item in _row_indices(step) if isinstance(item, slice)}


def _row_indices(step: Step) -> list[tuple[int, int, Any]]:
    """Of ``logits[…]`` the slices and numbers of rows: position of the leaf, dimension, leaf."""
    x = step.leaves[0]
    if step.func is not Tensor.__getitem__ or type(x) is not DeferredTensor:
        return []
    args, _ = pytree.tree_unflatten(range(len(step.leaves)), step.spec)
    positions = args[1] if isinstance(args[1], tuple) else (args[1],)
    items = [step.leaves[i] if isinstance(i, int) else i for i in positions]
    dims = _dims_indexed(x.dim(), items)
    return [
        (position, dim, item)
        for position, item, dim in zip(positions, items, dims, strict=True)
        if type(item) in (int, slice) and x.shape[dim] != x._formula.root.features
    ]


def _single_rows(step: Step) -> list[tuple[int, int, Tensor]]:
    """Numbers of rows, ``i`` in ``logits[i]``, as tensors: all turns of a loop are one program."""
    x = step.leaves[0]
    return [
        (position, dim, torch.tensor([item % x.shape[dim]], device=x.device))
        for position, dim, item in _row_indices(step)
        if type(item) is int and x.shape[dim] > 1 and (dim == 0 or abs(item) > 1)
    ]


def _dims_taken(index: Any) -> int:
    """Dimensions of a tensor that are addressed by one of its indices."""
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        return index.dim()
    return 0 if index is None or index is Ellipsis or isinstance(index, bool) else 1


@dataclass(frozen=True)
class _Meta:
    """A tensor but for its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(tensor: Tensor) -> _Meta:
        t = tensor
        return _Meta(tuple(t.shape), tuple(t.stride()), t.dtype, t.device, t.requires_grad)

    def empty(self) -> Tensor:
        made = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        return made.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class _Shown:
    """What an op's results are like.

    Attributes:
        tensors: Of its results.
        is_single: Whether it has one, not in a tuple.
        is_view: Whether that is a view.
        returned: Position of the leaf that it returns as it is, or None.
    """

    tensors: tuple[_Meta, ...]
    is_single: bool
    is_view: bool
    returned: int | None


def _metadata(step: Step) -> _Shown:
    """What the step's results are like. It is remembered, for a bounded number of steps."""
    with torch._C.DisableTorchFunctionSubclass():
        leaves = tuple(map(_described, step.leaves))
    modes = (torch.is_inference_mode_enabled(), torch.get_default_dtype())
    return _shown(step.func, leaves, step.spec, step.grad, step.autocast, step.device, modes)


def _described(leaf: Any) -> tuple[type, Any]:
    """Something to compare arguments by: equal numbers of different types differ."""
    if isinstance(leaf, Tensor):
        return Tensor, _Meta.of(leaf)
    if isinstance(leaf, slice):
        return slice, (leaf.start, leaf.stop, leaf.step)
    return type(leaf), leaf


@functools.cache
def _fake_mode() -> FakeTensorMode:
    mode = FakeTensorMode()
    mode.cache_enabled = False  # it would keep an entry for each new number and shape, for ever
    return mode


@functools.lru_cache(maxsize=256)
def _shown(
    func: Any,
    leaves: tuple[tuple[type, Any], ...],
    spec: Any,
    grad: bool,
    autocast: tuple[bool, torch.dtype],
    device: str,
    modes: Any,
) -> _Shown:
    def made(kind: type, about: Any) -> Any:
        if kind is Tensor:
            return about.empty()
        return slice(*about) if kind is slice else about

    with _fake_mode():
        fakes = tuple(made(*leaf) for leaf in leaves)
        result = Step(func, fakes, spec, (), (), grad, autocast, device, ("", 0)).call(fakes)
    is_single = isinstance(result, Tensor)
    return _Shown(
        tensors=tuple(_Meta.of(t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)),
        is_single=is_single,
        is_view=is_single and result._is_view(),
        returned=next((i for i, fake in enumerate(fakes) if result is fake), None),
    )


def _user_line() -> tuple[str, int]:
    """Where the user's code is: the innermost frame outside of PyTorch and this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("torch.", "autochunk.")) and name != "torch":
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


# ---- evaluation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A compiled expression, and what it is called with.

    Attributes:
        run: Takes the values of ``inputs``.
        others: Tensors that the formulas and the recorded steps read.
        own: Tensors among the arguments of the last op that are not deferred.
        inputs: For each argument ``("other", i)``, ``("own", i)`` or ``("number", value)``.
        formulas: Of all deferred tensors in it.
    """

    run: Callable[..., Any]
    others: tuple[Tensor, ...]
    own: tuple[Tensor, ...]
    inputs: tuple[tuple[str, Any], ...]
    formulas: tuple[Any, ...]

    def call(self, others: Sequence[Tensor], own: Sequence[Tensor]) -> Any:
        values = {"other": others, "own": own}
        args = [v if kind == "number" else values[kind][v] for kind, v in self.inputs]
        return self.run(*args)


class _Writer:
    """Writes an expression as a Python function; equal ones give the same source."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.lines: list[tuple[str, tuple[str, int] | None]] = []
        self.names: dict[str, Any] = {"torch": torch}
        self.key: list[Any] = []
        self.inputs: list[tuple[str, Any]] = []
        self.others: list[Tensor] = []
        self.own: list[Tensor] = []
        self.formulas: list[Any] = []
        self._written: dict[int, str] = {}

    def tensor(self, tensor: Tensor, into: str) -> str:
        known = self.others if into == "other" else self.own
        for i, other in enumerate(known):
            if other is tensor:
                return f"a{self.inputs.index((into, i))}"
        known.append(tensor)
        self.inputs.append((into, len(known) - 1))
        return f"a{len(self.inputs) - 1}"

    def number(self, value: Any) -> str:
        self.inputs.append(("number", value))
        return f"a{len(self.inputs) - 1}"

    def deferred(self, tensor: DeferredTensor) -> str:
        if id(tensor) in self._written:
            return self._written[id(tensor)]
        formula = tensor._formula
        self.formulas.append(formula)
        if isinstance(formula, Formula):
            args = [
                self.tensor(i, "other") if isinstance(i, Tensor) else self.number(i)
                for i in formula.inputs
            ]
            name = f"g{len(self.names)}"
            self.names[name] = formula.graph
            self.key.append((name, id(formula.graph)))
            source, line = f"{name}({', '.join(args)})", None
        else:
            assert isinstance(formula, StepFormula)
            source, line = self.call(formula.step, "other"), formula.step.line
        source = source if formula.requires_grad else f"({source}).detach()"
        result = f"v{len(self.lines)}"
        self.write(f"{result} = {source}", line, getattr(formula, "step", None))
        self._written[id(tensor)] = result
        return result

    def call(self, step: Step, tensors: str) -> str:
        numbers = _numbers_of(step)
        given = list(step.leaves)
        single = _single_rows(step)
        for position, _, _ in single:
            given[position] = 0
        leaves = [
            self.deferred(leaf)
            if type(leaf) is DeferredTensor
            else self.tensor(leaf, tensors)
            if isinstance(leaf, Tensor)
            else self.number(leaf)
            if type(leaf) is float
            else self.constant(leaf, i in numbers)
            for i, leaf in enumerate(given)
        ]
        for _, dim, index in single:
            leaves[0] = f"{leaves[0]}.index_select({dim}, {self.tensor(index, 'other')})"
        args, kwargs = pytree.tree_unflatten([_Source(leaf) for leaf in leaves], step.spec)
        written = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in kwargs.items()]
        spelling = _SPELLINGS[step.func]
        if isinstance(spelling, str):
            return f"{written[0]}.{spelling}({', '.join(written[1:])})"
        name = f"f_{spelling.__name__.strip('_<>')}{id(spelling)}"
        self.names[name] = spelling
        return f"{name}({', '.join(written)})"

    def constant(self, leaf: Any, may_change: bool) -> str:
        if isinstance(leaf, slice) and may_change:
            start, stop = (self.constant(x, True) for x in (leaf.start, leaf.stop))
            return f"slice({start}, {stop}, {leaf.step})"
        if type(leaf) is int and abs(leaf) > 1 and may_change:
            return self.number(leaf) if leaf > 0 else f"-{self.number(-leaf)}"
        if leaf is Ellipsis:
            return "..."
        if isinstance(leaf, torch.Size):
            return repr(tuple(leaf))
        if isinstance(leaf, torch.device):
            return f"torch.{leaf!r}"
        return repr(leaf)

    def write(self, source: str, line: tuple[str, int] | None, step: Step | None) -> None:
        if step is not None and step.autocast[0]:
            dtype = step.autocast[1]
            source = f"with torch.autocast({self.device!r}, dtype={dtype}):\n        {source}"
        self.lines.append((source, line))

    def compile(self, last: Step, compiler: Any) -> Callable[..., Any]:
        """The function, whose lines are where the user's are."""
        args = ", ".join(f"a{i}" for i in range(len(self.inputs)))
        name = f"deferred_logits_{next(_numbers)}"
        text = [f"def {name}({args}):", *(f"    {source}" for source, _ in self.lines)]
        tree = ast.parse("\n".join(text))
        (function,) = tree.body
        assert isinstance(function, ast.FunctionDef)
        file, number = last.line
        for statement, (_, line) in zip(function.body, self.lines, strict=True):
            at = line[1] if line is not None and line[0] == file else number
            for node in ast.walk(statement):
                if isinstance(node, ast.stmt | ast.expr | ast.keyword):
                    node.lineno = node.end_lineno = at
        function.lineno = function.end_lineno = number
        exec(compile(tree, file, "exec"), self.names)
        return torch.compile(self.names[name], backend=compiler, fullgraph=True)


class _Source(str):
    """Source code that is its own ``repr``, so that containers print as code."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class Programs:
    """The compiled expressions of one graph's logits. They live as long as the compiled graph.

    Attributes:
        compiler: Dynamo's compiler function for them.
        made: By their source; None for one that cannot be chunked.
    """

    compiler: Callable[..., Any]
    made: dict[Any, Callable[..., Any] | None] = field(default_factory=dict)


#: Expressions that are compiled before recording is given up: each differs from all others.
_MOST_PROGRAMS = 200


def _evaluate(step: Step, root: Formula, needs_grad: bool) -> Any:
    programs: Programs = root.compiler
    writer = _Writer(step.device)
    result = writer.call(step, "own")
    writer.write(f"r = {result}", step.line, step)
    writer.lines.append(("return r", step.line))
    code = "\n".join(line for line, _ in writer.lines)
    key = (code, tuple(writer.key), len(writer.inputs))
    if key not in programs.made:
        if len(programs.made) >= _MOST_PROGRAMS:
            LOG.info("%s:%s: cannot be chunked: too many different expressions", *step.line)
            return NotImplemented
        programs.made[key] = writer.compile(step, programs.compiler)
    run = programs.made[key]
    if run is None:
        return NotImplemented
    program = Program(
        run=run,
        others=tuple(writer.others),
        own=tuple(writer.own),
        inputs=tuple(writer.inputs),
        formulas=tuple(writer.formulas),
    )
    try:
        results = _run(program, step, needs_grad)
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        LOG.info("%s:%s: cannot be chunked: Dynamo's recompile limit is reached", *step.line)
        return NotImplemented
    except (RefusedError, torch._dynamo.exc.Unsupported) as error:
        programs.made[key] = None
        refusal = getattr(error, "refusal", None)
        reason = (
            f"{refusal.code}, {refusal.detail}" if refusal is not None else type(error).__name__
        )
        LOG.info("%s:%s: cannot be chunked: %s", *step.line, reason)
        return NotImplemented
    return results


def _run(program: Program, step: Step, needs_grad: bool) -> Any:
    if not needs_grad:
        with _alone(program), torch.no_grad():
            return program.call(program.others, program.own)
    tensors = (*program.others, *program.own)
    edges = [_edge(step.leaves[i]) for i in step.deferred]
    kept: list[Any] = []
    outputs = _Evaluated.apply(program, step, kept, len(edges), *edges, *tensors)
    for i in step.deferred:
        formula = step.leaves[i]._formula
        if isinstance(formula, StepFormula):
            formula.used = True
    (spec,) = kept
    return pytree.tree_unflatten(outputs, spec)


@contextlib.contextmanager
def _alone(program: Program) -> Iterator[None]:
    """The modes that a program itself sets are off around it."""
    with torch.autocast(program.formulas[0].root.device, enabled=False), no_saved_tensors_hooks():
        yield


class _Evaluated(torch.autograd.Function):
    """The results of a program, as a function of its tensors and of the deferred ones."""

    @staticmethod
    def forward(
        ctx: Any, program: Program, step: Step, kept: list[Any], n_edges: int, *tensors: Tensor
    ) -> Any:
        tensors = tensors[n_edges:]
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        n = len(program.others)
        with torch.enable_grad(), _alone(program):
            results = program.call(leaves[:n], leaves[n:])
        found, spec = pytree.tree_flatten(results)
        kept.append(spec)
        ctx.program, ctx.step, ctx.n_edges = program, step, n_edges
        ctx.leaves, ctx.results = leaves, found
        ctx.save_for_backward(*tensors)
        outputs = tuple(_fresh(result) for result in found)
        ctx.mark_non_differentiable(
            *(o for o, r in zip(outputs, found, strict=True) if not r.requires_grad)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        _ = ctx.saved_tensors  # raises what eager PyTorch raises if one was modified or freed
        edges, tensors = (
            ctx.needs_input_grad[4 : 4 + ctx.n_edges],
            ctx.needs_input_grad[4 + ctx.n_edges :],
        )
        # Compiled code has no second derivative.
        if torch.is_grad_enabled() or any(formula.seen for formula in ctx.program.formulas):
            return None, None, None, None, *_through_logits(ctx, upstream, edges, tensors)
        pairs = [(r, g) for r, g in zip(ctx.results, upstream, strict=True) if r.requires_grad]
        leaves = [leaf for leaf, want in zip(ctx.leaves, tensors, strict=True) if want]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs],
                leaves,
                [g for _, g in pairs],
                retain_graph=torch._C._autograd._get_current_graph_task_keep_graph(),
                allow_unused=True,
            )
        )
        direct = [next(found) if want else None for want in tensors]
        return None, None, None, None, *[None] * ctx.n_edges, *direct


def _through_logits(
    ctx: Any, upstream: Sequence[Any], edges: Sequence[bool], tensors: Sequence[bool]
) -> list[Any]:
    """Gradients with respect to the deferred tensors, from which they flow on."""
    step, n_others = ctx.step, len(ctx.program.others)
    own = iter(tensors[n_others:])
    wants = {id(t): want for t, want in zip(ctx.program.own, own, strict=False)}
    deferred_wants = iter(edges)
    wanted = [
        next(deferred_wants) if i in step.deferred else wants[id(step.leaves[i])]
        for i in step.tensors
    ]
    with _modes_of_backward(ctx.program.formulas[0].root):
        found = dict(zip(step.tensors, _gradients(step, upstream, wanted), strict=True))
    by_id = {id(step.leaves[i]): g for i, g in found.items() if i not in step.deferred}
    return [
        *(found[i] for i in step.deferred),
        *[None] * n_others,
        *(by_id[id(t)] for t in ctx.program.own),
    ]


def _fresh(result: Tensor) -> Tensor:
    """A result outside of the program's own autograd graph, that may be modified in place."""
    return torch.empty(0, dtype=result.dtype, device=result.device).set_(result.detach())


deferred.on_use = handle
