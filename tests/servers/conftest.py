"""The whole topology as real processes, once: PostgreSQL, S3, MLflow with accounts, Prefect, a worker, and a webhook."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra.postgres import program
from infra.topology import ORDER, Topology
from pipelines.commands.configure import configure
from posttrain.errors import OrchestrationError
from tests.end_to_end.conftest import Clone, new_clone  # noqa: F401  (a fixture)
from tests.webhook import Bodies, listening

Record = dict[str, Any]
QUICK = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    "POSTTRAIN_SLOTS": "2",
    "CUDA_VISIBLE_DEVICES": "",
    "TQDM_DISABLE": "1",
}


@dataclass
class Scene:
    """One project, its servers, and the messages to its webhook."""

    clone: Clone
    topology: Topology
    told: Bodies
    client: SyncPrefectClient
    """One for all requests: a new client costs 50 ms of processor, here and in the server."""
    _printed: dict[UUID, int] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.clone.root

    def put(self, name: str, *records: Record | str) -> None:
        """A file into the inbox."""
        path = self.root / "inbox" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of a command; `Clone.run` removes pytest's own variables."""
        ours = {name: os.environ[name] for name in ("POSTTRAIN_WEBHOOK", "POSTTRAIN_PGDATA")}
        return {**self.topology.client_environment(), **ours, "POSTTRAIN_PORTS": str(self.topology.ports["postgres"])}

    def command(self, *module: str) -> str:
        """Run a module of the project against these servers and return its output."""
        done = self.clone.run(*module, check=False, **self.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def fire(self) -> FlowRun:
        """Let the server's own scheduler start retrain/nightly: a schedule of seconds, until its run has begun."""
        printed, client = len(self._worker_output()), self.client
        deployment = client.read_deployment_by_name("retrain/nightly")
        before = {run.id for run in client.read_flow_runs()}
        schedule = IntervalSchedule(interval=timedelta(seconds=5))
        (made,) = client.create_deployment_schedules(deployment.id, [(schedule, True)])
        try:
            run = wait(lambda: next((r for r in self._begun() if r.id not in before), None), 800)
        finally:
            client.delete_deployment_schedule(deployment.id, made.id)
            self._forget_waiting()
        self._printed[run.id] = printed
        assert run.auto_scheduled
        assert run.created_by is not None
        assert run.created_by.type == "SCHEDULE"
        return run

    def _forget_waiting(self) -> None:
        """Delete runs that the schedule has added while the first one was starting; they would run after it."""
        waiting = FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
        )
        for run in self.client.read_flow_runs(flow_run_filter=waiting):
            self.client.delete_flow_run(run.id)

    def ended(self, run: FlowRun, seconds: float = 2000) -> FlowRun:
        def look() -> FlowRun | None:
            now = self.read(run)
            return now if now.state is not None and now.state.is_final() else None

        return wait(look, seconds)

    def read(self, run: FlowRun) -> FlowRun:
        return self.client.read_flow_run(run.id)

    def log(self, run: FlowRun, last: str = "") -> str:
        """Return the flow run's log, once it holds `last`.

        Prefect sends lines in batches, also after the run's end, and gives up if its server is busy for long. After a minute
        the worker's own log is enough.
        """
        patience = time.monotonic() + 60

        def look() -> str | None:
            text = self._sent_log(run)
            if last not in text and time.monotonic() > patience:
                text = self.worker_log(run)
            return text if last in text else None

        text: str = wait(look, 180)
        return text

    def _sent_log(self, run: FlowRun) -> str:
        """Return the run's lines that have reached Prefect's server."""
        wanted, lines, page = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])), list[str](), 200
        while len(lines) % page == 0:
            found = self.client.read_logs(wanted, limit=page, offset=len(lines))
            lines += [entry.message for entry in found]
            if not found:
                break
        return "\n".join(lines)

    def worker_log(self, run: FlowRun) -> str:
        """Return the worker's output since the run was awaited: the lines of its flow, one flow at a time."""
        return self._worker_output()[self._printed[run.id] :]

    def _worker_output(self) -> str:
        path = self.topology.processes.log("worker")
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def completed(self, run: FlowRun, last: str) -> str:
        """Wait for the run's end, which has to be a good one; its log."""
        ended = self.ended(run)
        assert ended.state is not None
        assert ended.state.is_completed(), f"{ended.state}\n{self.log(run)}"
        return self.log(run, last)

    def aliases(self) -> dict[str, int]:
        registry = self.registry()
        return {alias: version.number for version in registry.versions() for alias in version.aliases}

    def registry(self) -> Any:
        from pipelines.promotion.registry import Registry

        return Registry(self.root, "posttrain")

    def kill_worker(self) -> None:
        """SIGKILL to the worker and to the flow that it runs, as when their machine dies."""
        pid = self.topology.processes.pid("worker")
        assert pid is not None
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=10)

    def _begun(self) -> list[FlowRun]:
        return [run for run in self.client.read_flow_runs() if run.state is not None and run.state.is_running()]


def wait(look: Callable[[], Any], seconds: float) -> Any:
    """Return the first answer that is not None."""
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.3)
    return found


@pytest.fixture(scope="module")  # not the session: what it sets in the environment would reach other tests
def scene(new_clone: Callable[[], Clone], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:  # noqa: F811
    try:
        program("initdb")
    except OrchestrationError as error:
        pytest.skip(str(error))
    clone = new_clone()
    configure(clone.root / "params.yaml", [str(clone.root / "tests/servers/tiny.yaml")])
    tables(clone.root)
    data = Path("/tmp") / f"posttrain-test-{secrets.token_hex(6)}"
    environment = QUICK | {
        "POSTTRAIN_PGDATA": str(data),
        "POSTTRAIN_LEASES": str(tmp_path_factory.mktemp("leases")),
        "PYTHONPATH": str(clone.root),
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
    }
    with listening() as (hook, told), pytest.MonkeyPatch.context() as patched:
        for name in [name for name in os.environ if name.startswith(("MLFLOW_TRACKING", "PREFECT_API", "AWS_"))]:
            patched.delenv(name)
        for name, value in (environment | {"POSTTRAIN_WEBHOOK": hook}).items():
            patched.setenv(name, value)
        topology = Topology(clone.root, first_port=free_ports(4))
        for name, value in topology.client_environment().items():
            patched.setenv(name, value)
        try:
            topology.up()
            url = {PREFECT_API_URL: f"{topology.url('prefect')}/api"}
            with temporary_settings(url), get_client(sync_client=True) as client:
                yield Scene(clone, topology, told, client)
                # what flows of this process still have to tell must not wait for a server that is gone
                EventsWorker.drain_all(timeout=30)
        finally:
            for name in reversed(ORDER):
                topology.processes.stop(name, signal.SIGKILL, seconds=0)
            shutil.rmtree(data, ignore_errors=True)


def tables(root: Path) -> None:
    """To every question the right answer is 1."""
    rows = {
        "sft": [{"prompt": f"s{i}?", "completion": str(i % 2)} for i in range(96)],
        "preferences": [{"prompt": f"p{i}?", "chosen": "1", "rejected": "0"} for i in range(60)],
        "problems": [{"prompt": f"q{i}?", "answer": "1"} for i in range(16)],
        "evaluation": [{"prompt": f"e{i}?", "answer": "1"} for i in range(32)],
    }
    for name, records in rows.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (root / "data" / "raw" / f"{name}.jsonl").write_text(lines, encoding="utf-8")


@contextmanager
def signed_in(base: str, user: str, password: str) -> Iterator[str]:
    """A proxy that signs in: a page whose own address holds a password may not ask its server anything.

    Addresses of the server in its answers become the proxy's, and Prefect's pages are told that no password is needed.
    """
    token = base64.b64encode(f"{user}:{password}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
            kept = ("accept", "content-type", "prefect-csrf-token", "prefect-csrf-client")
            headers = {name: value for name, value in self.headers.items() if name.lower() in kept}
            headers |= {"Authorization": f"Basic {token}"}
            request = urllib.request.Request(base + self.path, body, headers, method=self.command)
            try:
                answer = urllib.request.urlopen(request, timeout=30)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                content = answer.read().replace(base.encode(), f"http://{self.headers['Host']}".encode())
                if self.path.endswith("/ui-settings"):
                    content = json.dumps(json.loads(content) | {"auth": None}).encode()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = forward

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def free_ports(count: int) -> int:
    """Return the first of `count` free ports in a row, below those that outgoing connections take."""
    for first in range(20000 + secrets.randbelow(10000), 32000):
        held: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                held.append(socket.create_server(("127.0.0.1", port)))
            return first
        except OSError:
            continue
        finally:
            for each in held:
                each.close()
    raise AssertionError("no free ports")
