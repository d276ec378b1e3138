"""One thread sends and follows all stages: its patience with Prefect's server counts once, whatever the number of stages."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from posttrain.errors import Interrupted, OrchestrationError
from posttrain.network import free_port
from tasks.dag import Node, read_dag
from tasks.pool.record import ServerAway, insist
from tasks.pool.send import Pool
from tasks.pool.settings import WorkerSettings
from tests.fleet import git
from tests.workspace import dvc


@pytest.fixture
def pool(finished: Path, tmp_path: Path) -> Iterator[Pool]:
    """A pool of a committed project, whose requests are repeated for half a second; Prefect's server is gone."""
    (finished / "params.yaml").write_text("{}\n")
    with (finished / ".gitignore").open("a") as file:
        file.write("/.posttrain/\n/times.jsonl\n__pycache__/\n/*.txt\n")
    dvc(finished, "remote", "add", "-q", "--default", "store", str(tmp_path / "store"))
    git(finished, "add", "-A")
    git(finished, "commit", "-qm", "first")
    settings = WorkerSettings(
        {}, lease_seconds=30, beat_seconds=2, checkpoint_seconds=30, remote_seconds=0.5, attempts=4, in_flight=256
    )
    gone = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: gone, PREFECT_CLIENT_MAX_RETRIES: 0}):
        yield Pool(finished, "stages", read_dag(finished), settings)


def test_a_server_that_is_gone_ends_all_stages_after_one_patience(pool: Pool) -> None:
    nodes = [Node(f"side@{side}", "stage", ()) for side in ("left", "right")]
    with pool.open(uuid4(), threading.Event()):
        first = pool.submit(nodes[0])
        error = first.exception(timeout=240)
        assert isinstance(error, ServerAway)
        assert "Prefect's server did not respond for 0 s" in str(error)
        assert [pool.submit(node).exception(timeout=240) for node in nodes] == [error, error]


def test_a_stopped_flow_sends_nothing(pool: Pool) -> None:
    stop = threading.Event()
    stop.set()
    with pool.open(uuid4(), stop):
        assert isinstance(pool.submit(Node("side@left", "stage", ())).exception(timeout=240), Interrupted)


@pytest.mark.parametrize(("status", "requests"), [(422, 1), (404, 1), (503, 2), (429, 2)])
def test_only_a_request_that_may_succeed_later_is_repeated(status: int, requests: int) -> None:
    stop, sent = threading.Event(), []

    def act() -> None:
        sent.append(None)
        if len(sent) == 2:
            raise KeyError("enough")
        answer = httpx.Response(status, request=httpx.Request("POST", "http://localhost/api"))
        answer.raise_for_status()

    with pytest.raises((OrchestrationError, KeyError)):
        insist(act, seconds=3600, stop=stop)
    assert len(sent) == requests
