"""The heap in a process of its own, since it cannot be given back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from posttrain.models.heap import keep_heap

if sys.argv[1] == "kept":
    assert keep_heap()
torch.set_num_threads(1)
def work():
    for _ in range(50):
        kept = [torch.ones(2**19 + 1000 * i) for i in range(8)]
        del kept
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    return int(subprocess.run([sys.executable, "-c", PROGRAM, way], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in str(os.confstr("CS_GNU_LIBC_VERSION")), reason="no glibc"
)
def test_memory_that_was_freed_is_not_asked_for_again() -> None:
    assert 8 * faults("kept") < faults("plain")


def test_the_environment_can_turn_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.models.heap import OFF, keep_heap

    monkeypatch.setenv(OFF, "0")
    assert not keep_heap()
