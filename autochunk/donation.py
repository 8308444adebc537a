"""Keeps Inductor's cache from mixing up backward graphs that donate different buffers.

PyTorch's FX-graph cache key leaves out which inputs of a backward graph are donated (may be
overwritten). A backward that was compiled with donation in one process can then be served to a
graph of another process that calls ``backward(retain_graph=True)``, whose second backward is
silently wrong (seen on 2.13 and 2.15, plain Inductor included). Our backward graphs are tiny and
alike, so they would collide easily. The remedy is a pass that does nothing and whose ``uuid``,
which is part of the key, names the donated inputs. Remove when the key includes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

_PASS = "post_grad_custom_post_pass"


class _DonationAware(CustomGraphPass):
    def __init__(self, wrapped: tuple[Any, ...]) -> None:
        self.wrapped = wrapped

    def __call__(self, graph: fx.Graph) -> None:
        for custom_pass in self.wrapped:
            custom_pass(graph)

    def uuid(self) -> Any:
        inner = [p.uuid() if hasattr(p, "uuid") else None for p in self.wrapped]
        if None in inner:
            return None  # a pass without identity: not cacheable, as without us
        context = torch._guards.TracingContext.try_get()
        metadata = context.fw_metadata if context is not None else None
        donated = getattr(metadata, "bw_donated_idxs", None)
        return ("autochunk donation", tuple(donated or ()), tuple(inner))


def donation_aware(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor options with the pass added, around passes of the user's own."""
    from torch._inductor import config

    wrapped = patches.get(_PASS, getattr(config, _PASS, None))
    if isinstance(wrapped, _DonationAware):
        return dict(patches)
    passes = tuple(wrapped) if isinstance(wrapped, list | tuple) else (wrapped,)
    return {**patches, _PASS: _DonationAware(tuple(p for p in passes if p is not None))}
