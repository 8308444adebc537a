"""Copies: what a backward pass needs of memory that the graph writes to.

    loss = F.cross_entropy(F.linear(x, w), y)
    x.add_(1)                                   # x is an input of the graph

AOTAutograd takes for granted that the backward pass may compute anything again from the graph's
inputs, also where the graph has written to them by then (torch 2.13; ``x.clone()`` does not help).
An op that it knows nothing about is never computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("autochunk::copy_of", mutates_args=(), schema="(Tensor value) -> Tensor")
def copy_of(value: Tensor) -> Tensor:
    """A copy of a tensor, made in the forward pass."""
    return value.clone()


@copy_of.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad


copy_of.register_autograd(_backward, setup_context=_no_context)
