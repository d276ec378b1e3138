"""The heap in a separate process, since it cannot be given back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.models.allocator import OFF, keep_heap

GRANTED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import json, resource, sys
import torch
from posttrain.models.allocator import give_back_gaps, keep_heap

kept = keep_heap()
torch.set_num_threads(1)
def work():
    for _ in range(5):
        held = [torch.ones(6 * 2**20) for i in range(8)]  # 24 MiB each
        del held
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
huge = [int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
held = [torch.ones(6 * 2**20) for i in range(32)]
del held[::2]  # gaps of 24 MiB between tensors
full = resident()
given = [give_back_gaps(), give_back_gaps()]
gaps = given + [full - resident(), sum(float(each.sum()) for each in held)]
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, sum(huge) / 1024, gaps]))
"""


def measured(wanted: str) -> tuple[bool, int, float, list[float]]:
    """Return if the heap is kept, page faults of reused memory, MiB in huge pages, and if and how many MiB of gaps were returned."""
    environment = os.environ | {OFF: wanted}
    command = [sys.executable, "-c", PROGRAM]
    kept, faults, huge, gaps = json.loads(
        subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    )
    return kept, faults, huge, gaps


@pytest.mark.skipif(
    not GRANTED.exists() or "[madvise]" not in GRANTED.read_text(),
    reason="Linux grants huge pages to nobody, or to all",
)
def test_what_was_freed_is_kept_in_huge_pages() -> None:
    kept, faults, huge, gaps = measured("1")
    assert kept
    assert faults < 500
    assert huge > 100
    first, second, returned, total = gaps
    assert (first, second) == (True, False)  # the process has not grown since
    assert returned > 350
    assert total == 16 * 6 * 2**20
    kept, _, huge, gaps = measured("0")
    assert not kept
    assert huge < 10
    assert gaps[:2] == [False, False]


def test_the_environment_can_turn_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFF, "0")
    assert not keep_heap()
