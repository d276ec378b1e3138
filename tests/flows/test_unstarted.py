"""A run that was claimed and never began does not keep its place in the queue for ever, and a crash is reported by its name."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.states import Crashed, Pending, Running

from flows.hooks import HOOKS
from flows.unstarted import end_unstarted
from tests.webhook import listening

POOL = "unstarted-pool"


@flow(name="nightly-flow")
def nightly() -> None:
    """Do nothing."""


@pytest.fixture
def deployment(prefect_url: str) -> UUID:
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow(nightly)
        return UUID(str(client.create_deployment(flow_id, name="unstarted")))


def claimed(deployment: UUID) -> FlowRun:
    """Return a run as a worker leaves it that is killed before the flow begins."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(deployment)
        client.set_flow_run_state(run.id, Pending(name="Submitting"), force=True)
        return run


def state(run: FlowRun) -> str:
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(run.id).state
        assert found is not None
        return found.name


def test_a_run_that_was_claimed_and_never_began_is_marked_and_reported(
    deployment: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, at_work = claimed(deployment), claimed(deployment)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(at_work.id, Running(), force=True)
    with listening() as (url, notices):
        monkeypatch.setenv("POSTTRAIN_WEBHOOK", url)
        assert end_unstarted(["another"]) == []
        assert [each.id for each in end_unstarted(["unstarted"])] == [run.id]
    assert (state(run), state(at_work)) == ("Crashed", "Running")
    (message,) = notices
    assert message["event"] == "failed"
    assert f"nightly-flow ({run.name}) ended Crashed: Its process was killed before the flow began" in message["text"]
    assert end_unstarted(["unstarted"]) == []


def test_a_crash_is_reported_with_the_runs_present_name(deployment: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a copy of the run that is older than the name that the flow has given it, as the worker has one."""
    run = claimed(deployment)
    with get_client(sync_client=True) as client:
        client.update_flow_run(run.id, name="retrain 2026-11-29 02:00")
    (hook,) = HOOKS["on_crashed"]
    with listening() as (url, notices):
        monkeypatch.setenv("POSTTRAIN_WEBHOOK", url)
        hook(nightly, run, Crashed(message="SIGKILL"))
        hook(nightly, run.model_copy(update={"id": uuid4()}), Crashed(message="SIGKILL"))
    assert [message["text"].partition(" ended")[0] for message in notices] == [
        "nightly-flow (retrain 2026-11-29 02:00)",
        f"nightly-flow ({run.name})",
    ]


def test_runs_of_a_pool_are_left_to_a_different_worker_that_polls_it(prefect_url: str) -> None:
    assert end_unstarted(["pooled"], pool="no-such-pool", worker="here") == []
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        made = client.create_deployment(client.create_flow(nightly), name="pooled", work_pool_name=POOL)
        run = claimed(UUID(str(made)))
    asyncio.run(heartbeat("elsewhere"))
    assert end_unstarted(["pooled"], pool=POOL, worker="here") == []
    assert end_unstarted(["pooled"], worker="here") == [], "not a run of `make serve`"
    assert state(run) == "Submitting"
    assert [each.id for each in end_unstarted(["pooled"], pool=POOL, worker="elsewhere")] == [run.id]


async def heartbeat(worker: str) -> None:
    async with get_client() as client:
        await client.send_worker_heartbeat(POOL, worker, heartbeat_interval_seconds=30)
