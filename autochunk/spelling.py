"""Spelling: which functions may be recorded, and how a program calls them.

Every function of the namespaces below that returns tensors and keeps its hands off its arguments
may be: what PyTorch tells ``__torch_function__`` of is looked up there, so there is no list of
names to fall behind. Whether the rules can lift an op is seen when it is run on fake tensors
(``metadata.py``).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_NAMESPACES = (torch, F, torch.special, torch.linalg, torch.functional, torch._C._nn)

#: Methods that Dynamo is not called with in Python: an expression instead.
_OPERATORS: dict[str, Callable[..., Any]] = {
    "__getitem__": operator.getitem,
    "__rsub__": lambda a, b: b - a,
    "__rdiv__": lambda a, b: b / a,
    "__rpow__": lambda a, b: b**a,
    "__floordiv__": operator.floordiv,
    "__rfloordiv__": lambda a, b: b // a,
    "__rmod__": lambda a, b: b % a,
    "__eq__": operator.eq,
    "__ne__": operator.ne,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "__invert__": operator.invert,
    "__pow__": operator.pow,
    "__matmul__": operator.matmul,
    "__rmatmul__": lambda a, b: b @ a,
}
_SPECIAL: dict[Any, Callable[..., Any]] = {
    getattr(Tensor, name): function for name, function in _OPERATORS.items()
}
_SPECIAL[Tensor.T.__get__] = lambda x: x.T
_SPECIAL[Tensor.mT.__get__] = lambda x: x.mT


@functools.cache
def spelling_of(func: Any) -> str | Callable[..., Any] | None:
    """How a program calls what ``__torch_function__`` was told of.

    Returns:
        The name of a method, or a function; None for what is not recorded: it writes to its
        argument, or is none of PyTorch's public functions.
    """
    if func in _SPECIAL:
        return _SPECIAL[func]
    name = getattr(func, "__name__", "")
    if isinstance(func, Part):
        return func
    if not name or name.startswith("__") or name.endswith("_"):
        return None
    if getattr(Tensor, name, None) == func:
        return str(name)
    return func if func in _public() else None


@functools.cache
def _public() -> frozenset[Any]:
    return frozenset(
        value
        for namespace in _NAMESPACES
        for name, value in vars(namespace).items()
        if callable(value) and not isinstance(value, type) and not name.startswith("_")
    )


class Part:
    """One of the results of a function that returns several, as a function."""

    def __init__(self, func: Any, position: int) -> None:
        self.__name__ = f"{func.__name__}_{position}"
        self._spelling = spelling_of(func)
        self._position = position

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self._spelling, str):
            return getattr(args[0], self._spelling)(*args[1:], **kwargs)[self._position]
        return self._spelling(*args, **kwargs)[self._position]  # type: ignore[misc]


#: The same object for the same part, so that an expression with it is the same program.
part_of = functools.cache(Part)
