"""Decompositions: what is taken apart before autograd, and only where the derivative stays.

PyTorch's decompositions are made for graphs that autograd has been through. Taken apart before it,
some ops have another derivative than their own: binary cross entropy's clamped logarithm becomes
0 × inf where a probability rounds to 1. So a loss that hides a reduction over rows has only the
reduction split off, the op itself stays (it is row-parallel without, see ``rules``), and its
derivative with it. ``tests/test_decompositions.py`` compares every op here with the undecomposed
one, at ties, zeros, infinities and saturation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import get_decompositions

aten = torch.ops.aten

#: Losses that become row-parallel, and stay what they are, once they reduce nothing.
REDUCING_LOSSES = (
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.binary_cross_entropy.default,
    aten.soft_margin_loss.default,
)

_NONE, _MEAN, _SUM = 0, 1, 2


def _without_reduction(op: Any) -> Callable[..., Any]:
    names = [arg.name for arg in op._schema.arguments]

    def decomposed(*args: Any, **kwargs: Any) -> Any:
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        reduction = bound.get("reduction", _MEAN)
        if reduction == _NONE:
            return NotImplemented
        return _reduced(op(**{**bound, "reduction": _NONE}), reduction)

    return decomposed


def _reduced(loss: Tensor, reduction: int) -> Tensor:
    if reduction == _NONE:
        return loss
    return loss.mean() if reduction == _MEAN else loss.sum()


def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Any:
    """A symbolic factor becomes an operand, and is one of a kind the lowering knows."""
    if not isinstance(value, torch.SymInt | torch.SymFloat):
        return NotImplemented
    return x + value * a * b


def _addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Any:
    if not isinstance(value, torch.SymInt | torch.SymFloat):
        return NotImplemented
    return x + value * (a / b)


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    **get_decompositions(
        [
            aten.nll_loss_forward,
            aten.nll_loss2d_forward,
            aten.native_layer_norm,
            aten.norm,
            aten.eye,
        ]
    ),
    **{op: _without_reduction(op) for op in REDUCING_LOSSES},
    aten.addcmul.default: _addcmul,
    aten.addcdiv.default: _addcdiv,
}


# ---- functions that PyTorch itself takes apart -----------------------------------------------


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    reduction: int = _NONE,
) -> Tensor:
    """As the op differentiates it: a margin that is exactly met has no gradient."""
    rows, labels = torch.atleast_2d(input), torch.atleast_1d(target)
    features = rows.shape[1]
    z = margin - rows.gather(1, labels.unsqueeze(1)) + rows
    z = torch.where(z > 0, z, 0)
    z = z if p == 1 else z * z
    if weight is not None:
        z = z * weight[labels].unsqueeze(1)
    others = torch.arange(features, device=input.device) != labels.unsqueeze(1)
    loss = torch.where(others, z, 0).sum(1) / features
    return _reduced(loss if input.dim() == 2 else loss.squeeze(0), reduction)


def _multilabel_margin_loss(input: Tensor, target: Tensor, reduction: int = _NONE) -> Tensor:
    """As the op computes it: labels after the first -1 count for nothing."""
    rows, labels = torch.atleast_2d(input), torch.atleast_2d(target)
    features = rows.shape[1]
    place = torch.arange(features, device=input.device)
    end = torch.where(labels == -1, place, features).amin(-1, keepdim=True)
    given = place < end
    label = torch.where(given, labels, 0)
    is_label = ((place == label.unsqueeze(-1)) & given.unsqueeze(-1)).any(1)
    z = 1 - rows.gather(1, label).unsqueeze(-1) + rows.unsqueeze(1)
    counts = (z > 0) & given.unsqueeze(-1) & ~is_label.unsqueeze(1)
    loss = torch.where(counts, z, 0).sum((1, 2)) / features
    return _reduced(loss if input.dim() == 2 else loss.squeeze(0), reduction)


def _binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: int = _NONE,
) -> Tensor:
    """As the op differentiates it: its derivative is finite at infinite logits."""
    positive = 1 if pos_weight is None else (pos_weight - 1) * target + 1
    loss = (1 - target) * input - positive * F.logsigmoid(input)
    loss = loss if weight is None else loss * weight
    return _reduced(loss.to(target.dtype), reduction)


def _as_functional(theirs: Callable[..., Any], ours: Callable[..., Tensor]) -> Any:
    """``ours`` with the signature of ``torch.nn.functional``, whose reductions have names."""
    signature = inspect.signature(theirs)
    codes = {"none": _NONE, "mean": _MEAN, "sum": _SUM}

    def called(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs).arguments
        legacy = bound.pop("size_average", None), bound.pop("reduce", None)
        name = bound.pop("reduction", "mean")
        if legacy != (None, None):
            name = F._Reduction.legacy_get_string(*legacy, emit_warning=False)
        return ours(**bound, reduction=codes[name])

    return called


_OURS = (
    (F.multi_margin_loss, torch._C._nn.multi_margin_loss, _multi_margin_loss),
    (F.multilabel_margin_loss, torch._C._nn.multilabel_margin_loss, _multilabel_margin_loss),
    (
        F.binary_cross_entropy_with_logits,
        torch.binary_cross_entropy_with_logits,
        _binary_cross_entropy_with_logits,
    ),
)

#: In place of functions that PyTorch takes apart whatever one asks for: it registered
#: decompositions of the margin losses in place of autograd's formulas, with another derivative at
#: ties, and for ``multilabel_margin_loss`` another value where labels are padded (so under
#: ``torch.compile``); functionalisation takes the third apart.
FUNCTIONS: Mapping[Any, Callable[..., Tensor]] = {
    **{theirs: _as_functional(theirs, ours) for theirs, _, ours in _OURS},
    **{theirs: ours for _, theirs, ours in _OURS},
}

#: The ops inside of those functions.
REPLACED = (
    aten.multi_margin_loss.default,
    aten.multilabel_margin_loss_forward.default,
    aten.binary_cross_entropy_with_logits.default,
)
