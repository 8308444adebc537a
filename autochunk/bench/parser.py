"""The options of ``autochunk bench``; ``arguments.py`` checks them."""

from __future__ import annotations

import argparse
from pathlib import Path

from autochunk.bench.losses import LOSSES
from autochunk.bench.methods import METHODS

_DESCRIPTION = """\
Forward and backward pass of a language model's head: hidden states, the vocabulary projection and
a loss. Prints time, peak memory and accuracy of several methods side by side.

  autochunk bench                                          five vocabularies, all methods
  autochunk bench --vocabulary 128256 --pareto 64 256 1024
  autochunk bench --breaking-point vocabulary --memory-limit 2GiB
  autochunk bench --suite gpu --json gpu.json              on a CUDA machine, within 8 minutes
  autochunk bench --list                                   methods and losses

Options of a method follow its name: --methods inductor autochunk:chunk_rows=256,strategy=recompute
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``autochunk bench``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _DESCRIPTION
    head = parser.add_argument_group("the head (every combination is measured)")
    head.add_argument(
        "--vocabulary",
        type=int,
        nargs="+",
        metavar="N",
        help="rows of the weight (10000 to 100000)",
    )
    head.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="N",
        help="rows of the hidden states (cpu 1024, cuda 8192)",
    )
    head.add_argument(
        "--hidden", type=int, nargs="+", metavar="N", help="columns of both (cpu 512, cuda 2048)"
    )
    head.add_argument("--dtype", nargs="+", metavar="DTYPE", help="bfloat16, float16, float32")
    head.add_argument(
        "--loss", nargs="+", metavar="LOSS", help=f"{', '.join(LOSSES)} (cross_entropy)"
    )
    head.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--methods", nargs="+", metavar="METHOD", help=f"{', '.join(METHODS)} (all of them)"
    )
    how.add_argument("--repeats", type=int, help="timed steps of each (cpu 5, cuda 20)")
    how.add_argument("--warmup", type=int, default=2, help="steps before (%(default)s)")
    how.add_argument("--no-accuracy", action="store_true", help="no comparison with float64")
    how.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="ends a child process that is silent for so long (600; suite: 180)",
    )
    how.add_argument("--time-limit", type=float, metavar="SECONDS", help="begins nothing after it")
    what = parser.add_argument_group("instead of, or next to, the table")
    what.add_argument(
        "--pareto",
        type=int,
        nargs="+",
        metavar="ROWS",
        help="autochunk with these chunk sizes, marking those that others beat in time and memory",
    )
    what.add_argument(
        "--breaking-point", choices=["vocabulary", "tokens"], help="the largest that fits"
    )
    what.add_argument("--memory-limit", metavar="BYTES", help="for it, as 2GiB")
    what.add_argument("--granularity", type=int, metavar="N", help="for it (4096; tokens: 256)")
    what.add_argument(
        "--largest", type=int, metavar="N", help="ends it there: what fits more is not tried"
    )
    what.add_argument("--suite", choices=["gpu"], help="heads of known models and a whole model")
    what.add_argument("--dry-run", action="store_true", help="the suite, tiny and on the CPU")
    what.add_argument("--list", action="store_true", help="lists methods and losses")
    out = parser.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="FILE", help="all raw results")
    out.add_argument("--charts", type=Path, metavar="DIR", help="PNG files (needs matplotlib)")
    out.add_argument("--quiet", action="store_true", help="no progress on stderr")
