"""Run a module under limits of the system, or as a user who owns nothing:

    python -m tests.reliability.limited FSIZE=1000,NOFILE=20 pipelines.sft
    python -m tests.reliability.limited NOBODY=1,NPROC=40 pipelines.sft

FSIZE is the largest size of a file in bytes: a write beyond it fails as on a full disk.
"""

from __future__ import annotations

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


def limit(words: str) -> None:
    """Set the limits, and give up root's rights if the words name NOBODY."""
    for name, _, value in (word.partition("=") for word in words.split(",")):
        if name == "NOBODY":
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
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
