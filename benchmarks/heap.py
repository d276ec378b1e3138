"""Count how often glibc gives a freed block to the next request of the same size, with and without an alignment of 64 bytes.

    python benchmarks/heap.py

PyTorch aligns its tensors to 64 bytes. The request is then a little larger than the block, and small objects take the bytes that are
left in front of each block. A process on a kept heap (posttrain/models/allocator.py) can therefore need more than `posttrain plan` counts.
"""

from __future__ import annotations

import ctypes

BLOCK, BLOCKS, ROUNDS = 6 * 2**20, 8, 50
SMALL = (24, 40, 56, 24, 40)
"""Bytes of objects that are allocated after each block and stay."""
KEPT_HEAP = {-3: 2**25, -1: -1, -2: 2**30}
"""Options of mallopt as in posttrain/models/allocator.py: no block of this size is mapped, and freed memory stays."""


def main() -> None:
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    libc.gnu_get_libc_version.restype = ctypes.c_char_p
    for option, value in KEPT_HEAP.items():
        libc.mallopt(option, value)
    print(f"glibc {libc.gnu_get_libc_version().decode()}, blocks of {BLOCK / 2**20:.0f} MiB that are given out again:")
    for name, aligned in (("aligned to 64 bytes", True), ("as malloc gives them", False)):
        print(f"  {name}: {sum(_again(libc, aligned) for _ in range(ROUNDS))} of {BLOCKS * ROUNDS}")


def _again(libc: ctypes.CDLL, aligned: bool) -> int:
    """Allocate blocks with small objects between them, free the blocks, allocate as many, and count those at an address from before."""
    first = []
    for _ in range(BLOCKS):
        first.append(_block(libc, aligned))
        for size in SMALL:
            libc.malloc(size)
    for block in first:
        libc.free(block)
    return len(set(first) & {_block(libc, aligned) for _ in range(BLOCKS)})


def _block(libc: ctypes.CDLL, aligned: bool) -> int:
    if not aligned:
        return int(libc.malloc(BLOCK))
    found = ctypes.c_void_p()
    if libc.posix_memalign(ctypes.byref(found), 64, BLOCK):
        raise MemoryError(f"{BLOCK} bytes")
    return int(found.value or 0)


if __name__ == "__main__":
    main()
