"""Kept: deferred tensors without a gradient, computed before an optimizer changes their inputs.

    self.last = z.detach()  # in a forward pass, for a log that is written after the step

Nobody detaches logits, or makes them under ``no_grad``, and keeps them over an optimizer's step,
unless their values are wanted. Logits that have a gradient are left alone: a model's outputs are
alive at most steps, and nobody looks at them any more.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

LOG = logging.getLogger("autochunk.deferred")


class Token:
    """What a deferred tensor holds while its value may have to be computed before a step."""

    def __init__(self, formula: Any) -> None:
        self.formula = formula


_tokens: weakref.WeakSet[Token] = weakref.WeakSet()


def remember(formula: Any) -> Token:
    """Has a value computed before its inputs change, as long as somebody holds the token."""
    _hook_optimizers()
    token = Token(formula)
    _tokens.add(token)
    return token


@functools.cache
def _hook_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)


@torch.compiler.disable
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    """Computes what depends on the optimizer's parameters, at once and after each closure."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    _compute(parameters)
    # The pass that a closure runs is followed by changes, too.
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        return None

    @functools.wraps(closure)
    def then_compute() -> Any:
        loss = closure()
        _compute(parameters)
        return loss

    if len(args) > 1:
        return (args[0], then_compute, *args[2:]), kwargs
    return args, {**kwargs, "closure": then_compute}


def _compute(parameters: Sequence[Tensor]) -> None:
    formulas = [token.formula for token in list(_tokens)]
    waiting = [f for f in formulas if not f.filled and f.kept is None and f.is_fresh()]
    changed = _storages(parameters) if waiting else set()
    for formula in waiting:
        if not changed.isdisjoint(_storages(formula.root.tensors)):
            formula.kept = formula.compute()
            shape = list(formula.kept.shape)
            LOG.info("logits of shape %s are kept over an optimizer's step: computed", shape)


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}
