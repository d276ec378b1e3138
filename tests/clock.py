"""A wall clock that tests set while a process runs: a small library that is loaded before the C library. Needs a C compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long long offset(void) {  /* seconds, read anew each time */
    const char *path = getenv("TEST_CLOCK");
    char text[32] = {0};
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return 0;
    if (read(file, text, sizeof text - 1) < 0) text[0] = 0;
    close(file);
    return atoll(text);
}
int clock_gettime(clockid_t kind, struct timespec *now) {
    int status = (int)syscall(SYS_clock_gettime, kind, now);
    if (status == 0 && (kind == CLOCK_REALTIME || kind == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
    return status;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (out) *out = found.tv_sec;
    return found.tv_sec;
}
"""
COMPILER = shutil.which("cc")
NEEDED = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
DAY = 86_400


class Clock:
    """`variables` give a process and its children this clock. The time since the machine's start, and times of files, are the true ones."""

    def __init__(self, folder: Path) -> None:
        assert COMPILER is not None
        library, self._file = folder / "clock.so", folder / "clock"
        source = folder / "clock.c"
        source.write_text(SOURCE)
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
        self.variables = {"LD_PRELOAD": str(library), "TEST_CLOCK": str(self._file)}
        self.jump_to(0)

    def jump_to(self, seconds: int) -> None:
        """Set the distance from the true time."""
        partial = self._file.with_suffix(".new")
        partial.write_text(str(seconds))
        partial.replace(self._file)


def shifted(folder: Path, seconds: int) -> dict[str, str]:
    """Return the variables of a process whose clock is always this far from the true time; `folder` is made."""
    folder.mkdir()
    clock = Clock(folder)
    clock.jump_to(seconds)
    return clock.variables
