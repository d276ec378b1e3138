"""One flow on workers that share only the network: the lock of one machine, each stage once, a killed worker, and a late one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterName,
)
from prefect.client.schemas.objects import FlowRun

from tasks.dag import read_dag
from tasks.lockfile import sorted_lock
from tasks.pool.record import Record, parse
from tasks.pool.settings import FLOW
from tests.end_to_end.conftest import TINY, Clone
from tests.fleet import Fleet, fleet, until
from tests.s3 import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
SETTINGS = (
    "project.algorithms=[dpo, grpo]", "project.seeds=[0, 1]", "align.on_policy.steps=40", "align.on_policy.measure_kl_every=0",
    "align.checkpoint.every_steps=2",
)  # fmt: skip
STAGES = ("align@dpo-0", "align@dpo-1", "align@grpo-0", "align@grpo-1")
QUICK = {"lease_seconds: 30": "lease_seconds: 10", "checkpoint_seconds: 30": "checkpoint_seconds: 1"}


def attempts(stage: str) -> list[tuple[FlowRun, Record | None]]:
    """Return the flow runs of a stage, and their workers' records, in the order of attempts."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])),
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(like_=stage)),
        )
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id for run in runs]))
        )
    records = {each.flow_run_id: parse(each.data) for each in found}
    return [(run, records.get(run.id)) for run in sorted(runs, key=lambda run: run.name)]


def at_work(stage: str, checkpoint: bool = False) -> str | None:
    """Return the worker that trains the stage, once it runs and, if asked, has a checkpoint in the remote."""
    for run, record in attempts(stage):
        if (
            record
            and run.state
            and run.state.is_running()
            and record.phase == "running"
            and (record.checkpoint or not checkpoint)
        ):
            return record.worker
    return None


@pytest.fixture
def machines(new_clone: Callable[[], Clone], prefect_url: str, tmp_path: Path) -> Iterator[tuple[Fleet, Clone]]:
    """Return a fleet and a copy of its flow's clone for one machine. Both have run the stages before the alignments on one machine."""
    with serving("store") as s3, fleet(tmp_path / "fleet", s3, prefect_url) as made:
        clone = new_clone()
        made.parent.home.mkdir(parents=True)
        shutil.move(clone.root, made.parent.root)
        parent = replace(clone, root=made.parent.root)
        path = parent.root / "infra" / "workers.yaml"
        text = path.read_text()
        for before, after in QUICK.items():
            assert before in text
            text = text.replace(before, after)
        path.write_text(text)
        made.publish("store")
        parent.configure(str(TINY), *SETTINGS)  # is not committed: it travels with each stage
        parent.repro("reward_readers", POSTTRAIN_FOLLOWER="1")
        alone = replace(clone, root=tmp_path / "alone" / "project")
        shutil.copytree(parent.root, alone.root, symlinks=True)
        yield made, alone


def test_workers_write_the_lock_of_one_machine_although_one_is_killed_and_one_is_late(
    machines: tuple[Fleet, Clone],
) -> None:
    made, alone = machines
    parent = made.parent
    reference = alone.start("dvc", "repro", "-q", *STAGES, POSTTRAIN_FOLLOWER="1")
    for name in ("one", "two"):
        made.add(name)
    flow = parent.start("flows.compare", "--no-tracking", *STAGES)

    def alive() -> None:
        assert flow.poll() is None, parent.log()

    def first(*stages: str) -> tuple[str, str]:
        found: list[tuple[str, str]] = []

        def look() -> bool:
            alive()
            found[:] = [(stage, each) for stage in stages if (each := at_work(stage, checkpoint=True))]
            return bool(found)

        until(look, f"{stages} write no checkpoint\n{parent.log()}", 700)
        return found[0]

    begun_first, killed = first("align@grpo-0", "align@grpo-1")
    made.kill(killed)
    made.add("three")
    (second,) = {"align@grpo-0", "align@grpo-1"} - {begun_first}
    _, late = first(second)
    assert late != killed
    os.kill(made.workers[late].pid, signal.SIGSTOP)
    until(lambda: len(attempts(second)) > 1, f"the silent worker keeps its stage\n{parent.log()}")
    os.kill(made.workers[late].pid, signal.SIGCONT)
    assert flow.wait(700) == 0, parent.log()
    assert reference.wait(700) == 0

    order = [name for name, node in read_dag(alone.root).items() if node.kind == "stage"]
    assert (parent.root / "dvc.lock").read_text() == sorted_lock((alone.root / "dvc.lock").read_text(), order)
    assert "up to date" in parent.run("dvc", "status", *STAGES).stdout

    done = {stage: [record for _, record in attempts(stage) if record and record.phase == "done"] for stage in STAGES}
    outcomes = {stage: [record.outcome for record in records] for stage, records in done.items()}
    # the late worker may have ended its training before it saw that the stage is no longer its own; then the next attempt restores the
    # run from DVC's cache of runs
    late_outcome = outcomes[second]
    assert late_outcome in (["ran"], ["restored"])
    assert outcomes == {stage: ["ran"] for stage in STAGES} | {second: late_outcome}
    assert len({record.worker for records in done.values() for record in records}) > 1
    for stage in ("align@grpo-0", "align@grpo-1"):
        (begun, _), *_, (_, last) = attempts(stage)
        assert begun.state is not None
        assert not begun.state.is_completed()
        assert last is not None
        if last.outcome == "ran":
            assert f"{stage} continues from checkpoint" in made.machine(last.worker).log()
    until(lambda: (attempts(second)[0][1] or Record("")).phase == "lost", "the late worker does not give up")
