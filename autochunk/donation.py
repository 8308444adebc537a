"""Donation: backward graphs that may overwrite what was saved for them, and so run only once.

A loss outside of the compiled function takes ``backward(retain_graph=True)``, as in eager PyTorch:
what is compiled for it donates nothing (:func:`undonated`).

Inductor's cache must not mix up backward graphs that donate different buffers. PyTorch's FX-graph
cache key leaves out which inputs of a backward graph are donated. A backward that was compiled with
donation in one process can then be served to a graph of another process that calls
``backward(retain_graph=True)``, whose second backward is silently wrong (seen on 2.13 and 2.15,
plain Inductor included). Our backward graphs are tiny and alike, so they would collide easily. The
remedy is a pass that does nothing and whose ``uuid``, which is part of the key, names the donated
inputs. Remove when the key includes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from autochunk.version import __version__


class OwnPass(CustomGraphPass):
    """A pass of ours that runs before the user's in the one place Inductor has for both."""

    def __init__(self, wrapped: tuple[Any, ...]) -> None:
        self.wrapped = wrapped

    def __call__(self, graph: fx.Graph) -> None:
        self.run(graph)
        for custom_pass in self.wrapped:
            custom_pass(graph)

    def run(self, graph: fx.Graph) -> None:
        """The pass."""

    def identity(self) -> Any:
        """What the cache's key must name, besides the pass itself."""

    def uuid(self) -> Any:
        inner = [p.uuid() if hasattr(p, "uuid") else None for p in self.wrapped]
        if None in inner:
            return None  # a pass without identity: not cacheable, as without us
        return ("autochunk", __version__, type(self).__name__, self.identity(), tuple(inner))


def with_pass(patches: Mapping[str, Any], name: str, own: type[OwnPass]) -> dict[str, Any]:
    """Inductor options with a pass of ours added, around passes of the user's own."""
    given = patches.get(name, getattr(torch._inductor.config, name, None))
    passes = given if isinstance(given, list | tuple) else (given,)
    if any(isinstance(p, own) for p in passes):
        return dict(patches)
    return {**patches, name: own(tuple(p for p in passes if p is not None))}


def donation_aware(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor options with the pass added."""
    return with_pass(patches, "post_grad_custom_post_pass", _NameDonated)


class _NameDonated(OwnPass):
    def identity(self) -> Any:
        context = torch._guards.TracingContext.try_get()
        metadata = context.fw_metadata if context is not None else None
        return tuple(getattr(metadata, "bw_donated_idxs", None) or ())


def undonated(wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Nothing is donated, where ``wanted``: neither in what is compiled, nor in what is called.

    The compiled function raises at ``retain_graph=True`` unless it is called with the setting, too.
    """
    if not wanted:
        return contextlib.nullcontext()
    return torch._functorch.config.patch(donated_buffer=False)
