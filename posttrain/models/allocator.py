"""Keep freed memory in the process, in huge pages, so that CPU training does not wait for the allocator.

A training step allocates and frees some megabytes thousands of times. By default glibc returns large blocks to the system. The system
fills each of them with zeros on the next request, and 4 KiB pages of that many bytes exceed the TLB.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

OFF = "POSTTRAIN_HUGE_PAGES"
"""Environment variable: 0 leaves the allocator unchanged, for a custom allocator or if freed memory must return to the system at once."""
TOP_PAD, MMAP_THRESHOLD, TRIM_THRESHOLD = -2, -3, -1
"""Option numbers of glibc's mallopt."""
GREATEST_HEAP_BLOCK = 2**25
"""Bytes. glibc maps larger blocks one by one, whatever the options say."""
RESERVED = 2**31 - 2**21
"""Bytes of address space (not memory) by which the heap grows at once; only these can be in huge pages."""
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14


def keep_heap() -> bool:
    """Keep freed memory in this process and ask Linux for huge pages. Return True if huge pages are active.

    This costs no memory that was not used before, but the process returns none until it ends. It does nothing without glibc.
    """
    if os.environ.get(OFF) == "0":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6", use_errno=True)
        mallopt, malloc, free, madvise = libc.mallopt, libc.malloc, libc.free, libc.madvise
    except (OSError, AttributeError):
        return False
    malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for option, value in ((MMAP_THRESHOLD, GREATEST_HEAP_BLOCK), (TRIM_THRESHOLD, -1), (TOP_PAD, RESERVED)):
        if not mallopt(option, value):
            return False
    free(malloc(GREATEST_HEAP_BLOCK - 4096))  # the heap must have grown before its pages can be advised
    advised = [madvise(start, end - start, MADV_HUGEPAGE) == 0 for start, end in _heap()]
    return bool(advised) and all(advised)


def _heap() -> list[tuple[int, int]]:
    """Return the first and last address of the whole huge pages in each area of the heap."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    areas = [[int(n, 16) for n in line[0].split("-")] for line in lines if line[-1] == "[heap]"]
    whole = [(-(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE) for start, end in areas]
    return [(start, end) for start, end in whole if start < end]
