"""Isolation: a head whose rewrite fails is left alone, and does not take the others down.

Which head an exception is about is not to be read from the exception: heads share a cone, a
product, a group. So they are tried one after the other, each together with those that went well.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from autochunk.find import op_name
from autochunk.types import Candidate, Refusal

_T = TypeVar("_T")
_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Failure:
    """An exception that nobody expected, as a value."""

    error: Exception

    @property
    def reason(self) -> str:
        """``KeyError: 'x'``."""
        return f"{type(self.error).__name__}: {self.error}"

    @property
    def text(self) -> str:
        """The reason and the innermost calls."""
        calls = traceback.format_exception(self.error, limit=-3, chain=False)
        return f"{self.reason}\n{''.join(calls)}"

    @property
    def place(self) -> str:
        """``lower.py:245``: the innermost line of this package that the exception came through."""
        frames = traceback.extract_tb(self.error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).parent == _PACKAGE]
        return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def isolate(
    heads: Sequence[Candidate], attempt: Callable[[Mapping[str, Refusal]], _T | Failure]
) -> tuple[_T | None, dict[str, Refusal]]:
    """The rewrite without the heads that make it fail.

    Args:
        heads: All that are analysed.
        attempt: Rewrites without the heads that are refused in its argument.

    Returns:
        None where none is left or the rest fails, too; and why which heads are left alone.
    """
    failing: dict[str, Refusal] = {}
    for i, head in enumerate(heads):
        waiting = {other.name: _refusal(other, "not tried yet") for other in heads[i + 1 :]}
        made = attempt({**failing, **waiting})
        if isinstance(made, Failure):
            where = f" (in {made.place})" if made.place else ""
            failing[head.name] = _refusal(head, f"{made.reason.splitlines()[0]}{where}")
    rest = attempt(failing) if len(failing) < len(heads) else None
    return (None if isinstance(rest, Failure) else rest), failing


def _refusal(head: Candidate, detail: str) -> Refusal:
    return Refusal("internal-error", op_name(head.node), detail, head.source)
