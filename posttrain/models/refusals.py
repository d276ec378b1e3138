"""Decide which errors of a trial count as a refusal by the device, so that a slower way computes, and which end the run.

Example:
    >>> counts(RuntimeError("FlashAttention only supports Ampere GPUs or newer."))
    True
    >>> counts(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    False
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from posttrain.errors import memory_fault
from posttrain.text import reason_of

PACKAGE = Path(__file__).resolve().parent.parent
_LOST = re.compile(
    r"CUDA error: (?:an illegal|device-side assert|unspecified launch|misaligned|invalid program counter|uncorrectable)"
)
"""Errors after which CUDA refuses every further call of the process; each may have been raised by an earlier kernel."""


def ends(error: BaseException) -> bool:
    """Return True for a lack of memory and a lost device, of which no way of computing is free."""
    return bool(memory_fault(error) or _LOST.search(str(error)))


def counts(error: BaseException) -> bool:
    """Return True if a kernel's error is a refusal: neither one that `ends` the run, nor a failed assertion of this package."""
    if ends(error):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    own = bool(frames) and _is_own(frames[-1].filename)
    return not (isinstance(error, AssertionError) and own)


def refused(error: BaseException) -> str:
    """Return type and first line of an error, and the line of this package at which it was raised or came out of a library."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame.filename)]
    if not own:
        return reason_of(error)
    place = Path(own[-1].filename).relative_to(PACKAGE.parent).as_posix()
    return f"{reason_of(error)}, at {place}:{own[-1].lineno}"


def _is_own(filename: str) -> bool:
    return Path(filename).is_relative_to(PACKAGE)
