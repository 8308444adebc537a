"""Local buffers: a fault of Inductor's C++ backend that our kernels run into.

Where it fuses outer loops, Inductor keeps what one inner loop leaves for the next in a buffer of
the inner loop's size. If an outer loop is tiled, as for logits whose rows are contiguous in memory,
all rows of a tile share the buffer, and the last one is left for all of them: gradients were wrong
(torch 2.13, pytorch/pytorch#185702). Later versions do not fuse such loops (#185855); nor do our
kernels. Remove when no such version is supported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch._inductor.virtualized import V

_CHECK = "check_outer_fusion_loop_level_attr"


@contextlib.contextmanager
def only_in_untiled_loops() -> Iterator[None]:
    """What Inductor compiles for a CPU uses no local buffers in tiled loops."""
    # Slow to import, and of no use elsewhere.
    from torch._inductor.codegen.cpp import OuterLoopFusedSchedulerNode
    from torch._inductor.codegen.cpp_utils import LocalBufferContext

    check = getattr(OuterLoopFusedSchedulerNode, _CHECK)

    def checked(self: Any, kernels: Any, depth: int) -> bool:
        context = V.local_buffer_context
        has_buffers = isinstance(context, LocalBufferContext) and bool(context.local_buffers)
        loops = [loop for kernel in kernels for loop in kernel.loop_nest.loops[:depth]]
        if has_buffers and any(loop.steps != 1 for loop in loops):
            return False  # Inductor compiles them again, each with its own outer loop
        return bool(check(self, kernels, depth))

    with mock.patch.object(OuterLoopFusedSchedulerNode, _CHECK, checked):
        yield
