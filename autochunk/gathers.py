"""Gathers: what a row's picked features cost, and how a traced body avoids paying for them.

    logits.log_softmax(-1).gather(-1, labels)

picks one feature of a row. Three things are done for it, so that the logits are read no more often
than the rest of the expression needs and can be overwritten by their gradient in one kernel:

    hoist_gathers        the gather moves before the elementwise ops, to the logits themselves:
                         ``gather(f(z, m)) = f(gather(z), m)`` for an elementwise ``f`` and a
                         per-row ``m``; what is picked is computed before the kernel proper
    gather_masked        where it cannot move: a sum of ``where(iota == index, z, 0)``
    scatter_compared     its derivative, as comparisons that fuse with their neighbours

Comparisons take every index to be in range, which the loop has checked (``spec.checked``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.test_operators
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autochunk.types import NARROW

aten = torch.ops.aten

#: Widths of an index up to which a scatter is written as comparisons, which fuse.
_MAX_COMPARED = 4

#: Copies its argument, and Inductor does so before what reads it (used in Inductor's own tests).
_REALIZE = torch.ops._inductor_test.realize.default


#: Elementwise ops that IEEE 754 rounds correctly: vectorised code and scalar code give the same.
_ROUNDED_CORRECTLY = frozenset(
    {
        torch.ops.prims.convert_element_type.default,
        aten.add.Tensor,
        aten.add.Scalar,
        aten.clamp.default,
        aten.clone.default,
        aten.div.Scalar,
        aten.div.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.mul.Scalar,
        aten.mul.Tensor,
        aten.neg.default,
        aten.sub.Scalar,
        aten.sub.Tensor,
        aten.where.self,
    }
)


def hoist_gathers(gm: fx.GraphModule, fake_mode: FakeTensorMode, bitwise: bool = False) -> bool:
    """Moves gathers before the elementwise ops that they read, as far as products and inputs.

    Args:
        gm: The traced body, modified.
        fake_mode: Of its values.
        bitwise: What is picked must equal the picked element to the last bit: a gather then moves
            before no op whose vectorised code may round differently than its scalar code (tanh).

    Returns:
        Whether no gather is left that reads a computed value.
    """
    everything = True
    for node in list(gm.graph.nodes):
        if node.target is not aten.gather.default:
            continue
        if _is_source(node.args[0]):
            if not _is_input(node.args[0]):
                _realize(node)
            continue
        hoist = _Hoist(node, fake_mode, bitwise)
        picked = hoist.value(node.args[0]) if _picks_few(node) else None
        if picked is None:
            everything = False
        else:
            node.replace_all_uses_with(picked)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return everything


def _picks_few(gather: fx.Node) -> bool:
    wide, dim, index = gather.args[:3]
    x = wide.meta["val"]
    dim = dim % max(x.dim(), 1)
    return x.dim() > 0 and _fits(x, dim, index.meta["val"], most=x.shape[dim] // NARROW)


class _Hoist:
    """One gather on its way up; ``value`` gives what it picks of a node, or None."""

    def __init__(self, gather: fx.Node, fake_mode: FakeTensorMode, bitwise: bool) -> None:
        self.gather = gather
        self.fake_mode = fake_mode
        self.bitwise = bitwise
        wide, dim, self.index = gather.args[:3]
        self.shape = wide.meta["val"].shape
        self.dim = dim % len(self.shape)
        self.known: dict[fx.Node, Any] = {}

    def value(self, node: Any) -> Any:
        if not isinstance(node, fx.Node) or not isinstance(node.meta["val"], torch.Tensor):
            return node
        if node not in self.known:
            self.known[node] = self._value(node)
        return self.known[node]

    def _value(self, node: fx.Node) -> fx.Node | None:
        shape = node.meta["val"].shape
        if len(shape) == 0 or (len(shape) == len(self.shape) and shape[self.dim] == 1):
            return node  # one value for all features of a row
        if node.target is aten.expand.default:
            return self.value(node.args[0])
        if [str(s) for s in shape] != [str(s) for s in self.shape]:
            return self._pick_shared(node)
        if _is_source(node):
            picked = self._emit(aten.gather.default, node, self.dim, self.index)
            return picked if _is_input(node) else _realize(picked)
        if not is_elementwise(node) or (self.bitwise and node.target not in _ROUNDED_CORRECTLY):
            return None
        parts = [self.value(a) for a in node.args]
        if any(new is None and old is not None for new, old in zip(parts, node.args, strict=True)):
            return None
        if not any(isinstance(part, fx.Node) for part in parts):
            return None
        return self._emit(node.target, *parts, **node.kwargs)

    def _pick_shared(self, node: fx.Node) -> fx.Node | None:
        """Of ``[V]`` or ``[1, V]``, shared by all rows, the picked features: ``[rows, k]``."""
        shape = node.meta["val"].shape
        leading, last = shape[:-1], len(self.shape) - 1
        if self.dim != last or any(s != 1 for s in leading) or shape[-1] != self.shape[-1]:
            return None
        if not _is_input(node):
            return None
        for _ in leading:
            node = self._emit(aten.squeeze.dim, node, 0)
        return self._emit(aten.index.Tensor, node, [self.index])

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.gather.graph.inserting_before(self.gather), self.fake_mode:
            node = self.gather.graph.call_function(target, args, kwargs)
            node.meta = {"val": target(*values[0], **values[1])}
        return node


def _realize(node: fx.Node) -> fx.Node:
    """What was picked as a tensor of its own: the kernel must not read logits at other places."""
    with node.graph.inserting_after(node):
        made = node.graph.call_function(_REALIZE, ())
    node.replace_all_uses_with(made)
    made.args = (node,)
    made.meta = dict(node.meta)
    return made


def _is_source(node: fx.Node) -> bool:
    return _is_input(node) or node.target in (aten.mm.default, aten.addmm.default)


def _is_input(node: fx.Node) -> bool:
    return node.op == "placeholder"


def is_elementwise(node: fx.Node) -> bool:
    """Whether each element of a node's value depends on one of each argument (broadcast)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    converts = target is torch.ops.prims.convert_element_type.default
    return converts or torch.Tag.pointwise in target.tags


# ---- decompositions --------------------------------------------------------------------------


def scatter_compared(
    x: torch.Tensor, dim: int, index: torch.Tensor, src: torch.Tensor
) -> torch.Tensor:
    """The gradient of a gather of few indices, as comparisons that fuse with their neighbours.

    ``x + Σ_j where(iota == index[:, j], src[:, j], 0)``; without it Inductor keeps a chunk-sized
    buffer of zeros to scatter into.
    """
    dim = dim % max(x.dim(), 1)
    if not _fits(x, dim, index, src):
        return NotImplemented
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    for j in range(index.shape[dim]):
        hot = _one_hot(index.narrow(dim, j, 1), dim, x.shape[dim], x.dim())
        x = x + torch.where(hot, src.narrow(dim, j, 1), zero)
    return x


def gather_masked(
    x: torch.Tensor, dim: int, index: torch.Tensor, sparse_grad: bool = False
) -> torch.Tensor:
    """A gather of one index per row as a masked sum, on the CPU.

    It reads each element where it stands. Sums of one number and zeros are exact. On CUDA the
    gather stays, and with it the device's assertion.
    """
    dim = dim % max(x.dim(), 1)
    if x.device.type != "cpu" or not x.is_floating_point() or not _fits(x, dim, index):
        return NotImplemented
    if index.shape[dim] != 1:
        return NotImplemented
    hot = _one_hot(index, dim, x.shape[dim], x.dim())
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(hot, x, zero).sum(dim, keepdim=True, dtype=x.dtype)


def _one_hot(index: torch.Tensor, dim: int, size: int, n_dims: int) -> torch.Tensor:
    shape = [1] * n_dims
    shape[dim] = size
    # int32 lanes match float32 ones, which halves the cost of the comparison.
    iota = torch.arange(size, device=index.device, dtype=torch.int32).view(shape)
    return iota == index.to(torch.int32)


def _fits(x: torch.Tensor, dim: int, *others: torch.Tensor, most: int = _MAX_COMPARED) -> bool:
    """Whether few indices per row are used, one for each place of all other dimensions."""
    rest = [d for d in range(x.dim()) if d != dim]
    index = others[0]
    return (
        x.dim() > 0
        and isinstance(index.shape[dim], int)
        and index.shape[dim] <= most
        and all(o.shape[d] == x.shape[d] for d in rest for o in others)
    )


def simplify_masked_sums(gm: fx.GraphModule) -> None:
    """``sum(where(iota == index, value, 0))`` → ``value``, as every index is in range.

    It comes from ``log_softmax``'s derivative, which sums the gradient of the gather.
    """
    for node in list(gm.graph.nodes):
        if node.target is not aten.sum.dim_IntList or len(node.args) < 3 or not node.args[2]:
            continue
        where, dims = node.args[0], node.args[1]
        if where.target is not aten.where.self or len(dims) != 1:
            continue
        hot, value, zero = where.args
        if not _is_one_hot(hot, dims[0]) or not _is_zero(zero):
            continue
        if tuple(value.meta["val"].shape) != tuple(node.meta["val"].shape):
            continue
        if value.meta["val"].dtype != node.meta["val"].dtype:
            continue
        node.replace_all_uses_with(value)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _is_one_hot(node: fx.Node, dim: int) -> bool:
    if node.target is not aten.eq.Tensor:
        return False
    iota, index = node.args[0], node.args[1]
    ndim = node.meta["val"].dim()
    dim = dim % ndim
    if index.meta["val"].dim() != ndim or index.meta["val"].shape[dim] != 1:
        return False
    while iota.target in (aten.view.default, aten.reshape.default, aten.unsqueeze.default):
        iota = iota.args[0]
    if iota.target is not torch.ops.prims.iota.default:
        return False
    starts = iota.kwargs.get("start"), iota.kwargs.get("step")
    return starts == (0, 1) and iota.args[0] == node.meta["val"].shape[dim]


def _is_zero(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.full.default and node.args[1] == 0
