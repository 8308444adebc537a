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

import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autochunk import deferred
from autochunk.deferred import DeferredTensor, Formula, make
from autochunk.evaluation import evaluate
from autochunk.steps import Step, StepFormula, is_intercepted, is_open, record
from autochunk.types import NARROW

#: Functional methods of a tensor, and functions of these names in ``torch``.
_NAMES = """
    abs add all any amax amin argmax argmin argsort bfloat16 clamp clamp_max clamp_min clip
    contiguous cos cumsum detach div divide double eq erf exp expm1 expand_as flatten float ge
    gather greater greater_equal gt half index_select isfinite isinf isnan kthvalue le less
    less_equal log log1p log2 log_softmax logical_and logical_not logical_or logsumexp lt
    masked_fill max maximum mean min minimum movedim mul multiply narrow ne neg norm not_equal
    permute pow prod reciprocal relu reshape rsqrt rsub scatter select sigmoid sign sin softmax sort
    sqrt square squeeze std sub subtract sum swapaxes t take_along_dim tanh to topk transpose
    true_divide unflatten unsqueeze var view view_as where xlogy
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

#: What needs the shape only.
_LIKE = {torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like}
_LIKE |= {torch.randn_like, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty}
_LIKE |= {Tensor.new_tensor}


def handle(func: Any, args: Any, kwargs: Any) -> Any:
    """Records or evaluates an op on deferred tensors; ``NotImplemented`` where neither is done."""
    if func in _LIKE and type(args[0]) is DeferredTensor and not is_intercepted():
        x = args[0]
        stand_in = torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape)
        return func(stand_in, *args[1:], **kwargs)
    if func not in _SPELLINGS or is_intercepted() or _writes(kwargs):
        return NotImplemented
    leaves, spec = pytree.tree_flatten((args, kwargs))
    leaves = _positions_of_masks(func, leaves)
    deferred_leaves = [leaf for leaf in leaves if type(leaf) is DeferredTensor]
    if not deferred_leaves or not all(map(_is_usable, leaves)):
        return NotImplemented
    if not all(map(is_open, deferred_leaves)):
        return NotImplemented
    step = record(func, _SPELLINGS[func], leaves, spec)
    root = step.root
    try:
        shown, fakes = _metadata(step)
    except Exception:  # the user's error: it is raised again by the op on the values
        return NotImplemented
    for fake, leaf in zip(fakes, leaves, strict=True):
        if shown is fake:
            return leaf
    tensors = [t for t in pytree.tree_leaves(shown) if isinstance(t, Tensor)]
    if not tensors or any(t.device != deferred_leaves[0].device for t in tensors):
        return NotImplemented
    if isinstance(shown, Tensor) and _is_wide(shown, root):
        formula = StepFormula(step, root, shown.requires_grad, shown._is_view())
        return make(formula, shown.shape, shown.stride(), shown, shown.requires_grad)
    if any(_is_wide(t, root) for t in tensors):
        return NotImplemented
    assert root.compiler is not None  # the tensors are open
    return evaluate(step, root.compiler, any(t.requires_grad for t in tensors))


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


def _is_wide(tensor: Tensor, root: Formula) -> bool:
    return tensor.numel() * NARROW > root.numel or root.features in tensor.shape


def _positions_of_masks(func: Any, leaves: list[Any]) -> list[Any]:
    """``logits[mask]`` → ``logits[mask.nonzero(as_tuple=True)]`` for a mask of one dimension."""
    if func is not Tensor.__getitem__:
        return leaves
    return [
        leaf.nonzero().squeeze(1)
        if i and type(leaf) is Tensor and leaf.dtype == torch.bool and leaf.dim() == 1
        else leaf
        for i, leaf in enumerate(leaves)
    ]


_fake_mode = functools.cache(FakeTensorMode)


def _metadata(step: Step) -> tuple[Any, list[Any]]:
    """What the step's results are like, as fake tensors, and the fakes it was shown with."""
    mode = _fake_mode()

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        with torch._C.DisableTorchFunctionSubclass(), mode:
            made = torch.empty_strided(
                leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device
            )
            return made.requires_grad_(leaf.requires_grad)

    fakes = [fake(leaf) for leaf in step.leaves]
    with mode:
        return step.call(fakes), fakes


deferred.on_use = handle
