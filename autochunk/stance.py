"""Stances (``torch.compiler.set_stance``): what they mean for expressions of deferred logits.

A program is an implementation detail: the user compiled a model, and the op on its logits is one
that plain Inductor would have left to eager PyTorch. Where a stance forbids to compile, a program
that has compiled code for its inputs runs, and for any other the logits are computed.
"""

from __future__ import annotations

import contextlib

import torch

_LATER = ("eager_then_compile", "aot_eager_then_compile")


class NotCompiledError(Exception):
    """There is no compiled code for a call of a program, and there shall be none."""


def compiled_code_only() -> contextlib.AbstractContextManager[object]:
    """The stance in which programs run.

    The stances that run a function eagerly the first time do so to see which sizes change; the
    logits' own graph has told by then.
    """
    from torch._C._dynamo.eval_frame import get_eval_frame_callback

    inside = get_eval_frame_callback() not in (None, False)
    if torch._dynamo.eval_frame._stance.stance in _LATER and not inside:
        return torch.compiler.set_stance("default")
    return contextlib.nullcontext()


def reason_not_compiled(error: Exception) -> str | None:
    """Why a program did not run, if a stance is the reason."""
    stance = torch._dynamo.eval_frame._stance.stance
    if isinstance(error, NotCompiledError) or (
        stance == "fail_on_recompile" and f"stance is '{stance}'" in str(error)
    ):
        return f"the stance is {stance}, and it is not compiled yet"
    return None
