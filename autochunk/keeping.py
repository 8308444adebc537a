"""Keeping: gradients of a fused region from its forward pass to its backward pass, or not.

A fused loop computes the weight's gradient in the forward pass and keeps it. That costs nothing
where the backward pass comes next. Where several losses wait for one backward pass, each would keep
a gradient of the weight's size, and where no backward pass comes at all, it was computed in vain.
So the graph does not hold the gradients. It holds a ticket, a tensor of one number, and the inputs
of the regions; the backward pass asks for the gradients that belong to the number, and computes
them again if there are none. They are a cache: dropping them is always right.

    forward    :func:`open_ticket` decides whether this call computes gradients.
    backward   :func:`take` hands them out.
    between    they live as long as the ticket's memory does. It goes when the autograd graph goes.

A call computes gradients early (``Ticket.early``) unless

    - an earlier call of the same weight still waits for its backward pass, and the gradients take
      more bytes than the logits that an unchunked model would keep. The earlier call's are dropped.
    - one of the last ``TRIAL`` calls of the same regions ended like that, or had no backward pass.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

logger = logging.getLogger("autochunk")

#: So many calls in a row must have had a backward pass of their own before gradients are computed
#: early again. One is too few: a checkpoint runs each forward pass twice, once in vain.
TRIAL = 2


class _History:
    """How often in a row it paid to compute a group's gradients early, up to ``TRIAL``."""

    def __init__(self) -> None:
        self.paid = TRIAL

    def add(self, paid: bool) -> None:
        self.paid = min(self.paid + 1, TRIAL) if paid else 0


class Ticket(bytearray):
    """What stands for gradients: the memory of a tensor of one number.

    Attributes:
        number: Its own; never given twice in a process.
        memory: Of the weights: where they are, or what else tells them from others.
        is_larger: Whether the gradients take more bytes than the logits would.
        early: Whether the forward pass computes them.
        gradients: If so, while they are kept.
        crowded: Whether another ticket of a weight waited at the same time.
        settled: Whether a backward pass has come.
    """

    number: int
    memory: Set[Any]
    is_larger: bool
    early: bool
    history: _History
    gradients: list[Tensor] | None = None
    crowded: bool = False
    settled: bool = False

    def as_tensor(self) -> Tensor:
        """Its number; the ticket lives as long as the tensor's memory."""
        return torch.frombuffer(self, dtype=torch.int64)

    def __del__(self) -> None:
        if not self.settled:
            self.history.add(False)


_LOCK = threading.RLock()
_NUMBERS = itertools.count(1)
_TICKETS: weakref.WeakValueDictionary[int, Ticket] = weakref.WeakValueDictionary()
_HISTORIES: dict[str, _History] = {}


def open_ticket(key: str, memory: Set[Any], is_larger: bool) -> Ticket:
    """A ticket for a call, and whether it computes its gradients early.

    Args:
        key: Names the regions.
        memory, is_larger: See :class:`Ticket`.
    """
    with _LOCK:
        number = next(_NUMBERS)
        ticket = Ticket(number.to_bytes(8, "little"))
        ticket.number, ticket.memory, ticket.is_larger = number, memory, is_larger
        ticket.history = _HISTORIES.setdefault(key, _History())
        before = ticket.history.paid
        for other in list(_TICKETS.values()):
            if other.memory.isdisjoint(memory):
                continue
            if other.settled:  # its graph is retained; a second backward pass computes again
                other.gradients = None
                continue
            for one in (other, ticket):
                if one.is_larger:
                    one.crowded, one.gradients = True, None
                    one.history.add(False)
        ticket.early = ticket.history.paid == TRIAL
        counters["autochunk"]["early gradients" if ticket.early else "late gradients"] += 1
        if ticket.crowded and before == TRIAL:
            logger.info(
                "several losses of one weight wait for their backward passes; each would keep a "
                "gradient of the weight's size, so the gradients are computed in the backward "
                "pass from now on"
            )
        _TICKETS[number] = ticket
        return ticket


def take(number: int, again: bool) -> list[Tensor] | None:
    """The gradients that belong to a number, if they are kept.

    Args:
        again: Whether another backward pass may ask for them (``retain_graph``).
    """
    with _LOCK:
        ticket = _TICKETS.get(number)
        if ticket is None:
            return None
        if not ticket.settled:
            ticket.settled = True
            ticket.history.add(not ticket.crowded)
        gradients = ticket.gradients
        if not again:
            ticket.gradients = None
        return gradients
