"""An embedding's gradient without temporaries of the table's size.

With the logits gone, the largest allocation of a step can be the gradient of the token embedding.
Inductor makes it in float32, of the table's size, whatever the table's dtype; and where the table
is also the head (tied weights), adds it to the head's gradient as a second tensor of that size.
Only the rows of the batch's tokens are not zero. So those are summed on their own, one row for
each token, in the dtype that Inductor would sum in, and put in place:

    zeros.index_put(ids, grad, accumulate)          →  zeros, the sums added to its rows
    other + zeros.index_put(ids, grad, accumulate)  →  other, the sums added to its rows

A pass over Inductor's own graphs, where it finds what the decomposition of the embedding's backward
has made. Only run on graphs whose head was rewritten, and where tokens are fewer than the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.pattern_matcher import (
    CallFunction,
    KeywordArg,
    Match,
    PatternExpr,
    PatternMatcherPass,
    register_graph_pattern,
)

from autochunk.donation import OwnPass, with_pass
from autochunk.find import hint

aten = torch.ops.aten

SPARSE = 4
"""The table has at least this many rows for every token, else the dense form is kept."""


def embedding_gradients(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor options with the pass added, before passes of the user's own."""
    return with_pass(patches, "post_grad_custom_pre_pass", _SparseRows)


class _SparseRows(OwnPass):
    def run(self, graph: fx.Graph) -> None:
        _PATTERNS.apply(graph)


def add_rows(table: Tensor, ids: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """``table`` with ``values`` added to its rows ``ids``.

    Args:
        table: [size, features].
        ids: Integers in [-size, size), any shape.
        values: [*ids.shape, features], in the dtype they are summed in.
        mask: [*ids.shape, 1] or None; where it is false there is nothing to add, and ``ids`` may
            be anything.
    """
    if mask is not None:
        values = torch.where(mask, values, torch.zeros_like(values))
        ids = torch.where(mask.squeeze(-1), ids, torch.zeros_like(ids))
    ids = ids.reshape(-1)
    values = values.reshape(ids.shape[0], -1)
    # The tokens of one row share the slot of one of them, whichever wrote its number; the other
    # slots stay zero.
    numbers = torch.arange(ids.shape[0], device=ids.device)
    slots = torch.zeros(table.shape[0], dtype=torch.int64, device=ids.device)
    slot = slots.index_put((ids,), numbers)[ids]
    sums = torch.zeros_like(values).index_put((slot,), values, accumulate=True)
    return table.index_put((ids,), sums.to(table.dtype), accumulate=True)


# ---- where it is found -----------------------------------------------------------------------

_PATTERNS = PatternMatcherPass(pass_name="autochunk_embedding")


def _is_sparse(match: Match) -> bool:
    zeros, ids, values = (match.kwargs[name] for name in ("zeros", "ids", "values"))
    if zeros.target is not aten.full.default or zeros.args[1] != 0:
        return False
    size, ids_val = zeros.meta["val"].shape, ids.meta["val"]
    other = match.kwargs.get("other")
    return (
        len(size) == 2
        and all(isinstance(n, int) for n in size)  # a table's; other zeros may be of symbolic rows
        and ids_val.dtype in (torch.int32, torch.int64)
        and values.meta["val"].dim() == ids_val.dim() + 1
        and hint(ids_val.numel()) * SPARSE <= hint(size[0])
        and (other is None or tuple(other.meta["val"].shape) == tuple(size))
        and (other is None or other.meta["val"].dtype == match.output_node().meta["val"].dtype)
    )


def _replace(match: Match, *, zeros: fx.Node, ids: fx.Node, values: fx.Node, **rest: Any) -> None:
    given = [node for node in (rest.get("mask"), rest.get("other")) if node is not None]
    size, out = zeros.meta["val"].shape, match.output_node().meta["val"]

    def replacement(ids: Tensor, values: Tensor, *given: Tensor) -> Tensor:
        named = dict(zip([n for n in ("mask", "other") if n in rest], given, strict=True))
        table = named.get("other")
        if table is None:
            table = torch.zeros(tuple(size), dtype=out.dtype, device=out.device)
        return add_rows(table, ids, values, named.get("mask"))

    match.replace_by_example(replacement, [ids, values, *given])


def _patterns() -> list[PatternExpr]:
    """Both forms of the accumulation, alone, cast, and added to something else."""
    zeros, mask, values, other = map(KeywordArg, ("zeros", "mask", "values", "other"))
    ids = [KeywordArg("ids")]
    masked = aten._unsafe_masked_index_put_accumulate.default
    found: list[PatternExpr] = []
    for first, is_cast, added in itertools.product((True, False), (True, False), (2, 1, 0)):
        node = (
            CallFunction(masked, zeros, mask, ids, values)
            if first
            else CallFunction(aten.index_put.default, zeros, ids, values, True)
        )
        if is_cast:
            cast = torch.ops.prims.convert_element_type.default
            node = CallFunction(cast, node, KeywordArg("dtype"))
        if added:
            node = CallFunction(aten.add.Tensor, *((node, other) if added == 1 else (other, node)))
        found.append(node)
    return found


for _pattern in _patterns():
    register_graph_pattern(_pattern, extra_check=_is_sparse, pass_dict=_PATTERNS)(_replace)
