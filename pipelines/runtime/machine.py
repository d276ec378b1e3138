"""Facts about this machine by calls that every supported system has, and the refusal of a part that needs Linux."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

from posttrain.errors import OrchestrationError


def available_cores() -> int:
    """Return the number of CPU cores that this process may use; all cores if the system cannot restrict them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_resident_mib() -> float:
    """Return the most memory that this process has held, in MiB.

    Linux lets a program inherit the number of `getrusage` from the one that started it, so its own is read from /proc. `getrusage` counts
    bytes on macOS, KiB elsewhere.
    """
    if sys.platform.startswith("linux"):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        own = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        if own:  # a sandbox may not count it
            return own[0] / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def require_stage_guard() -> None:
    """Raise OrchestrationError if this system lacks the calls with which a flow guards its stages."""
    if sys.platform.startswith("linux") and hasattr(signal, "sigtimedwait"):
        return
    raise OrchestrationError(
        f"flows need Linux, and this system is {sys.platform}: a flow guards its stages with signals of Linux, so that none stays"
        " behind when it is killed. Type `dvc repro` to run the same stages here without a flow, or start this command in a Linux"
        " container (infra/Dockerfile, target cpu)."
    )
