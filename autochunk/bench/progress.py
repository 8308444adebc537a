"""Progress on stderr: a bar on a terminal with ``tqdm``, lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """How far the measurement is.

    Attributes:
        quiet: Whether nothing is shown.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.total = self.done = 0
        self.shown = ""
        self.printed = 0.0
        self.bar: Any = None

    def expect(self, units: int) -> None:
        """Adds units of work to what is to come."""
        self.total += units
        if self.bar is None and not self.quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=self.total, file=sys.stderr, leave=False, unit="step")
        elif self.bar is not None:
            self.bar.total = self.total

    def show(self, what: str) -> None:
        """Says what is being done; as lines not more than one in two seconds."""
        if what == self.shown or self.quiet:
            return
        if self.bar is not None:
            self.bar.set_description_str(what)
        elif time.monotonic() - self.printed > 2:
            self._line(what)
        else:
            return
        self.shown = what

    def advance(self, result: str = "") -> None:
        """One unit is done; ``result`` is kept on the screen."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
            if result:
                self.bar.write(result, file=sys.stderr)
        elif result and not self.quiet:
            self._line(result)

    def close(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _line(self, text: str) -> None:
        self.printed = time.monotonic()
        counted = f"[{self.done}/{self.total}] " if self.total else ""
        print(f"{counted}{text}", file=sys.stderr, flush=True)
