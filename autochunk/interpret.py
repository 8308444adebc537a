"""Interpret: parts of a program of deferred logits that are not worth Inductor's code.

Each new use of deferred logits is a program of its own, and most of its first call is the C++ or
Triton compiler. Around the region of a metric there are a few ops on numbers per row: they
run op by op. So does the region where its logits are few (the next token of each sequence).
"""

from __future__ import annotations

from torch import fx

from autochunk.find import fake, hint, tensors_of
from autochunk.sink import ancestors
from autochunk.types import NARROW, Lifted, Lowered, Plan, Region

#: Bytes of a region's logits up to which its ops run one by one.
FEW_BYTES = 4 * 2**20

#: Ops around the regions up to which they run one by one.
FEW_OPS = 40


def is_small(region: Region, plan: Plan) -> bool:
    """Whether a region without gradients is computed faster than compiled, in every call."""
    if plan.strategy != "forward" or not isinstance(region.rows, int):
        return False
    return region.rows * region.wide_features * region.wide_itemsize <= FEW_BYTES


def is_little_around(gm: fx.GraphModule, lowered: Lowered, lifted: Lifted) -> bool:
    """Whether few ops are outside of the regions, and none, but for views, makes a wide tensor.

    Op by op, such a tensor would be there as a whole where Inductor may fuse it away.

    Args:
        gm: Dynamo's graph.
    """
    limit = min((hint(head.meta["val"].numel()) for head in lowered.heads), default=0)
    outside = [node for node in gm.graph.nodes if node not in lowered.cone]
    made = [(node, fake(node)) for node in outside]
    inputs = [
        node
        for region in lifted.regions
        for node in (*(r.source for r in region.row_inputs), *region.shared_inputs)
    ]
    made += [(node, node.meta.get("val")) for node in {*ancestors(inputs), *lifted.tail}]
    calls = [(n, value) for n, value in made if n.op in ("call_function", "call_method")]
    return len(calls) <= FEW_OPS and all(
        hint(tensor.numel()) * NARROW <= limit or tensor._is_view()
        for _, value in calls
        for tensor in tensors_of(value)
    )
