"""Processes of several hosts meet before they connect, and hear from one that fails at its start."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipelines.runtime import meeting
from pipelines.runtime.meeting import Place, meet, report, tell
from posttrain.errors import OrchestrationError
from posttrain.network import free_port


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(meeting, "_MET", [False])


def places(world: int) -> list[Place]:
    port = free_port()
    return [Place(rank, world, "127.0.0.1", port, rank == 0) for rank in range(world)]


def together(*works: Callable[[], None]) -> list[Any]:
    """Run all at once in threads; return the message of each, None for one that went on."""

    def outcome(work: Callable[[], None]) -> str | None:
        try:
            work()
        except OrchestrationError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(works)) as threads:
        return list(threads.map(outcome, works))


def test_all_go_on_when_the_last_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = places(3)
    came: list[int] = []

    def late() -> None:
        time.sleep(0.1)
        came.append(3)
        meet(30, third)

    def early(place: Place) -> None:
        meet(30, place)
        assert came == [3]

    assert together(lambda: early(first), lambda: early(second), late) == [None] * 3


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_reason_of_one_ends_the_others(failing: int) -> None:
    every = places(3)

    def work(place: Place) -> Callable[[], None]:
        if place.rank == failing:
            return lambda: tell(place, f"process {failing} on host: error: no table data/valid/sft.parquet")
        return lambda: meet(30, place)

    found = together(*map(work, every))
    assert found.pop(failing) is None
    assert len(set(found)) == 1
    assert "failed at its start, so this one cannot go on. process" in found[0]
    assert found[0].endswith("no table data/valid/sft.parquet")


def test_one_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(meeting, "QUIET_SECONDS", 0.05)
    first, second, _ = places(3)
    found = together(lambda: meet(0.5, first), lambda: meet(0.5, second))
    assert any("process 2 of 3 has not come within" in message for message in found)
    assert capsys.readouterr().err.count("waiting for process 2 of 3\n") == 2
    (message,) = together(lambda: meet(0.2, places(2)[1]))
    assert message.startswith("rank 0 at 127.0.0.1:")


def test_a_step_reports_only_to_other_hosts_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(meeting, "tell", lambda place, words: said.append(f"{place.rank} {words}"))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    report("one process")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    report("one host")
    meet(0.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for name, value in (("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "5")):
        monkeypatch.setenv(name, value)
    report(f"{meeting.HEARD}, so this one cannot go on. process 0: no table")
    assert said == []
    report("no table")
    assert said == [f"1 process 1 on {os.uname().nodename}: no table"]
    monkeypatch.setattr(meeting, "_MET", [True])
    report("later")
    assert len(said) == 1
