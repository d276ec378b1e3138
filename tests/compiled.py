"""Byte code of the project and of its tests, made once for the many processes that tests start.

Where PYTHONDONTWRITEBYTECODE is set, as tests set it for their processes, each would compile a hundred modules again: 0.05 to 0.1 s.
"""

import compileall
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.assertion import AssertionState, rewrite

PACKAGES = ("flows", "infra", "pipelines", "posttrain", "tasks")


def compile_project(root: Path) -> None:
    """Compile what has changed."""
    for package in PACKAGES:
        compileall.compile_dir(root / package, quiet=2)


def rewrite_tests(root: Path, config: pytest.Config) -> None:
    """Write the tests with pytest's assertions as byte code. Otherwise each of pytest's workers rewrites all files, in 4 s."""
    state = AssertionState(config, "rewrite")
    for path in sorted((root / "tests").rglob("*.py")):
        if path.name.startswith("test_") or path.name == "conftest.py":
            folder = rewrite.get_cache_dir(path)
            folder.mkdir(exist_ok=True)
            cached = folder / (path.name.removesuffix(".py") + rewrite.PYC_TAIL)
            if rewrite._read_pyc(path, cached, state.trace) is None:
                source, code = rewrite._rewrite_test(path, config)
                rewrite._write_pyc(state, code, source, cached)


def in_parallel(*functions: Callable[[], object]) -> None:
    """Run the functions in forks of this process, and wait for all of them."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=function) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def copy_compiled(root: Path, clone: Path) -> None:
    """Copy byte code into a clone. It is valid there as long as the sources have the times and sizes of the originals."""
    for package in PACKAGES:
        for folder in sorted((root / package).rglob("__pycache__")):
            shutil.copytree(folder, clone / folder.relative_to(root))
