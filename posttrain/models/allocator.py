"""Memory for tensors that come and go with every operator: kept by the process, in huge pages.

Training on a CPU allocates and frees some megabytes thousands of times a step. By default glibc hands large blocks back to the system,
which fills each with zeros when it is asked for again, and pages of 4 KiB exceed what the processor remembers of addresses.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

OFF = "POSTTRAIN_HUGE_PAGES"
"""Environment: 0 leaves the allocator as it is, for whoever brings one or needs freed memory back at once."""
TOP_PAD, MMAP_THRESHOLD, TRIM_THRESHOLD = -2, -3, -1
"""Of glibc's mallopt."""
GREATEST_HEAP_BLOCK = 2**25
"""Larger blocks are mapped one by one whatever is asked for."""
RESERVED = 2**31 - 2**21
"""Addresses, not memory: by how much the heap grows at once, and what of it may be in huge pages."""
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14


def keep_heap() -> bool:
    """Let this process keep what it frees, and its heap be of huge pages where Linux grants them. Whether that is so.

    Costs no memory that was not used before, but does not give any back until the process ends. Does nothing where there is no glibc.
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
    free(malloc(GREATEST_HEAP_BLOCK - 4096))  # lets the heap grow
    advised = [madvise(start, end - start, MADV_HUGEPAGE) == 0 for start, end in _heap()]
    return bool(advised) and all(advised)


def _heap() -> list[tuple[int, int]]:
    """First and last address of whole huge pages in each of the heap's areas."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    areas = [[int(n, 16) for n in line[0].split("-")] for line in lines if line[-1] == "[heap]"]
    whole = [(-(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE) for start, end in areas]
    return [(start, end) for start, end in whole if start < end]
