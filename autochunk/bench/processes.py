"""Child processes: started with an order, heard line by line, ended with all they started."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class End:
    """How a child process ended.

    Attributes:
        complete: Whether it did all it was told to.
        reason: If not, why, in one line.
        signal: The signal that ended it, if one did.
        timed_out: Whether it was ended for being silent too long.
    """

    complete: bool
    reason: str = ""
    signal: int | None = None
    timed_out: bool = False


def run_child(
    order: Mapping[str, Any],
    hear: Callable[[dict[str, Any]], None],
    timeout_seconds: float,
    environment: Mapping[str, str],
    until: float | None = None,
) -> End:
    """Runs ``autochunk.bench.child`` to its end.

    Args:
        order: What it reads.
        hear: Called with each event.
        timeout_seconds: A child that says nothing for so long is ended.
        environment: Added to this process's own.
        until: Time (as ``time.time``) at which the child is ended in any case.
    """
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "autochunk.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment},
            start_new_session=True,  # so that its compiler processes can be ended with it
        )
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_read, args=(child, lines), daemon=True).start()
        complete = timed_out = False
        wait_seconds = 0.0
        try:
            _tell(child, json.dumps(order))
            while not complete and (line := lines.get(timeout=_wait(timeout_seconds, until))):
                event = json.loads(line)
                complete = event["event"] == "end"
                hear(event)
            wait_seconds = 30.0
        except queue.Empty:
            timed_out = True
        finally:
            _end(child, wait_seconds)
        if complete:
            return End(True)
        if timed_out:
            return End(False, f"no answer within {timeout_seconds:g} s", timed_out=True)
        errors.seek(0)
        return _ended(child.returncode, errors.read())


def _wait(timeout_seconds: float, until: float | None) -> float:
    return timeout_seconds if until is None else max(min(timeout_seconds, until - time.time()), 0)


def _tell(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended; its status says so
        child.stdin.write(line + "\n")
        child.stdin.flush()


def _read(child: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put("")


def _end(child: subprocess.Popen[str], wait_seconds: float) -> None:
    """Waits a moment, then ends the child and all processes of its session."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(wait_seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _ended(status: int, text: str) -> End:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1][:200] if lines else ""
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", as the kernel does where memory runs out" if -status == signal.SIGKILL else ""
        return End(False, f"the process was ended by {name}{hint}", signal=-status)
    return End(False, last or f"the process ended with status {status}")
