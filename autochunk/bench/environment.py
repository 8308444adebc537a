"""What a result depends on next to the code: the machine and the versions of packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "autochunk",
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "numpy",
)


def hardware(device: str) -> dict[str, Any]:
    """Processor, memory and, where ``device`` is ``cuda``, the accelerator."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["accelerator"] = properties.name
        found["accelerator_memory_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    """Of Python, the system, and the packages that are installed."""
    found = {"python": platform.python_version(), "system": platform.system()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
