"""The whole flow, killed ten times at random, arrives where the undisturbed one does: same lock, same numbers in MLflow."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable

import psutil
import pytest

from tests.end_to_end.conftest import TINY, Clone
from tests.end_to_end.test_pipeline import lock, projected

pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.timeout(7200)]
KILLS = 10
DEMO = "project.algorithms=[dpo, grpo, ppo]"
"""Of params.yaml's eight; everything else is as committed."""


def at_work(clone: Clone) -> int:
    """Bytes that the steps have written into their journals."""
    return sum(path.stat().st_size for path in clone.root.glob(".posttrain/runs/*/journal.jsonl"))


def killed_once(clone: Clone, chance: random.Random, longest_seconds: float) -> bool:
    """Start the flow, let a step get to work, and SIGKILL the flow or one of its processes. Return True if there was a process to kill."""
    flow = clone.start("flows.compare")
    before = at_work(clone)
    while at_work(clone) == before and flow.poll() is None:
        time.sleep(0.05)
    time.sleep(chance.uniform(0, longest_seconds))
    if flow.poll() is not None:
        return False
    family = [psutil.Process(flow.pid), *psutil.Process(flow.pid).children(recursive=True)]
    victim = chance.choice([process for process in family if process.is_running() and process.status() != "zombie"])
    victim.kill()
    if victim.pid != flow.pid:
        # the flow sees a stage or a helper die; whether it goes on or stops, it must do so by itself
        try:
            flow.wait(chance.uniform(0, longest_seconds))
        except subprocess.TimeoutExpired:
            flow.kill()
    flow.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    return True


def numbers(clone: Clone) -> dict[str, tuple[object, ...]]:
    """Return every run in MLflow without its artifacts: a step whose helper was killed keeps the traceback of that attempt."""
    return {run: tuple(found)[:3] for run, found in projected(clone).items()}


def survive(clone: Clone, longest_seconds: float) -> None:
    """Ten kills, then the flow to its end."""
    chance = random.Random(0)
    kills = sum(killed_once(clone, chance, longest_seconds) for _ in range(KILLS))
    assert kills == KILLS, "the flow was done before it could be killed so often"
    finish(clone)


def finish(clone: Clone) -> None:
    clone.run("flows.compare")
    clone.run("pipelines.commands.sync")


def test_ten_kills_change_nothing(reproduced: Clone, new_clone: Callable[[], Clone]) -> None:
    other = new_clone()
    other.configure(str(TINY))
    survive(other, 2)
    assert lock(other) == lock(reproduced)
    assert numbers(other) == numbers(reproduced)


def test_ten_kills_of_the_demo_change_nothing(new_clone: Callable[[], Clone]) -> None:
    undisturbed, other = new_clone(), new_clone()
    for clone in (undisturbed, other):
        clone.configure(DEMO)
    finish(undisturbed)
    survive(other, 20)
    assert lock(other) == lock(undisturbed)
    assert numbers(other) == numbers(undisturbed)
