"""Metadata: what the results of an op on deferred tensors are like, without computing them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from autochunk.deferred import Formula
from autochunk.lower import is_liftable
from autochunk.steps import Step
from autochunk.types import NARROW


@dataclass(frozen=True)
class Meta:
    """A tensor but for its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(tensor: Tensor) -> Meta:
        t = tensor
        return Meta(tuple(t.shape), tuple(t.stride()), t.dtype, t.device, t.requires_grad)

    def empty(self) -> Tensor:
        made = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        return made.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Shown:
    """What an op's results are like.

    Attributes:
        refusal: Why it cannot be part of a chunk, or None.
        tensors: Of its results.
        spec: What its results are in; None unless it is one tuple of tensors.
        is_single: Whether it has one, not in a tuple.
        is_view: Whether that is a view.
        shares_memory: Whether that is a view, or a detached one, of what was deferred.
        returned: Position of the tensor that it returns as it is, or None.
    """

    tensors: tuple[Meta, ...]
    spec: Any
    is_single: bool
    is_view: bool
    shares_memory: bool
    returned: int | None
    refusal: str | None


def is_wide(shape: Sequence[int], root: Formula) -> bool:
    """Whether a tensor counts as wide beside the logits."""
    return _is_wide(shape, (root.numel, root.features))


def _is_wide(shape: Sequence[int], logits: tuple[int, int]) -> bool:
    numel, features = logits
    return prod(shape) * NARROW > numel or features in shape


def metadata_of(step: Step) -> Shown:
    """What the step's results are like. It is remembered, for a bounded number of steps."""
    with torch._C.DisableTorchFunctionSubclass():
        leaves = tuple(map(_described, step.leaves))
    modes = (torch.is_inference_mode_enabled(), torch.get_default_dtype())
    logits = (step.root.numel, step.root.features)
    about = (step.deferred, logits, step.grad, step.autocast, step.device, modes)
    return _shown(step.func, leaves, step.spec, *about)


def _described(leaf: Any) -> tuple[type, Any]:
    """Something to compare arguments by: equal numbers of different types differ."""
    if isinstance(leaf, Tensor):
        return Tensor, Meta.of(leaf)
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
    deferred: tuple[int, ...],
    logits: tuple[int, int],
    grad: bool,
    autocast: tuple[bool, torch.dtype],
    device: str,
    modes: Any,
) -> Shown:
    def made(kind: type, about: Any) -> Any:
        if kind is Tensor:
            return about.empty()
        return slice(*about) if kind is slice else about

    with _fake_mode():
        fakes = tuple(made(*leaf) for leaf in leaves)
        watch = _Watch(fakes, deferred, logits)
        with watch:
            result = Step(func, "", fakes, spec, (), (), (), grad, autocast, device, ("", 0)).call(
                fakes
            )
    is_single = isinstance(result, Tensor)
    same = [i for i, fake in enumerate(fakes) if is_single and result is fake]
    given = {_memory(fakes[i]) for i in deferred}
    found, form = pytree.tree_flatten(result)
    is_tuple = isinstance(result, (tuple, list)) and all(isinstance(t, Tensor) for t in result)
    return Shown(
        tensors=tuple(Meta.of(t) for t in found if isinstance(t, Tensor)),
        spec=form if is_tuple else None,
        is_single=is_single,
        is_view=is_single and result._is_view(),
        shares_memory=is_single and _memory(result) in given,
        returned=next(iter(same), None),
        refusal=watch.refusal,
    )


class _Watch(TorchDispatchMode):
    """Looks at the ATen ops that a function consists of, run on fake tensors.

    Args:
        leaves: The function's arguments, those at ``deferred`` the logits or made of them.
        logits: Number of elements and of features of the logits.

    Attributes:
        refusal: The first reason why they cannot be part of a chunk, or None.
    """

    def __init__(
        self, leaves: Sequence[Any], deferred: Sequence[int], logits: tuple[int, int]
    ) -> None:
        super().__init__()
        self.refusal: str | None = None
        self._logits = logits
        self._arguments = {_memory(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        self._made_of = [leaves[i] for i in deferred]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # what asks for a tensor's metadata
            return func(*args, **kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        found = [x for x in given if any(x is y for y in self._made_of)]
        if found:
            self._made_of += [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        self.refusal = self.refusal or self._reason(func, args, found)
        return result

    def _reason(self, func: Any, args: Sequence[Any], given: Sequence[Tensor]) -> str | None:
        name = func.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded in func.tags:
            return f"random, {name} draws random numbers"
        written = [
            x for x, spec in zip(args, func._schema.arguments, strict=False) if spec.is_write
        ]
        if any(isinstance(x, Tensor) and _memory(x) in self._arguments for x in written):
            return f"mutation, {name} writes to an argument"
        is_wide = any(_is_wide(x.shape, self._logits) for x in given)
        if is_wide and not func._schema.is_mutable and not is_liftable(func):
            return f"no-rule, {func}"
        return None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
