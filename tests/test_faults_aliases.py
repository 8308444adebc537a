"""Views of deferred logits share their memory: what is written to one is seen in the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import Outcome, check, run
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from autochunk.report import collect

OPTIONS: dict[str, Any] = {"min_bytes": 0, "chunk_rows": 5, "strict": True}
N, H, V = 24, 8, 64

pytestmark = pytest.mark.usefixtures("no_codegen")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend="autochunk", options=OPTIONS)


def data() -> list[Tensor]:
    x, w = (torch.randn(n, H, dtype=torch.float64, requires_grad=True) for n in (N, V))
    return [x, w, torch.randint(V, (N,))]


Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def agree(program: Callable[[Compiler], Callable[..., Any]]) -> None:
    """A program, given what compiles its functions, with ours is eager's, in float64.

    What AOTAutograd cannot compile may raise.
    """
    inputs = data()
    expected: Outcome = run(program(lambda f: f), inputs)
    try:
        found = run(program(compiled), inputs)
    except torch._dynamo.exc.BackendCompilerFailed:
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
            run(program(lambda f: torch.compile(f, backend=aot_eager)), inputs)
        return
    check(found, expected, expected, torch.float64)


#: Narrow views, and a wide one.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a column": lambda z: z[:, 3],
    "select": lambda z: z.select(1, 3),
    "narrow": lambda z: z.narrow(1, 0, 2),
    "an element": lambda z: z[0, 0],
    "of the transposed": lambda z: z.T[3],
    "a row": lambda z: z[2],
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_fault_W_a_view_of_logits_outside_is_written_to(name: str, late: bool) -> None:
    """``logits[:, pad].mul_(…)`` wrote to a copy."""

    def outside(z: Tensor, y: Tensor) -> Tensor:
        before = z.mean() if late else 0.0
        VIEWS[name](z).mul_(0.5)
        return before + F.cross_entropy(z * 1.0, y)

    def program(compiler: Compiler) -> Callable[..., Tensor]:
        inside = compiler(lambda x, w: F.linear(x, w))
        return lambda x, w, y: outside(inside(x, w), y)

    agree(program)


def test_a_narrow_view_that_is_moved_computes_no_logits() -> None:
    x, w, _ = data()
    with collect() as reports:
        z = compiled(F.linear)(x, w)
        moved = z[:, 3].to("meta")
    assert (moved.shape, moved.requires_grad, moved.device.type) == ((N,), True, "meta")
    assert len(reports) == 2
    assert type(z) is not Tensor


@pytest.mark.parametrize("read", ["item", "tolist", "float", "format"])
def test_a_narrow_view_is_read_in_chunks(read: str) -> None:
    reads: dict[str, Callable[[Tensor], Any]] = {
        "item": lambda z: z[1, 2].item(),
        "tolist": lambda z: z[:, 3].tolist(),
        "float": lambda z: float(z[1, 2]),
        "format": lambda z: f"{z[1, 2]:.4f}",
    }
    x, w, _ = data()
    with collect() as reports:
        z = compiled(F.linear)(x, w)
        found = reads[read](z)
    expected = reads[read](F.linear(x, w))
    assert found == (expected if read == "format" else pytest.approx(expected))
    assert [row.strategy for report in reports for row in report.rows] == ["deferred", "forward"]
    assert type(z) is not Tensor


def test_fault_W_a_detached_view_sees_what_is_written_to_the_logits() -> None:
    def outside(z: Tensor) -> Tensor:
        seen = z.detach()
        with torch.no_grad():
            z.mul_(0.5)
        return seen.sum()

    x, w, _ = data()
    torch.testing.assert_close(outside(compiled(F.linear)(x, w)), outside(F.linear(x, w)))


#: Graphs that return logits and a view of them, or two views.
RETURNED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "a row": lambda z: (z, z[1]),
    "a column": lambda z: (z, z[:, 3]),
    "a view": lambda z: (z, z.view(2, -1, V)),
    "the transposed": lambda z: (z, z.T),
    "of a product": lambda z: (z * 2, (z * 2)[3:7]),
    "detached": lambda z: (z, z.detach()),
    "two views": lambda z: (z[:7], z[5:]),
    "written to": lambda z: ((z * 2).mul_(0.5), z.view(-1)),
}


@pytest.mark.parametrize("both", [False, True], ids=["outside", "in a second function"])
@pytest.mark.parametrize("written", [0, 1])
@pytest.mark.parametrize("name", RETURNED)
def test_fault_W_views_that_a_graph_returns(name: str, written: int, both: bool) -> None:
    """Each was a tensor of its own. Inductor keeps them one memory, as eager does."""

    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return RETURNED[name](F.linear(x, w))

    def outside(x: Tensor, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            values[written].mul_(0.5)
        return values[0].logsumexp(-1).sum(), values[1].square().sum()

    def program(compiler: Compiler) -> Callable[..., Any]:
        inside, second = compiler(model), compiler(outside) if both else outside
        return lambda x, w, y: second(x, inside(x, w))

    agree(program)


def test_fault_W_views_that_a_graph_returns_are_chunked() -> None:
    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(x, w)
        return z, z.view(2, -1, V)

    x, w, y = data()
    with collect() as reports:
        z, viewed = compiled(model)(x, w)
        loss = F.cross_entropy(viewed.flatten(0, 1), y) + z.logsumexp(-1).mean()
    torch.testing.assert_close(loss, F.cross_entropy(x @ w.T, y) + (x @ w.T).logsumexp(-1).mean())
    assert not [row for report in reports for row in report.refused]


def test_fault_U_a_view_behind_a_graph_break_is_written_to() -> None:
    """The graph before the break returned a copy of the row."""

    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(x, w)
        return z, z * 1.0

    def outside(z: Tensor, scaled: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        entropy = F.softmax(z, -1).amax(-1)
        scaled[1].mul_(0.5)  # Dynamo breaks here, with scaled[1] made
        return entropy, F.cross_entropy(scaled, y)

    def program(compiler: Compiler) -> Callable[..., Any]:
        first, second = compiler(model), compiler(outside)
        return lambda x, w, y: second(*first(x, w), y)

    agree(program)


def test_fault_U_a_view_of_logits_that_a_second_function_writes_to() -> None:
    """The view's gradient was that of before the write."""

    def outside(z: Tensor, view: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z.mul_(0.5)
        return F.cross_entropy(z, y), view.sum()

    def head(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w) * 2

    def program(compiler: Compiler) -> Callable[..., Any]:
        first, second = compiler(head), compiler(outside)

        def function(x: Tensor, w: Tensor, y: Tensor) -> Any:
            z = first(x, w)
            return second(z, z[3:7], y)

        return function

    agree(program)
