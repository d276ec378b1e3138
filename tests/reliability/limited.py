"""Run a module under limits of the system, or as a user who owns nothing:

    python -m tests.reliability.limited FSIZE=1000,NOFILE=20 pipelines.sft
    python -m tests.reliability.limited NOBODY=1,NPROC=40 pipelines.sft
    python -m tests.reliability.limited NOBODY=files,NPROC=40 pipelines.sft

FSIZE is the largest size of a file in bytes: a write beyond it fails as on a full disk. `NOBODY=files` keeps root's right to any file
(CAP_DAC_OVERRIDE), also in child processes: the interpreter may be in root's home. Limits of processes bind such a user, but modes do not.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import runpy
import sys

NOBODY = 65534
LATE = (
    "mlflow",
    "encodings.raw_unicode_escape",
    "sqlalchemy.dialects.sqlite",
    "mlflow.store.tracking.sqlalchemy_store",
)
"""Modules that commands import while they run."""


DAC_OVERRIDE = 1
KEEPCAPS, AMBIENT, RAISE = 8, 47, 2
"""Numbers of linux/capability.h and linux/prctl.h."""
CAPABILITY_VERSION = 0x20080522


def give_up_root(*, files: bool) -> None:
    """Become nobody, with root's right to any file if `files`. Raises OSError if root does not have that right itself."""
    libc = ctypes.CDLL(None, use_errno=True)
    if files:
        _check(libc.prctl(KEEPCAPS, 1, 0, 0, 0))
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    if files:
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
        kept = 1 << DAC_OVERRIDE
        _check(libc.capset(header, (ctypes.c_uint32 * 6)(kept, kept, kept, 0, 0, 0)))
        _check(libc.prctl(AMBIENT, RAISE, DAC_OVERRIDE, 0, 0))


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), "a capability cannot be kept")


def limit(words: str) -> None:
    """Set the limits, and give up root's rights if the words name NOBODY."""
    for name, _, value in (word.partition("=") for word in words.split(",")):
        if name == "NOBODY":
            give_up_root(files=value == "files")
        else:
            number = getattr(resource, f"RLIMIT_{name}")
            resource.setrlimit(number, (int(value), resource.getrlimit(number)[1]))


if __name__ == "__main__":
    words, sys.argv = sys.argv[1], sys.argv[2:]
    importlib.import_module(sys.argv[0])  # as a user who may read the interpreter's own files
    for name in LATE:
        if sys.argv[0].startswith("pipelines.commands"):
            importlib.import_module(name)
    limit(words)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
