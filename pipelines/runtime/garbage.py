"""Start and end programs with large libraries faster: fewer garbage collections, and none when the interpreter ends.

    python pipelines/runtime/garbage.py MODULE ARGUMENT...    # run a library's module so, e.g. `prefect server start`

Modules and classes of torch, Prefect or MLflow are hundreds of thousands of objects that stay. To search them again and again takes up to a
third of an import, and the interpreter's last collection of them up to a second. This file imports only the standard library, so that it
runs as a script in any folder.
"""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import sys

USUAL: list[tuple[int, int, int]] = []
"""The thresholds before the first `collect_rarely`."""


def collect_rarely() -> None:
    """Collect garbage rarely from now on, and not when the interpreter ends."""
    USUAL.append(gc.get_threshold())
    gc.set_threshold(50_000, 20, 50)
    atexit.register(gc.freeze)


def collect_as_usual() -> None:
    """Undo `collect_rarely` for the objects that are made from now on; those that exist are not searched any more."""
    if USUAL:
        gc.freeze()
        gc.set_threshold(*USUAL[0])


def library_command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs a library's module with few collections.

    Example:
        >>> library_command("dvc", "status")[-2:]
        ['dvc', 'status']
    """
    return [sys.executable, __file__, module, *arguments]


def _run_library() -> None:
    """Run the module that the arguments name, as `python -m` does."""
    collect_rarely()
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd()  # in place of this script's folder
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run_library()
