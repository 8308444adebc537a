"""Every entry of the gallery: chunked or refused as listed, and as exact as unchunked."""

from __future__ import annotations

import pytest
import torch
from compare import check, run, widened
from gallery import GALLERY, Sizes

import autochunk

OPTIONS = {"num_chunks": 3, "min_bytes": 0, "strict": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("entry", GALLERY, ids=lambda e: e.name)
def test_gallery(entry, dtype, no_codegen):
    inputs = entry.inputs(Sizes(), dtype)
    explained = []

    def chunked(*args):
        explained.append(autochunk.explain(entry.function, options=OPTIONS)(*args))
        return explained[0].result

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=entry.unbacked):
        actual = run(chunked, inputs)
    found = {r.refusal.code for r in explained[0].refused}
    if entry.expect == "chunked":
        assert not found, str(explained[0])
        assert explained[0].chunked, str(explained[0])
    else:
        assert found == {entry.expect}, str(explained[0])
    exact = run(entry.function, widened(inputs))
    check(actual, run(entry.function, inputs), exact, dtype)


def test_kernel_that_inductor_cannot_overwrite_an_input_in():
    """Inductor's C++ backend fails on the kernel (pytorch/pytorch#196570); it is made without."""
    (entry,) = (e for e in GALLERY if e.name == "total_variation")
    inputs = entry.inputs(Sizes(batch=4, time=64, hidden=64, vocabulary=4096), torch.float32)
    chunked = torch.compile(entry.function, backend="autochunk", options=OPTIONS)
    actual = run(chunked, inputs)
    check(actual, run(entry.function, inputs), run(entry.function, widened(inputs)), torch.float32)
