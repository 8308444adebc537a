"""An embedding's gradient without temporaries of the table's size.

With the logits gone, the largest allocation of a step can be the gradient of the token embedding.
Inductor makes it in float32, of the table's size, whatever the table's dtype; and where the table
is also the head (tied weights), adds it to the head's gradient as a second tensor of that size.
Only the rows of the batch's tokens are not zero. So those are summed on their own, one row for
each token, in the dtype that PyTorch would sum in, and put in place:

    embedding_dense_backward(grad, ids, …)          →  zeros, its rows set to the sums
    other + embedding_dense_backward(grad, ids, …)  →  other, the sums added to its rows

Only done in graphs whose head was rewritten, and where the tokens are fewer than the table's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.pattern_matcher import (
    CallFunction,
    KeywordArg,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)
from torch._prims_common import get_computation_dtype

from autochunk.donation import OwnPass, with_pass
from autochunk.find import hint

aten = torch.ops.aten
_BACKWARD = aten.embedding_dense_backward.default

SPARSE = 4
"""The table has at least this many rows for every token, else the dense form is kept."""


def embedding_decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions, but embedding gradients are left for the pass."""
    table = dict(select_decomp_table())
    table.pop(_BACKWARD, None)
    return table


def embedding_gradients(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor options with the pass added, before passes of the user's own."""
    return with_pass(patches, "post_grad_custom_pre_pass", _SparseRows)


class _SparseRows(OwnPass):
    def run(self, graph: fx.Graph) -> None:
        _ADDED.apply(graph)
        _ALONE.apply(graph)


_ADDED = PatternMatcherPass(pass_name="autochunk_embedding_added")
_ALONE = PatternMatcherPass(pass_name="autochunk_embedding_alone")
_ARGS = tuple(KeywordArg(name) for name in ("grad", "ids", "size", "padding", "scaled"))
_OTHER = KeywordArg("other")


def _is_sparse(match: Match) -> bool:
    ids, size = match.kwargs["ids"], match.kwargs["size"]
    return not match.kwargs["scaled"] and hint(ids.meta["val"].numel()) * SPARSE <= hint(size)


@register_graph_pattern(
    CallFunction(aten.add.Tensor, CallFunction(_BACKWARD, *_ARGS), _OTHER),
    extra_check=_is_sparse,
    pass_dict=_ADDED,
)
@register_graph_pattern(
    CallFunction(aten.add.Tensor, _OTHER, CallFunction(_BACKWARD, *_ARGS)),
    extra_check=_is_sparse,
    pass_dict=_ADDED,
)
def _added(
    match: Match, grad: Any, ids: Any, size: Any, padding: Any, scaled: bool, other: Any
) -> None:
    def replacement(grad: Tensor, ids: Tensor, other: Tensor) -> Tensor:
        return add_rows(other, grad, ids, padding)

    match.replace_by_example(replacement, [grad, ids, other])


@register_graph_pattern(CallFunction(_BACKWARD, *_ARGS), pass_dict=_ALONE)
def _alone(match: Match, grad: Any, ids: Any, size: Any, padding: Any, scaled: bool) -> None:
    def sparse(grad: Tensor, ids: Tensor) -> Tensor:
        return add_rows(grad.new_zeros(size, grad.shape[-1]), grad, ids, padding)

    def dense(grad: Tensor, ids: Tensor) -> Tensor:
        made = select_decomp_table()[_BACKWARD]
        return made(grad, ids, size, padding, scaled)

    match.replace_by_example(sparse if _is_sparse(match) else dense, [grad, ids])


def add_rows(table: Tensor, grad: Tensor, ids: Tensor, padding: int) -> Tensor:
    """``table`` with the gradient of its rows ``ids`` added.

    Args:
        table: [size, features].
        grad: [*ids.shape, features], what arrives at the embedding's output.
        ids: Integers in [0, size).
        padding: The row that has no gradient, or a negative number.
    """
    ids = ids.reshape(-1)
    tokens = ids.shape[0]
    wide = get_computation_dtype(grad.dtype)
    grad = grad.reshape(tokens, -1).to(wide)
    grad = torch.where((ids == padding).unsqueeze(1), torch.zeros_like(grad), grad)
    # The tokens of one row share the slot of one of them, whichever wrote its number; the other
    # slots stay zero.
    numbers = torch.arange(tokens, device=ids.device, dtype=ids.dtype)
    slot = ids.new_zeros(table.shape[0]).index_put((ids,), numbers)[ids]
    sums = torch.zeros_like(grad).index_put((slot,), grad, accumulate=True)
    return table.index_put((ids,), sums.to(table.dtype), accumulate=True)
