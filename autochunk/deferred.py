"""Deferred logits: a tensor that is computed when somebody uses it.

A model that returns its logits next to its loss gets a :class:`DeferredTensor` in their place.
Metadata (shape, dtype, device, strides) is free. Anything else, by anyone, materialises the value
first, once: a plain tensor with a ``grad_fn``, equal to what the model would have returned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx


class StaleError(RuntimeError):
    """A deferred tensor was used after one of its inputs had been modified in place."""


class DeferredTensor(Tensor):
    """A tensor whose value is computed on first use.

    Attributes of the metadata, ``repr`` of nothing and ``is_deferred`` are free; every other use
    goes to :meth:`materialize`'s result.
    """

    _compute: Callable[[], Tensor] | None
    _value: Tensor | None
    _lock: threading.Lock
    _needs_grad: bool

    @staticmethod
    def __new__(
        cls,
        compute: Callable[[], Tensor],
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool,
    ) -> DeferredTensor:
        made = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device, requires_grad=False
        )
        made._compute = compute
        made._value = None
        made._lock = threading.Lock()
        made._needs_grad = requires_grad
        return made

    def materialize(self) -> Tensor:
        """The value as a plain tensor; computed at the first call.

        Raises:
            StaleError: if an input was modified in place since.
        """
        with self._lock:
            if self._value is None:
                assert self._compute is not None
                self._value = self._compute()
                self._compute = None
            return self._value

    @property
    def is_deferred(self) -> bool:
        """Whether the value has not been computed yet."""
        return self._value is None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
            return args[0]._needs_grad
        args, kwargs = pytree.tree_map_only(
            DeferredTensor, DeferredTensor.materialize, (args, kwargs)
        )
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """For callers that bypass ``__torch_function__``: right values, or a clear error.

        Below autograd a materialised value would come without its gradient.
        """
        tensors = [
            t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, DeferredTensor)
        ]
        if torch.is_grad_enabled() and any(t._needs_grad for t in tensors):
            raise RuntimeError(
                f"autochunk: {func} reached deferred logits beneath autograd, where their "
                "gradient would be lost; call .materialize() on them first, or .detach()"
            )
        args, kwargs = pytree.tree_map_only(
            DeferredTensor, lambda t: t.materialize().detach(), (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.materialize())

    def __deepcopy__(self, memo: Any) -> Tensor:
        import copy

        return copy.deepcopy(self.materialize(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)


def defer(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    shape: Sequence[int],
    strides: Sequence[int],
    val: Tensor,
    requires_grad: bool,
) -> DeferredTensor:
    """A deferred tensor.

    Args:
        graph: Computes the value from ``inputs`` (ATen ops, autocast already applied).
        inputs: Tensors (kept alive, not copied) and sizes.
        shape, strides: Of the value.
        val: A fake tensor with its dtype and device.
        requires_grad: Whether the value has a gradient.
    """
    versions = [(t, t._version) for t in inputs if isinstance(t, Tensor) and not t.is_inference()]

    def compute() -> Tensor:
        for position, (tensor, version) in enumerate(versions):
            if tensor._version != version:
                raise StaleError(
                    f"autochunk: the logits were deferred, and their input {position} (shape "
                    f"{list(tensor.shape)}) has since been modified in place (by an optimizer's "
                    "step?), so their value can no longer be computed; use the logits before "
                    "that, or call .materialize() on them"
                )
        with (
            torch.set_grad_enabled(requires_grad),
            torch._C._DisableAutocast(),
            torch.inference_mode(False),
        ):
            return graph(*inputs)

    return DeferredTensor(compute, shape, strides, val.dtype, val.device, requires_grad)


_FREE_NAMES = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "is_cuda",
    "is_cpu",
    "is_sparse",
    "is_quantized",
    "is_meta",
    "is_mps",
    "is_xpu",
    "is_nested",
    "is_leaf",
    "itemsize",
    "nbytes",
    "names",
)
_FREE_METHODS = (
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "element_size",
    "stride",
    "is_floating_point",
    "is_complex",
    "is_signed",
    "is_contiguous",
    "storage_offset",
    "get_device",
    "__len__",
    "is_inference",
)
_FREE: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in _FREE_NAMES if hasattr(Tensor, name)]
    + [getattr(Tensor, name) for name in _FREE_METHODS if hasattr(Tensor, name)]
    + [torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor]
)
