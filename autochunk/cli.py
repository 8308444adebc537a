"""The command ``autochunk``, also as ``python -m autochunk``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from autochunk.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    Args:
        argv: Arguments without the program's name; those of the process if None.
    """
    from autochunk.bench.cli import add_command

    parser = argparse.ArgumentParser(
        prog="autochunk",
        description="Trains language models without materialising their logits.",
    )
    parser.add_argument("--version", action="version", version=f"autochunk {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    given = list(sys.argv[1:] if argv is None else argv)
    add_command(subparsers, given)
    args = parser.parse_args(given)
    return int(args.run(args))
