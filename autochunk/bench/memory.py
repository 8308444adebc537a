"""Peak memory of the process it runs in, and a limit on it.

On a CPU both come from the Linux kernel, on CUDA from PyTorch's caching allocator.
"""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import torch

MIB = 2**20

#: glibc keeps freed tensors of up to 32 MiB on its heap, where holes between them count as resident
#: (up to 200 MiB were seen, another number in each run), because its threshold for that grows from
#: 128 KiB on. Fixed there, every larger tensor has pages of its own, and the peak repeats to
#: 0.1 MiB.
PEAK_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}


class PeakMemory:
    """Peak memory between ``start()`` and ``stop()``.

    On the CPU it is the kernel's high-water mark of the process's resident memory, which is reset
    by ``start``; on CUDA it is the caching allocator's.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.base = 0

    def start(self) -> None:
        """Counts from here on; ``base`` is what is held now, in bytes."""
        give_back()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return
        Path("/proc/self/clear_refs").write_text("5")
        self.base = status_bytes("VmRSS")

    def stop(self) -> tuple[int, int]:
        """(bytes above what was held at ``start``, bytes in total)."""
        if self.cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = status_bytes("VmHWM")
        return peak - self.base, peak


def give_back() -> None:
    """Collects garbage, and has the C library return what it keeps of freed memory."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def status_bytes(name: str) -> int:
    """A size from ``/proc/self/status``, as ``VmRSS``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def peak_is_readable() -> bool:
    """Whether this system can tell the peak of a process on the CPU."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def limit_data(data_bytes: int) -> None:
    """Limits the private writable memory that this process may map, mapped memory included.

    That is ``VmData`` of ``/proc/self/status``: heap and anonymous memory, thus every tensor on the
    CPU, but neither libraries nor stacks. An allocation beyond the limit fails with an error that
    PyTorch raises, where a limit on resident memory would have the kernel kill the process.

    Args:
        data_bytes: The limit; a later call may raise it again.

    Raises:
        RuntimeError: if the system does not enforce it.
    """
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, hard))
    try:
        # Never touched, so that it costs nothing where the limit is not enforced.
        torch.empty(max(data_bytes - status_bytes("VmData"), 0) + 64 * MIB, dtype=torch.uint8)
    except RuntimeError:
        return
    raise RuntimeError("this system does not enforce a limit on memory (RLIMIT_DATA)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation did not fit."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    signs = (
        "can't allocate memory",
        "cannot allocate memory",
        "out of memory",
        "bad_alloc",
        "not enough memory",
    )
    return any(sign in text for sign in signs)
