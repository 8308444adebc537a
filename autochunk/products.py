"""Products: heads that are no linear. They are left alone, and the report says so.

    torch.bmm(x_BNH, w_BHV)              another weight for each batch
    F.conv1d(x_NHL, w_VHK)               a kernel reads several positions

A product counts as a head if it amplifies, its output takes ``min_bytes``, and enters no other
product (as attention's scores do).
"""

from __future__ import annotations

import math
import operator
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from autochunk.find import (
    AMPLIFY,
    as_candidate,
    fake,
    hint,
    layer_fed_by,
    op_name,
    parse_linear,
    refuse_subclass,
    source_line,
)
from autochunk.types import Candidate, Refusal

_aten = torch.ops.aten

#: Products of the last dimension of one operand with one of the last two of another.
_MATMULS = {
    *(torch.matmul, operator.matmul, torch.bmm, torch.inner),
    *("matmul", "__matmul__", "bmm", "inner"),
    *(_aten.bmm.default, _aten.matmul.default),
}
_ADDED = {torch.baddbmm, "baddbmm", _aten.baddbmm.default}
CONVOLUTIONS = {
    *(F.conv1d, F.conv2d, F.conv3d, _aten.conv1d.default, _aten.conv2d.default),
    *(_aten.conv3d.default, _aten.convolution.default),
}
_EINSUMS = {torch.einsum, F.bilinear, torch.tensordot}


def other_products(gm: fx.GraphModule, min_bytes: int) -> tuple[tuple[Candidate, Refusal], ...]:
    """Heads that are no linear, each with the reason why it is left alone.

    Args:
        gm: Dynamo's graph.
        min_bytes: Outputs below this are in no report.
    """
    found = []
    products = {node for node in gm.graph.nodes if _is_product(node)}
    for node in gm.graph.nodes:
        candidate = _candidate(node)
        if candidate is None or candidate.logits_bytes < min_bytes:
            continue
        if candidate.out_features < AMPLIFY * candidate.in_features or hint(candidate.rows) < 2:
            continue
        if layer_fed_by(node, products, _is_product) is None:
            refusal = refuse_subclass(node, candidate.source) or Refusal(
                "other-product", op_name(node), _why(node), candidate.source
            )
            found.append((candidate, refusal))
    return tuple(found)


def _is_product(node: fx.Node) -> bool:
    known = (_MATMULS, _ADDED, CONVOLUTIONS, _EINSUMS)
    return parse_linear(node) is not None or any(node.target in targets for targets in known)


def _candidate(node: fx.Node) -> Candidate | None:
    """A product that ``find`` does not know as a linear, with its numbers of features."""
    out = fake(node)
    if not _is_product(node) or as_candidate(node) is not None:
        return None
    if not isinstance(out, torch.Tensor) or not out.is_floating_point():
        return None
    x, weight = _operands(node)
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    a, b = fake(x), fake(weight)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return None
    if a.dim() < 2 or b.dim() < 2 or any(hint(t.numel()) == 0 for t in (a, b, out)):
        return None
    if parse_linear(node) is not None and b.dim() == 2:
        return None  # a linear that does not amplify
    contracted, features = _features(node, x, weight)
    return Candidate(
        node=node,
        x=x,
        weight=weight,
        bias=None,
        weight_layout="",
        rows=out.numel() // features,
        in_features=contracted,
        out_features=features,
        logits_bytes=hint(out.numel()) * out.element_size(),
        source=source_line(node),
    )


def _operands(node: fx.Node) -> tuple[Any, Any]:
    """What is multiplied: the hidden states and the weight, where that can be told by position."""
    args = list(node.args)
    if node.target in (torch.einsum, torch.ops.aten.einsum.default):
        args = args[1:]
        args = list(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        if len(args) != 2:
            return None, None
    elif node.target in _ADDED:
        args = args[1:]
    given = dict(enumerate(args))
    first, second = ("batch1", "batch2") if node.target in _ADDED else ("input", "other")
    names = {first: 0, second: 1, "weight": 1, "mat2": 1, "tensor1": 0, "tensor2": 1}
    given.update({names[key]: arg for key, arg in node.kwargs.items() if key in names})
    return given.get(0), given.get(1)


def _features(node: fx.Node, x: fx.Node, weight: fx.Node) -> tuple[int, int]:
    """How many features are contracted, and how many come out of each row, as numbers."""
    out, a, b = (hint(fake(n).numel()) for n in (node, x, weight))
    if node.target in CONVOLUTIONS:
        size = [hint(s) for s in fake(weight).shape]
        return prod(size[1:]) * _groups(x, weight), size[0]
    if node.target is torch.einsum:
        contracted = _einsum_contracted(node, fake(x), fake(weight))
    elif node.target in (torch.tensordot, F.bilinear):
        contracted = math.isqrt(max(a * b // out, 1))
    else:
        contracted = hint(fake(x).shape[-1])
    right, left = out * contracted // a, out * contracted // b
    # Which of the two is the weight only their origin tells.
    sides = [side for side, n in ((left, x), (right, weight)) if _is_given(n)]
    features = max(sides) if sides else min(left, right)
    return max(contracted, 1), max(features, 1)


def _groups(x: fx.Node, weight: fx.Node) -> int:
    channels = fake(x).shape[fake(x).dim() - fake(weight).dim() + 1]
    return max(hint(channels) // max(hint(fake(weight).shape[1]), 1), 1)


def _einsum_contracted(node: fx.Node, x: torch.Tensor, weight: torch.Tensor) -> int:
    equation = str(node.args[0]).replace(" ", "").replace("...", "")
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    # From the right: an ellipsis stands for the leading dimensions.
    sizes = dict(zip(reversed(terms[0]), reversed(x.shape), strict=False))
    both = {letter for letter in terms[0] if letter in terms[-1] and letter not in output}
    return prod(hint(sizes[letter]) for letter in both if letter in sizes)


def _is_given(node: fx.Node) -> bool:
    """Whether a tensor is an input of the graph (a weight), or a view of one."""
    while node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
        if _is_product(node) or fake(node) is None:
            return False
        (node,) = node.all_input_nodes
    return node.op in ("placeholder", "get_attr")


def _why(node: fx.Node) -> str:
    x, weight = _operands(node)
    shapes = f"{list(fake(x).shape)} and {list(fake(weight).shape)}"
    if node.target in CONVOLUTIONS:
        kernel = "×".join(str(s) for s in fake(weight).shape[2:])
        return (
            f"a convolution of {shapes}, with a kernel of {kernel} and {_groups(x, weight)} groups"
        )
    return f"a product of {shapes} is not one matrix that all rows share"
