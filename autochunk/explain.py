"""Explain: compile and run a function once, and return what the backend did and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autochunk.backend import autochunk
from autochunk.config import Options
from autochunk.report import Report, Row, collect


@dataclass(frozen=True)
class Explanation:
    """What became of each head of a function.

    ``print`` it for a table. An explanation without reports means that Dynamo captured no graph.

    Attributes:
        reports: One per graph that Dynamo captured, in order.
        result: What the function returned.
    """

    reports: tuple[Report, ...]
    result: Any

    @property
    def chunked(self) -> tuple[Row, ...]:
        """Heads that run in chunks, over all graphs."""
        return tuple(row for report in self.reports for row in report.chunked)

    @property
    def refused(self) -> tuple[Row, ...]:
        """Heads that were left alone, over all graphs, each with its ``refusal``."""
        return tuple(row for report in self.reports for row in report.refused)

    def __str__(self) -> str:
        if not self.reports:
            return "autochunk: Dynamo captured no graph; is the function disabled or empty?"
        return "\n\n".join(map(str, self.reports))


def explain(
    function: Callable[..., Any],
    options: Mapping[str, Any] | None = None,
    **compile_options: Any,
) -> Callable[..., Explanation]:
    """As ``torch._dynamo.explain``, for the heads of a function.

    The function is really compiled and run once, forward only, so that what is reported is what
    happens.

    Args:
        function: A function or module, not compiled yet.
        options: Options of the backend, as ``torch.compile(..., options=options)``.
        **compile_options: Passed to ``torch.compile`` (``dynamic``, ``fullgraph``, …).

    Returns:
        A callable with ``function``'s signature that returns an :class:`Explanation`.

    Raises:
        OptionError: for options that are not valid.
        TypeError: if ``compile_options`` names a backend.

    Example:
        >>> print(explain(model)(input_ids=ids, labels=ids))  # doctest: +SKIP
    """
    if "backend" in compile_options:
        raise TypeError("autochunk.explain: the backend is autochunk; remove backend=")
    Options.parse(options)

    # A function of its own, so that Dynamo does not reuse what an earlier call compiled.
    def backend(gm: Any, example_inputs: Any, **extra: Any) -> Any:
        return autochunk(gm, example_inputs, options=options, **extra)

    compiled = torch.compile(function, backend=backend, **compile_options)

    def run(*args: Any, **kwargs: Any) -> Explanation:
        with collect() as reports:
            result = compiled(*args, **kwargs)
        return Explanation(tuple(reports), result)

    return run
