"""Modes: whether autograd records, call by call of a Dynamo graph, and what it says of results.

    with torch.no_grad():
        flat = logits.view(-1, V)               # requires_grad, and no history
    loss = F.cross_entropy(flat, labels)        # requires_grad; its backward pass does nothing

A view that is made while gradients are off *claims* a gradient that never arrives, and so does what
is computed from it. That is eager PyTorch's answer, and Inductor's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

SET_GRAD = torch._C._set_grad_enabled
_ENTER_INFERENCE = torch.autograd.grad_mode._enter_inference_mode
_EXIT_INFERENCE = torch.autograd.grad_mode._exit_inference_mode
#: Calls that change the mode.
MODES = (SET_GRAD, _ENTER_INFERENCE, _EXIT_INFERENCE)
#: What Dynamo makes of a ``with torch.autocast``.
ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast


def recording_of(graph: fx.Graph) -> dict[fx.Node, bool]:
    """Whether autograd records where each node stands; at the output: when the graph ends.

    The graph begins in the mode of the caller.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    outer: dict[fx.Node, tuple[bool, bool]] = {}
    found: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.target is SET_GRAD:
            grad = bool(node.args[0])
        elif node.target is _ENTER_INFERENCE:
            outer[node] = grad, inference
            inference = bool(node.args[0])
            grad = not inference
        elif node.target is _EXIT_INFERENCE:
            grad, inference = outer[node.args[0]]
        found[node] = grad and not inference
    return found


def claimed(value: Any) -> Any:
    """The same memory as a tensor that requires a gradient and has none."""
    if not isinstance(value, Tensor) or value.requires_grad or not value.is_floating_point():
        return value
    with torch.enable_grad():
        return _Claim.apply(torch.zeros((), requires_grad=True), value)


class _Claim(torch.autograd.Function):
    @staticmethod
    @torch.compiler.disable
    def forward(ctx: Any, nobody: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None
