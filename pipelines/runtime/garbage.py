"""Start and end programs with large libraries faster: fewer garbage collections, and none when the interpreter ends.

    python -m pipelines.runtime.garbage MODULE ARGUMENT...    # run a library's module so, e.g. `prefect server start`

Modules and classes of torch, Prefect or MLflow are hundreds of thousands of objects that stay. To search them again and again takes up to a
third of an import, and the interpreter's last collection of them up to a second.
"""

from __future__ import annotations

import atexit
import gc
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
        >>> library_command("dvc", "status")[1:]
        ['-m', 'pipelines.runtime.garbage', 'dvc', 'status']
    """
    return [sys.executable, "-m", "pipelines.runtime.garbage", module, *arguments]


if __name__ == "__main__":  # the package has called collect_rarely
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
