"""A small DAG on workers with their own clones: the lock of one machine, list and drain, refusal of changed code, and cancelling."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, StateType

from flows.pool import prepare
from flows.workers_page import _times
from posttrain.errors import OrchestrationError
from tasks.pool.record import Record
from tests.fleet import Fleet, small_fleet, until
from tests.s3 import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def small(prefect_url: str, template: Path, root: Path, tmp_path: Path) -> Iterator[Fleet]:
    with serving("store") as s3, small_fleet(tmp_path / "fleet", s3, prefect_url, template, root) as made:
        yield made


def test_a_flow_on_a_worker_gives_the_lock_of_one_machine_and_the_worker_is_seen_and_drained(
    small: Fleet, finished_template: Path
) -> None:
    parent = small.parent
    (parent.root / "work.py").open("a").write("# changed\n")
    refused = parent.run("flows.compare", "--no-tracking", check=False)
    assert refused.returncode == 2
    assert "1 files differ from the commit" in refused.stderr
    assert "(first: work.py)" in refused.stderr
    shutil.copy(finished_template / "work.py", parent.root / "work.py")

    small.add("one", POSTTRAIN_WARM="none")
    printed = parent.run("flows.compare", "--no-tracking").stdout
    assert "4 of 5 stages to bring up to date, by the workers of stages" in printed
    assert printed.count(" started on one\n") == 4
    assert not (parent.root / "times.jsonl").exists()  # nothing ran here
    assert (parent.root / "dvc.lock").read_text() == (finished_template / "dvc.lock").read_text()
    assert (parent.root / "join.txt").read_text() == (finished_template / "join.txt").read_text()
    assert "nothing to do: all 5 stages are up to date" in parent.run("flows.compare", "--no-tracking").stdout

    # a second clone of the project has results without running anything
    (parent.root / "dvc.lock").unlink()
    again = parent.run("flows.compare", "--no-tracking").stdout
    assert again.count("restored from the cache") == 4
    assert (parent.root / "dvc.lock").read_text() == (finished_template / "dvc.lock").read_text()

    (line,) = (line for line in parent.run("flows.workers", "list").stdout.splitlines() if line.startswith("one "))
    assert line.split()[1] == "online"
    assert line.split()[4] == "8"
    seconds = [float(word) for word in line.split()[5::2]]  # running, fetching, waiting, sending, idle
    assert len(seconds) == 5
    assert all(each > 0.0 for each in (seconds[0], seconds[1], seconds[3], seconds[4]))
    wrong = parent.run("flows.workers", "drain", "two", check=False)
    assert "has no worker 'two'. Its workers: one." in wrong.stderr
    assert "one takes no new stage" in parent.run("flows.workers", "drain", "one").stdout
    assert small.workers["one"].wait(120) == 0
    assert "worker one has ended" in small.machine("one").log()


def test_a_pool_that_starts_containers_is_refused(prefect_url: str) -> None:
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="boxes", type="docker"))
    with pytest.raises(OrchestrationError, match="the work pool boxes has the type docker"):
        prepare("boxes")


def test_the_seconds_of_a_stage_at_work_are_not_idle() -> None:
    moment = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)

    def run(began: float, state: StateType) -> FlowRun:
        return FlowRun(flow_id=uuid4(), start_time=moment - timedelta(seconds=began), state_type=state)

    done = Record("one", 1, "done", {"fetching": 2.0, "waiting": 1.0, "running": 20.0, "sending": 3.0})
    at_work = Record("one", 1, "running", {"fetching": 2.0, "waiting": 0.0})
    stages = [(run(100.0, StateType.COMPLETED), done), (run(30.0, StateType.RUNNING), at_work)]
    assert _times(stages, moment) == [20.0 + 28.0, 4.0, 1.0, 3.0, 100.0 - 26.0 - 30.0]
    assert _times([], moment) == [0.0] * 5


def test_cancelling_the_flow_ends_its_stage_on_the_worker(small: Fleet) -> None:
    parent = small.parent
    one = small.add("one", POSTTRAIN_WARM="none", SIDE_SECONDS="600")
    flow = parent.start("flows.compare", "--no-tracking")

    def running() -> bool:
        assert flow.poll() is None, parent.log()
        return any("side-" in log.read_text(errors="replace") for log in one.root.rglob(".posttrain/logs/side@*.log"))

    until(running, f"no side begins\n{parent.log()}", 400)
    flow.send_signal(signal.SIGTERM)
    assert flow.wait(200) == 143
    until(lambda: "not done" in one.log(), "the worker goes on")
    with get_client(sync_client=True) as client:
        states = {
            (run.name, run.state_name) for run in client.read_flow_runs() if run.work_queue_name and run.deployment_id
        }
    assert states & {("side@left", "Cancelled"), ("side@right", "Cancelled")}
    assert not any(
        (tree / f"side-{side}.txt").exists()
        for tree in one.root.glob(".posttrain/worker/tree-*")
        for side in ("left", "right")
    )
    assert small.workers["one"].poll() is None
