"""Keep freed memory in the process, in huge pages, so that CPU training does not wait for the allocator.

A training step allocates and frees some megabytes thousands of times. By default glibc returns large blocks to the system. The system
fills each of them with zeros on the next request, and 4 KiB pages of that many bytes exceed the TLB.
"""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path
from typing import Any

OFF = "POSTTRAIN_HUGE_PAGES"
"""Environment variable: 0 leaves the allocator unchanged, for a custom allocator or if freed memory must return to the system at once."""
TOP_PAD, MMAP_THRESHOLD, TRIM_THRESHOLD, FAST_BLOCKS = -2, -3, -1, 1
"""Option numbers of glibc's mallopt."""
GROWTH = 2**23
"""Bytes by which a process must have outgrown its size before the last time, until gaps are given back again."""
GREATEST_HEAP_BLOCK = 2**25
"""Bytes. glibc maps larger blocks one by one, whatever the options say."""
RESERVED = 2**31 - 2**21
"""Bytes of address space (not memory) by which the heap grows at once; only these can be in huge pages."""
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14
_greatest: list[int] = []
"""Resident bytes of this process before gaps were last given back; empty if the heap is not kept."""


def keep_heap() -> bool:
    """Keep freed memory in this process and ask Linux for huge pages. Return True if huge pages are active.

    The process returns memory only by `give_back_gaps`. Freed small blocks join their neighbours at once: PyTorch aligns its tensors, and a
    freed tensor's memory fits the next one of its size only together with the few bytes in front of it. glibc also sets small blocks
    aside for each thread, which only GLIBC_TUNABLES=glibc.malloc.tcache_count=0 prevents, read when a process starts. It does nothing
    without glibc.
    """
    if os.environ.get(OFF) == "0":
        return False
    try:
        libc = _libc()
        mallopt, malloc, free, madvise = libc.mallopt, libc.malloc, libc.free, libc.madvise
    except (OSError, AttributeError):
        return False
    malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    options = ((MMAP_THRESHOLD, GREATEST_HEAP_BLOCK), (TRIM_THRESHOLD, -1), (TOP_PAD, RESERVED), (FAST_BLOCKS, 0))
    for option, value in options:
        if not mallopt(option, value):
            return False
    free(malloc(GREATEST_HEAP_BLOCK - 4096))  # the heap must have grown before its pages can be advised
    advised = [madvise(start, end - start, MADV_HUGEPAGE) == 0 for start, end in _heap()]
    _greatest[:] = [0]
    return bool(advised) and all(advised)


def give_back_gaps() -> bool:
    """Return free pages inside a kept heap to the system if this process has outgrown its size; return True if there were any.

    Some gaps are never used again, because no later tensor fits into them. A process whose steps are alike soon stops to grow, and then
    this only reads a number: pages that are given back in every step would have to be filled with zeros in every step.
    """
    if not _greatest:
        return False
    resident = _resident()
    if resident < _greatest[0] + GROWTH:
        return False
    _greatest[0] = resident
    return bool(_libc().malloc_trim(ctypes.c_size_t(RESERVED)))  # the top of the heap stays: it has no gaps


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def _libc() -> Any:
    return ctypes.CDLL("libc.so.6", use_errno=True)


def _heap() -> list[tuple[int, int]]:
    """Return the first and last address of the whole huge pages in each area of the heap."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    areas = [[int(n, 16) for n in line[0].split("-")] for line in lines if line[-1] == "[heap]"]
    whole = [(-(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE) for start, end in areas]
    return [(start, end) for start, end in whole if start < end]
