"""Metadata: what the results of an op on deferred tensors are like, without computing them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autochunk.steps import Step


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
        tensors: Of its results.
        is_single: Whether it has one, not in a tuple.
        is_view: Whether that is a view.
        returned: Position of the leaf that it returns as it is, or None.
    """

    tensors: tuple[Meta, ...]
    is_single: bool
    is_view: bool
    returned: int | None


def metadata_of(step: Step) -> Shown:
    """What the step's results are like. It is remembered, for a bounded number of steps."""
    with torch._C.DisableTorchFunctionSubclass():
        leaves = tuple(map(_described, step.leaves))
    modes = (torch.is_inference_mode_enabled(), torch.get_default_dtype())
    return _shown(step.func, leaves, step.spec, step.grad, step.autocast, step.device, modes)


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
        result = Step(func, "", fakes, spec, (), (), (), grad, autocast, device, ("", 0)).call(
            fakes
        )
    is_single = isinstance(result, Tensor)
    return Shown(
        tensors=tuple(Meta.of(t) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)),
        is_single=is_single,
        is_view=is_single and result._is_view(),
        returned=next((i for i, fake in enumerate(fakes) if result is fake), None),
    )
