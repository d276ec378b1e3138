"""A tracking server that is absent, paused, killed, answers 500 and comes back while a step runs: nothing is lost, doubled or slowed."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest

from pipelines.commands.ui import mlflow_server
from pipelines.runtime import credentials
from pipelines.runtime.journal import read
from posttrain.network import free_port
from tests.pipelines.conftest import Project, wait_for
from tests.sockets import addresses, family

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]
STEPS, STEP_SECONDS = 3000, 0.2
"""Longer than the outages last on a slow machine: the test ends the wait."""


class Server:
    """An `mlflow server` that can be paused, killed, and started again on the same port and store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = {
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_USERNAME": credentials.ADMIN,
            "MLFLOW_TRACKING_PASSWORD": credentials.secret(folder, "mlflow"),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        server = mlflow_server(self.folder, self.port)
        self.process = subprocess.Popen(
            server.command,
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])} | server.environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._answers)

    def send(self, number: signal.Signals) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, number)

    def listens_on(self) -> set[str]:
        """Every address at which the server and its workers accept connections."""
        assert self.process is not None
        return addresses(family(psutil.Process(self.process.pid)))

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
            self.process = None
            wait_for(self._port_is_free)

    def _port_is_free(self) -> bool:
        try:
            return free_port(self.port) == self.port
        except OSError:
            return False

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.url}/health", timeout=2):
                return True
        except (URLError, OSError):
            return False

    @contextmanager
    def answering_500(self) -> Iterator[list[str]]:
        """Replace the server with one that fails every request; yield the requests."""
        asked: list[str] = []

        class Failing(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append(self.path)
                self.send_error(500)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", self.port), Failing) as failing:
            threading.Thread(target=failing.serve_forever, daemon=True).start()
            yield asked
            failing.shutdown()


@pytest.fixture
def server(project: Project, store: Any) -> Iterator[Server]:
    """Not started yet. `store` reads its database directly."""
    server = Server(project.folder)
    yield server
    server.kill()


def seconds_per_step(project: Project) -> list[float]:
    times = [r["time"] for r in read(project.state / "measurements.jsonl") if r["kind"] == "step"]
    return [after - before for before, after in pairwise(times)]


def test_an_outage_of_every_kind_changes_neither_the_numbers_nor_the_pace(
    project: Project, store: Any, server: Server, history: Any
) -> None:
    (project.folder / "steps.txt").write_text(str(STEPS))
    step = project.start(
        STEP_SECONDS=str(STEP_SECONDS), POSTTRAIN_FOLLOWER="0", POSTTRAIN_FOLLOWER_SECONDS="60", **server.client
    )  # fmt: skip
    journal = wait_for(lambda: list(project.folder.glob(".posttrain/runs/*/journal.jsonl")))[0]

    def arrived() -> int:
        """Values of the first series that the store holds."""
        runs = store.search_runs([e.experiment_id for e in store.search_experiments()])
        return len(store.get_metric_history(runs[0].info.run_id, "loss")) if runs else 0

    server.start()  # absent until now
    assert server.listens_on() == {"127.0.0.1"}
    wait_for(arrived)
    server.send(signal.SIGSTOP)
    at_pause = len(read(journal))
    time.sleep(3)
    assert len(read(journal)) > at_pause + 10
    server.send(signal.SIGCONT)
    server.kill()
    with server.answering_500() as asked:
        wait_for(lambda: asked)
    server.start()
    assert step.poll() is None, "every outage has to lie within the training"
    pace = statistics.median(seconds_per_step(project))
    (project.folder / "enough").touch()
    _, err = step.communicate(timeout=120)
    assert step.returncode == 0, err
    steps = sum(record["kind"] == "metrics" for record in read(journal))
    assert 20 < steps < STEPS
    synced = project.run("--wait", "30", module="pipelines.commands.sync", **server.client)
    assert synced.returncode == 0, synced.stderr

    (run,) = store.search_runs([e.experiment_id for e in store.search_experiments()])
    assert run.info.status == "FINISHED"
    values = history(store, run.info.run_id)
    assert values["loss"] == [(s, 2e-3 / (s + 1)) for s in range(steps)]
    for name in ("odd", "seconds/step"):
        assert [s for s, _ in values[name]] == list(range(steps))
    assert values["heldout/accuracy"] == [(steps - 1, 0.75)]
    assert err.count("did not accept the values") <= 2

    calm = project.beside("calm")
    (calm.folder / "steps.txt").write_text("30")
    assert calm.run(STEP_SECONDS=str(STEP_SECONDS)).returncode == 0
    undisturbed = seconds_per_step(calm)
    middle, high = statistics.median(undisturbed), statistics.quantiles(undisturbed, n=10)[8]
    # beyond two per cent, no more than an undisturbed run shows from one step to another
    assert pace <= 1.02 * middle + (high - middle) + 0.001
