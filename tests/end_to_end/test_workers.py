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
    ArtifactFilterType,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterName,
)
from prefect.client.schemas.objects import FlowRun

from tasks.dag import read_dag
from tasks.lockfile import sorted_lock
from tasks.pool.record import TYPE, Record, parse
from tasks.pool.settings import FLOW
from tests.end_to_end.conftest import TINY, Clone
from tests.end_to_end.held import HELD, QUICK, SETTINGS
from tests.fleet import Fleet, fleet, until
from tests.s3 import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
GRPO = ("align@grpo-0", "align@grpo-1")
STAGES = ("align@dpo-0", "align@dpo-1", *GRPO)


def attempts(stage: str) -> list[tuple[FlowRun, Record | None]]:
    """Return the flow runs of a stage, and their workers' records, in the order of attempts."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])),
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(like_=stage)),
        )
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(  # a state that holds an error has an artifact too
                flow_run_id=ArtifactFilterFlowRunId(any_=[run.id for run in runs]), type=ArtifactFilterType(any_=[TYPE])
            )
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


def done_by(worker: str) -> set[str]:
    """Return the stages that a worker has finished."""
    records = {stage: [record for _, record in attempts(stage) if record] for stage in STAGES}
    return {stage for stage, found in records.items() if any((r.worker, r.phase) == (worker, "done") for r in found)}


@pytest.fixture
def machines(new_clone: Callable[[], Clone], prefect_url: str, tmp_path: Path) -> Iterator[tuple[Fleet, Clone]]:
    """Return a fleet and a copy of its flow's clone for one machine. Both have run the stages before the alignments on one machine."""
    with serving("store") as s3, fleet(tmp_path / "fleet", s3, prefect_url) as made:
        clone = new_clone()
        made.parent.home.mkdir(parents=True)
        shutil.move(clone.root, made.parent.root)
        parent = replace(clone, root=made.parent.root)
        path = parent.root / "infra" / "workers.yaml"
        assert QUICK[0] in path.read_text()
        path.write_text(path.read_text().replace(*QUICK))
        (parent.root / "held.py").write_text(HELD)
        made.publish("store")
        parent.configure(
            str(TINY), "project.algorithms=[dpo, grpo]", "project.seeds=[0, 1]", *SETTINGS
        )  # is not committed: it travels with each stage
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

    def gate(name: str) -> Path:
        return made.machine(name).home / "go"

    for name in ("one", "two"):
        made.add(name, HELD_UNTIL=str(gate(name)))
    flow = parent.start("flows.compare", "--no-tracking", *STAGES)

    def wait_for(condition: Callable[[], object], words: str) -> None:
        def look() -> object:
            assert flow.poll() is None, parent.log()
            return condition()

        until(look, f"{words}\n{parent.log()}", 700)

    wait_for(lambda: all(at_work(stage, checkpoint=True) for stage in GRPO), "the workers write no checkpoints")
    taken_by_killed, taken_by_late = GRPO
    killed, late = (str(at_work(stage)) for stage in GRPO)
    assert killed != late
    made.kill(killed)
    os.kill(made.workers[late].pid, signal.SIGSTOP)
    made.add("three", HELD_UNTIL=str(gate("three")))
    wait_for(lambda: all(len(attempts(stage)) > 1 for stage in GRPO), "a silent worker keeps its stage")
    wait_for(lambda: any(at_work(stage) == "three" for stage in GRPO), "the third worker takes no stage")
    gate(late).touch()
    os.kill(made.workers[late].pid, signal.SIGCONT)
    wait_for(lambda: done_by(late) & set(GRPO), "the late worker does not go on with a stage of its own")
    gate("three").touch()
    assert flow.wait(700) == 0, parent.log()
    assert reference.wait(700) == 0

    order = [name for name, node in read_dag(alone.root).items() if node.kind == "stage"]
    assert (parent.root / "dvc.lock").read_text() == sorted_lock((alone.root / "dvc.lock").read_text(), order)
    assert "up to date" in parent.run("dvc", "status", *STAGES).stdout

    done = {stage: [record for _, record in attempts(stage) if record and record.phase == "done"] for stage in STAGES}
    outcomes = {stage: [record.outcome for record in records] for stage, records in done.items()}
    assert outcomes == {stage: ["ran"] for stage in STAGES}
    assert {record.worker for stage in GRPO for record in done[stage]} == {late, "three"}
    for stage in GRPO:
        (begun, _), *_, (_, last) = attempts(stage)
        assert begun.state is not None
        assert not begun.state.is_completed()
        assert last is not None
        assert f"{stage} continues from checkpoint" in made.machine(last.worker).log()
    first = {stage: attempts(stage)[0][1] for stage in GRPO}
    assert [record.worker for record in first.values() if record] == [killed, late]
    until(lambda: (attempts(taken_by_late)[0][1] or Record("")).phase == "lost", "the late worker does not give up")
    assert (attempts(taken_by_killed)[0][1] or Record("")).phase == "running"  # its last report
