"""Steps: ops on deferred logits that are remembered, and values that are made of them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from autochunk.deferred import (
    DeferredTensor,
    Formula,
    StaleError,
    has_other_history,
    wanted_gradients,
)

#: What has this part of the logits' elements, or the square in number, is small.
_SMALL = 64


@dataclass(frozen=True, eq=False)
class Step:
    """An op that was recorded.

    Attributes:
        func: As ``__torch_function__`` was told; or a graph.
        spelling: How a program calls it: a method's name, or a function.
        leaves, spec: Its arguments, flattened.
        deferred: Positions of those that were deferred tensors.
        formulas: Of these; they compute the values that the step saw.
        versions: Of the other tensors.
        grad: Whether gradients were on.
        autocast: Of the device, as ``(enabled, dtype)``.
        device: Type of the device.
        line: ``(file, line)`` of the user's code.
        numbers: Types of its arguments that may be other ones in the next step of a training.
        dynamic: Whether its tensors may have other sizes then, as is known already.
        copies: Of the other tensors, by position, where they are small.
    """

    func: Any
    spelling: str | Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: Any
    deferred: tuple[int, ...]
    formulas: tuple[Any, ...]
    versions: tuple[int, ...]
    grad: bool
    autocast: tuple[bool, torch.dtype]
    device: str
    line: tuple[str, int]
    numbers: tuple[type, ...] = (float,)
    dynamic: bool = False
    copies: dict[int, Tensor] = field(default_factory=dict)

    def with_copies(self) -> Step:
        """The step as it is remembered: what it reads may be modified in place later."""
        most = max(self.root.numel // _SMALL, _SMALL**2)
        copies = {
            i: self.leaves[i].detach().clone()
            for i in self.tensors
            if i not in self.deferred and self.leaves[i].numel() <= most
        }
        return dataclasses.replace(self, copies=copies)

    def call(self, leaves: Sequence[Any], grad: bool = True) -> Any:
        """Does it, in the modes of then."""
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with torch.set_grad_enabled(self.grad and grad), self.autocast_then():
            return self.func(*args, **kwargs)

    @property
    def claims(self) -> bool:
        """Whether what it reads says that it has a gradient, and has none (``modes.py``)."""
        return any(formula.claims for formula in self.formulas)

    def autocast_then(self) -> contextlib.AbstractContextManager[Any]:
        enabled, dtype = self.autocast
        return torch.autocast(self.device, dtype=dtype, enabled=enabled)

    def changed(self) -> list[int]:
        """Positions of tensors that were modified in place since, without those deferred then."""
        others = [i for i in self.tensors if i not in self.deferred]
        pairs = zip(others, self.versions, strict=True)
        return [i for i, version in pairs if _version(self.leaves[i]) != version]

    def is_lost(self) -> bool:
        """Whether the value of a tensor that it reads cannot be had any more."""
        return any(i not in self.copies for i in self.changed())

    @property
    def root(self) -> Formula:
        """The formula of the logits it reads (the largest, of several)."""
        roots: list[Formula] = [formula.root for formula in self.formulas]
        return max(roots, key=lambda root: root.numel)

    def originals(self) -> list[Any]:
        """Its arguments as they were, deferred ones in-place edits of which came later included."""
        edited = {
            i: formula.original()
            for i, formula in zip(self.deferred, self.formulas, strict=True)
            if self.is_edited(i)
        }
        known = self.copies | edited
        return [known[i] if i in known else _value(leaf) for i, leaf in enumerate(self.leaves)]

    def is_edited(self, position: int) -> bool:
        """Whether an argument that was deferred, or what it is made of, was modified since."""
        leaf = self.leaves[position]
        if _version(edge(leaf)) > 0:
            return True
        formula = self.formulas[self.deferred.index(position)]
        return isinstance(formula, StepFormula) and formula.step.has_edits()

    def has_edits(self) -> bool:
        """Whether any of those was."""
        return any(map(self.is_edited, self.deferred))

    @property
    def tensors(self) -> list[int]:
        """Positions of the tensors."""
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]


def record(
    func: Any,
    spelling: str | Callable[..., Any],
    leaves: Sequence[Any],
    spec: Any,
    numbers: tuple[type, ...] = (float,),
    dynamic: bool = False,
) -> Step:
    """The step that an op called now would be; some of its ``leaves`` are deferred tensors."""
    at = tuple(i for i, leaf in enumerate(leaves) if type(leaf) is DeferredTensor)
    device = leaves[at[0]].device.type
    return Step(
        func=func,
        spelling=spelling,
        leaves=tuple(leaves),
        spec=spec,
        deferred=at,
        formulas=tuple(leaves[i]._formula for i in at),
        versions=_versions(leaves, at),
        grad=torch.is_grad_enabled(),
        autocast=(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        device=device,
        line=user_line(),
        numbers=numbers,
        dynamic=dynamic,
    )


def _versions(leaves: Sequence[Any], deferred: Sequence[int]) -> tuple[int, ...]:
    others = [leaf for i, leaf in enumerate(leaves) if i not in deferred]
    return tuple(_version(leaf) for leaf in others if isinstance(leaf, Tensor))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def user_line() -> tuple[str, int]:
    """Where the user's code is: the innermost frame outside of PyTorch and this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("torch.", "autochunk.")) and name != "torch":
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


class StepFormula:
    """How a recorded value is computed: for what has been told of the wrapper by autograd or C++.

    The interface of :class:`autochunk.deferred.Formula`.

    Attributes:
        root: The formula of the logits it is made of (the largest, of several).
        is_view: Whether the value shares memory with a deferred tensor's.
        claims: Whether the value says that it has a gradient, and has none.
        filled, seen, kept: As there.
        used: Whether something evaluated leads to the wrapper in the autograd graph.
        wanted: Which of ``tensors`` require a gradient.
    """

    def __init__(
        self, step: Step, root: Formula, requires_grad: bool, is_view: bool, claims: bool
    ) -> None:
        self.step = step
        self.root = root
        self.requires_grad = requires_grad
        self.is_view = is_view
        self.claims = claims
        self.filled = False
        self.seen = False
        self.used = False
        self.kept: Tensor | None = None
        self.wanted = [tensor.requires_grad for tensor in self.tensors]

    @property
    def tensors(self) -> list[Tensor]:
        return [edge(self.step.leaves[i]) for i in self.step.tensors]

    def saved(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Those that must not be modified until the backward pass."""
        pairs = zip(self.step.tensors, tensors, strict=True)
        known = {*self.step.deferred, *self.step.copies}
        return [tensor for i, tensor in pairs if i not in known]

    def fill(self, plain: Tensor) -> None:
        """Gives ``plain`` its value, once."""
        if not self.filled:
            value = self.compute()
            with _disable_current_modes():  # a compiler's own may be on
                plain.data = value
            self.filled = True

    def compute(self) -> Tensor:
        """The value, without its history."""
        if self.kept is not None:
            return self.kept
        return self._called(as_then=not self.is_view)

    def original(self) -> Tensor:
        """The value that it had at first, without its history."""
        return self._called(as_then=True)

    def _called(self, as_then: bool) -> Tensor:
        self._check()
        with self.root.ambient(), torch.no_grad():
            leaves = self.step.originals() if as_then else list(map(_value, self.step.leaves))
            return self.step.call(leaves, grad=False).detach()

    def ordinary(self, plain: Tensor, written: bool) -> Tensor:
        """The tensor that the wrapper becomes: with the history that eager PyTorch would give.

        Args:
            written: Whether it is modified next.
        """
        edited = self.step.has_edits()
        if self.kept is None and self.is_view:  # of the memory of the whole
            wholes = [self.step.leaves[i] for i in self.step.deferred]
            for whole in wholes:
                if type(whole) is DeferredTensor:
                    whole._become(written)
            # A view that is modified, or whose whole is, has PyTorch make its history anew, too.
            anew = edited or written
            has_own = not anew and (self.used or any(type(x) is DeferredTensor for x in wholes))
        else:
            changed = edited or bool(self.step.changed())
            has_own = self.kept is not None or self.used or changed
        if has_own or self._history_changed():
            self.fill(plain)
            return plain
        self._check()
        leaves = list(self.step.leaves)
        for i in self.step.changed():  # of a view: a position, ``z[i]``
            leaves[i] = self.step.copies.get(i, leaves[i])
        for i in self.step.deferred:
            if type(leaves[i]) is DeferredTensor:
                leaves[i] = leaves[i]._become(written)
        with torch.inference_mode(self.root.inference):
            return self.step.call(leaves)

    def _history_changed(self) -> bool:
        """Whether autograd would not record now what it would have recorded then."""
        if not self.step.grad:
            return False
        tensors = [self.step.leaves[i] for i in self.step.tensors]
        wanted = [tensor.requires_grad for tensor in tensors]
        # In PyTorch, too, a view of a tensor follows its ``requires_grad_()``.
        changed = [
            w > now or (w < now and not self.is_view)
            for w, now in zip(self.wanted, wanted, strict=True)
        ]
        return any(changed) or any(map(has_other_history, tensors))

    def is_edited(self) -> bool:
        """Whether what is deferred in its step has been modified since, and the history with it."""
        return self.requires_grad and self.step.has_edits()

    def is_fresh(self) -> bool:
        """Whether no tensor that its value depends on was modified in place since."""
        parents = [self.step.leaves[i] for i in self.step.deferred]
        waiting = [p._formula for p in parents if type(p) is DeferredTensor]
        if self.kept is not None:
            return True
        return not self._is_lost() and all(f.filled or f.is_fresh() for f in waiting)

    def _is_lost(self) -> bool:
        """Whether a value that the step reads cannot be had any more.

        Of a large tensor a view reads the shape (``view_as``).
        """
        return self.step.is_lost() and not self.is_view

    def _check(self) -> None:
        if self._is_lost():
            name = getattr(self.step.func, "__name__", str(self.step.func))
            raise StaleError(
                f"autochunk: {name} at {':'.join(map(str, self.step.line))} was deferred, and a "
                "tensor that it reads has since been modified in place, so its value can no "
                "longer be computed; use it before that, or call .materialize() on it"
            )

    def gradients(self, upstream: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Gradients with respect to the ``wanted`` ones of ``tensors``."""
        with modes_of_backward(self.root):
            return gradients(self.step, [upstream], wanted)


_EDITED = (
    "autochunk: a second derivative of a loss on logits that have been modified in place since, "
    "or what it was made of; modify a clone()"
)


def edge(leaf: Tensor) -> Tensor:
    """What stands for a tensor in the autograd graph."""
    return leaf._plain if type(leaf) is DeferredTensor else leaf


def _value(leaf: Any) -> Any:
    """A leaf to compute with; a deferred one's value is not kept."""
    if type(leaf) is not DeferredTensor:
        return leaf.detach() if isinstance(leaf, Tensor) else leaf
    assert leaf._formula is not None
    return leaf._plain.detach() if leaf._formula.filled else leaf._formula.compute()


@contextlib.contextmanager
def modes_of_backward(root: Formula) -> Iterator[None]:
    create_graph = torch.is_grad_enabled()
    with root.ambient(), torch.set_grad_enabled(create_graph):
        yield


def gradients(step: Step, upstream: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """Gradients of a step's results with respect to the tensors among its leaves."""
    create_graph = torch.is_grad_enabled()
    if create_graph and (step.changed() or step.has_edits()):
        raise RuntimeError(_EDITED)
    leaves = list(step.leaves) if create_graph else step.originals()
    for i, want in zip(step.tensors, wanted, strict=True):
        if create_graph:
            leaf = leaves[i]
            whole = leaf._become(written=False) if type(leaf) is DeferredTensor else leaf
            leaves[i] = whole.view_as(whole)
        else:
            leaves[i] = leaves[i].detach().requires_grad_(want)
    with torch.enable_grad():
        results = step.call(leaves)
    given = [leaves[i] for i in step.tensors]
    flat = pytree.tree_leaves(results)
    return gradients_of(flat, upstream, given, wanted, create_graph=create_graph)


def gradients_of(
    results: Sequence[Any],
    upstream: Sequence[Any],
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    **settings: Any,
) -> list[Tensor | None]:
    """Gradients of those results that have one, with respect to the ``wanted`` ones of tensors.

    Args:
        settings: For :func:`torch.autograd.grad`.
    """
    pairs = [
        (result, grad)
        for result, grad in zip(results, upstream, strict=True)
        if isinstance(result, Tensor) and result.requires_grad
    ]
    outputs, grads = [result for result, _ in pairs], [grad for _, grad in pairs]
    return wanted_gradients(outputs, grads, tensors, wanted, **settings)


def is_intercepted() -> bool:
    """Whether something watches what PyTorch does: it is shown the plain op."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or torch.is_anomaly_enabled()
    )


def is_open(tensor: DeferredTensor) -> bool:
    """Whether a value is not there yet, can be computed, and its gradient interests nobody."""
    formula, plain = tensor._formula, tensor._plain
    if formula is None or formula.filled or formula.seen or formula.kept is not None:
        return False
    if tensor.is_shared_with_cpp():
        return False
    if not tensor.is_own():
        return False
    if formula.root.inference != torch.is_inference_mode_enabled():
        return False
    if plain._backward_hooks or plain.retains_grad:
        return False
    if isinstance(formula, Formula):
        programs = formula.compiler
        return programs is not None and programs.is_usable() and formula.is_fresh()
    parents = [formula.step.leaves[i] for i in formula.step.deferred]
    return not formula.step.changed() and all(
        type(parent) is DeferredTensor and is_open(parent) for parent in parents
    )


def is_waiting_view(tensor: DeferredTensor) -> bool:
    """Whether this view, or one that it is a view of, has been used, and is none to autograd yet.

    Views of it wait, too: which history they have is known when one of them is modified.
    """
    formula = tensor._formula
    if formula is None or not formula.is_view:
        return False
    if formula.root.inference or torch.is_inference_mode_enabled():
        return False
    if not tensor.is_own() or tensor.is_shared_with_cpp():
        return False
    wholes = [formula.step.leaves[i] for i in formula.step.deferred]
    return (
        formula.filled
        or formula.used
        or any(type(whole) is DeferredTensor and is_waiting_view(whole) for whole in wholes)
    )


#: Their numbers are sizes.
_SIZED = {Tensor.view, Tensor.reshape, Tensor.expand, torch.reshape}
_NARROW = {Tensor.narrow, torch.narrow}


def numbers_of(step: Step) -> set[int]:
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
    dims = dims_indexed(x.dim(), items)
    return [
        (position, dim, item)
        for position, item, dim in zip(positions, items, dims, strict=True)
        if type(item) in (int, slice) and x.shape[dim] != x._formula.root.features
    ]


def single_rows(step: Step) -> list[tuple[int, int, Tensor]]:
    """Numbers of rows, ``i`` in ``logits[i]``, as tensors: all turns of a loop are one program.

    Returns:
        For each the position of the leaf, the dimension, and the number.
    """
    x = step.leaves[0]
    return [
        (position, dim, torch.tensor([item % x.shape[dim]], device=x.device))
        for position, dim, item in _row_indices(step)
        if type(item) is int and x.shape[dim] > 1 and (dim == 0 or abs(item) > 1)
    ]


def dims_indexed(n_dims: int, items: Sequence[Any]) -> list[int]:
    """The dimension that each item of an index begins at."""
    taken = [_dims_taken(item) for item in items]
    rest = n_dims - sum(taken)
    widths = [rest if i is Ellipsis else n for i, n in zip(items, taken, strict=True)]
    return list(itertools.accumulate(widths, initial=0))[:-1]


def _dims_taken(index: Any) -> int:
    """Dimensions of a tensor that are addressed by one of its indices."""
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        return index.dim()
    return 0 if index is None or index is Ellipsis or isinstance(index, bool) else 1
