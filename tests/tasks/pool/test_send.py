"""One thread sends and follows all stages: its patience with Prefect's server counts once, whatever the number of stages."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, WorkPoolFilter, WorkPoolFilterName
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.pool import prepare
from posttrain.errors import Interrupted, OrchestrationError
from posttrain.network import free_port
from tasks.background import in_background
from tasks.dag import Node, read_dag
from tasks.pool.requests import ServerAway, insist, own_retries, prefect_client
from tasks.pool.send import Pool
from tasks.pool.settings import WorkerSettings
from tests.fleet import git, until
from tests.workspace import dvc


@pytest.fixture
def settings() -> WorkerSettings:
    return WorkerSettings(
        {}, lease_seconds=30, beat_seconds=2, checkpoint_seconds=30, remote_seconds=0.5, attempts=4, in_flight=256
    )


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A committed project with a DVC remote."""
    (finished / "params.yaml").write_text("{}\n")
    with (finished / ".gitignore").open("a") as file:
        file.write("/.posttrain/\n/times.jsonl\n__pycache__/\n/*.txt\n")
    dvc(finished, "remote", "add", "-q", "--default", "store", str(tmp_path / "store"))
    git(finished, "add", "-A")
    git(finished, "commit", "-qm", "first")
    return finished


@pytest.fixture
def pool(project: Path, settings: WorkerSettings) -> Iterator[Pool]:
    """A pool whose requests are repeated for half a second; Prefect's server is gone."""
    gone = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: gone, PREFECT_CLIENT_MAX_RETRIES: 0}):
        yield Pool(project, "stages", read_dag(project), settings)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_waiting_stage_that_a_person_deletes_in_prefect_is_sent_again(
    project: Path,
    settings: WorkerSettings,
    prefect_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tasks.pool.send.COUNT_SECONDS", 0.0)
    stop, dag = threading.Event(), read_dag(project)
    pool = Pool(project, "deleting", dag, replace(settings, remote_seconds=240))

    def sent(name: str) -> list[UUID]:
        with get_client(sync_client=True) as client:
            named = FlowRunFilter(name=FlowRunFilterName(any_=[name]))
            of_pool = WorkPoolFilter(name=WorkPoolFilterName(any_=["deleting"]))
            return [run.id for run in client.read_flow_runs(flow_run_filter=named, work_pool_filter=of_pool)]

    with pool.open(prepare("deleting"), stop):
        left, right = (pool.submit(dag[f"side@{side}"]) for side in ("left", "right"))
        until(lambda: sent("side@left") and sent("side@right"), "the stages are not sent")
        with get_client(sync_client=True) as client:
            client.delete_flow_run(sent("side@left")[0])
        until(lambda: sent("side@left attempt 2"), "the deleted stage is not sent again")
        stop.set()
        assert isinstance(left.exception(timeout=240), Interrupted)
        assert str(right.exception(timeout=240)) == "side@right was stopped before a worker took it"
    printed = capsys.readouterr().out
    assert printed.count("no worker of the pool deleting is online. `make worker POOL=deleting` starts one.") == 1
    assert sent("side@right attempt 2") == []


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


def test_a_refused_request_is_repeated_without_the_waits_of_prefects_client(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, asked = list[float](), list[str]()

    class Busy(BaseHTTPRequestHandler):
        """Refuse the first three requests."""

        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if len(asked) > 3 else 503)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: object) -> None: ...

    monkeypatch.setattr("prefect.client.base.time", SimpleNamespace(sleep=waits.append))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    with in_background(lambda _: server.serve_forever(poll_interval=0.05)):
        address = f"http://127.0.0.1:{server.server_port}/api"
        try:
            with temporary_settings({PREFECT_API_URL: address}), own_retries(), prefect_client(30.0) as client:
                assert insist(client.hello, seconds=3600).status_code == 200
        finally:
            server.shutdown()
            server.server_close()
    assert len(asked) == 4
    assert waits == []
