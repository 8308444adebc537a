"""Compares a compiled function with eager, both against float64.

The rule, for values and for each gradient: the error against float64 may be twice that of the
unchunked run in the same dtype, plus a floor of a few roundings. The floor is relative to the
value's norm, with a hundredth of a unit for each element: what cancels to nearly zero has none.
Roundings do not average out in a single number (the unchunked one may be exact by luck): its floor
is twice that of a large tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

import autochunk

FLOOR = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
}


@dataclass(frozen=True)
class Outcome:
    """Outputs of a function and the gradients of its inputs."""

    outputs: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor | None, ...]


def run(function: Callable[..., Any], inputs: Sequence[Any]) -> Outcome:
    """Calls a function and differentiates the sum of its differentiable outputs.

    Each output is weighted differently, so that an upstream gradient of one is not assumed.
    """
    leaves = [_leaf(t) for t in inputs]
    result = function(*leaves)
    outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    # Deterministic upstream gradients, the same for each dtype.
    total = None
    for i, out in enumerate(o for o in outputs if o.requires_grad):
        weight = torch.linspace(0.5, 1.5, max(out.numel(), 1), dtype=torch.float64)
        if out.numel() == 1:
            weight = torch.tensor([1.7 + i], dtype=torch.float64)
        term = (out * weight.view(out.shape).to(out)).sum()
        total = term if total is None else total + term
    if total is not None:
        total.backward()
    gradients = tuple(t.grad if isinstance(t, torch.Tensor) else None for t in leaves)
    return Outcome(tuple(o.detach() for o in outputs), gradients)


def widened(inputs: Sequence[Any]) -> list[Any]:
    """The same numbers in float64."""
    return [
        t.detach().double().requires_grad_(t.requires_grad)
        if isinstance(t, torch.Tensor) and t.is_floating_point()
        else t
        for t in inputs
    ]


def check(
    actual: Outcome,
    baseline: Outcome,
    exact: Outcome,
    dtype: torch.dtype,
    nearby: Sequence[tuple[Outcome, Outcome]] = (),
) -> None:
    """Asserts that ``actual`` is about as good as ``baseline``.

    ``nearby`` has more unchunked runs, of inputs that differ by a rounding, each with its exact
    one: a single number may be exact by luck.
    """
    assert len(actual.outputs) == len(baseline.outputs)
    for i, triple in enumerate(zip(actual.outputs, baseline.outputs, exact.outputs, strict=True)):
        pairs = [(one.outputs[i], its_exact.outputs[i]) for one, its_exact in nearby]
        _check_one(f"output {i}", *triple, dtype, pairs)
    for i, triple in enumerate(
        zip(actual.gradients, baseline.gradients, exact.gradients, strict=True)
    ):
        if triple[1] is None:
            assert triple[0] is None, f"gradient {i} should not exist"
            continue
        assert triple[0] is not None, f"gradient {i} is missing"
        pairs = [(one.gradients[i], its_exact.gradients[i]) for one, its_exact in nearby]
        _check_one(f"gradient {i}", *triple, dtype, pairs)


def check_chunked(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    dtype: torch.dtype,
    options: Mapping[str, Any],
) -> autochunk.Explanation:
    """Asserts that all heads of a function are chunked, and that it is right; says how."""
    found = []

    def chunked(*args: Any) -> Any:
        found.append(autochunk.explain(function, options=options)(*args))
        return found[0].result

    actual = run(chunked, inputs)
    assert found[0].chunked, found[0]
    assert not found[0].refused, found[0]
    check(actual, run(function, inputs), run(function, widened(inputs)), dtype)
    return found[0]


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Distance from ``exact``, relative to its norm."""
    norm = exact.double().norm().item()
    return (value.double() - exact.double()).norm().item() / (norm or 1.0)


def _check_one(
    name: str,
    actual: torch.Tensor,
    baseline: torch.Tensor,
    exact: torch.Tensor,
    dtype: torch.dtype,
    nearby: Sequence[tuple[Any, Any]],
) -> None:
    assert actual.shape == baseline.shape, f"{name}: {actual.shape} is not {baseline.shape}"
    assert actual.dtype == baseline.dtype, f"{name}: {actual.dtype} is not {baseline.dtype}"
    if not actual.is_floating_point():
        assert torch.equal(actual, baseline), f"{name}: {actual} is not {baseline}"
        return
    finite = exact.isfinite()
    assert torch.equal(finite, actual.isfinite()), f"{name}: not finite in the same places"
    if not finite.all():
        assert torch.equal(actual.isnan(), exact.isnan()), f"{name}: nan in other places"
        actual, baseline, exact = actual[finite], baseline[finite], exact[finite]
    if not exact.numel():
        return
    ours = error(actual, exact)
    theirs = max(error(one, its_exact) for one, its_exact in [(baseline, exact), *nearby])
    norm = exact.double().norm().item() or 1.0
    floor = FLOOR[dtype] * (1 + exact.numel() ** -0.5 + 0.01 * exact.numel() ** 0.5 / norm)
    assert ours <= 2 * theirs + floor, f"{name}: error {ours:.2e}, unchunked {theirs:.2e}"


def _leaf(t: Any) -> Any:
    if not isinstance(t, torch.Tensor):
        return t
    # Keeps strides: a transposed weight stays one.
    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    made.copy_(t.detach())
    return made.requires_grad_(t.requires_grad)
