"""Every public module of posttrain has a runnable example, and every example gives the numbers that it shows."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import posttrain

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
WITHOUT_EXAMPLE = {
    "posttrain.guard": "ends the process or its group",
    "posttrain.models.allocator": "changes the memory allocator of the process",
    "posttrain.models.compiled": "needs a C++ compiler",
}

NEEDS_TRITON = {"posttrain.models.head_kernels"}
"""Modules that import a package which PyTorch brings for GPUs only; tests/models/test_head_kernels.py tests them if it is installed."""


def _modules() -> list[ModuleType]:
    every = {module.name for module in pkgutil.walk_packages(posttrain.__path__, "posttrain.")}
    assert every >= NEEDS_TRITON
    names = sorted(every - NEEDS_TRITON)
    return [posttrain, *map(importlib.import_module, names)]


def _examples(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


def test_every_public_module_has_an_example() -> None:
    packages = {module.__name__ for module in _modules() if hasattr(module, "__path__")}
    without = {module.__name__ for module in _modules() if not _examples(module)} - packages
    assert without == set(WITHOUT_EXAMPLE)


def test_every_example_gives_what_it_shows() -> None:
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    said: list[str] = []
    for module in _modules():
        for test in _examples(module):
            runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
    assert runner.tries > 100
