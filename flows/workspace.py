"""Files of a flow in .posttrain: its run, the record of its stages, and helper processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType
from prefect.context import TagsContext
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment, flow_run
from prefect.states import Crashed

from flows.hooks import notify_end
from flows.lock import WorkspaceBusy, only_flow
from flows.production import bring_pending
from pipelines.runtime.early import COSTS
from pipelines.runtime.fork_server import VARIABLE as FORK_SERVER
from posttrain.files import write_atomic
from posttrain.guard import end_with
from tasks import stage as stages
from tasks.champion import remove_left_pointers
from tasks.console import print_line
from tasks.pool.settings import VARIABLE as POOL
from tasks.process import end, start
from tasks.slots import cuda_devices
from tasks.stage import CATCH_UP_SECONDS, StageResult

RUN = Path(".posttrain/flow.run")
"""Holds the id of the running flow run; a killed one leaves it behind."""
SERVING_PROCESS = "POSTTRAIN_SERVING_PROCESS"
"""Environment variable with the process id of `make serve`, for the flow runs that it starts."""
ENDING_SECONDS = 40.0
SILENCE_SECONDS = 300
"""Longer than a restart of the Prefect server or its database, which loses heartbeats."""
SILENT = f"no heartbeat for {SILENCE_SECONDS} s"
"""The server's message for a run that it marks Crashed; see flows.deploy."""
UNFINISHED = TaskRunFilter(
    state=TaskRunFilterState(type=TaskRunFilterStateType(any_=sorted(set(StateType) - TERMINAL_STATES)))
)


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Be the only flow in this workspace: a deployment's run waits for its turn, a command is refused at once.

    An earlier run that was killed is marked Crashed in Prefect. A promotion by hand during the flow is completed at its end.

    Tasks inside have no tags: for each tag Prefect asks its server for a concurrency slot before and after a task. Over SQLite the server
    refuses one of two requests that write at once (503), and Prefect's client then waits two seconds before the stage starts.
    """
    stages.stop.clear()
    if SERVING_PROCESS in os.environ:
        # Without `make serve` there is no Prefect server: this flow could not record anything more. Its stages write checkpoints.
        end_with([int(os.environ[SERVING_PROCESS])], 0.0)
    try:
        with only_flow(root, wait=deployment.get_id() is not None), TagsContext(current_tags=set()):
            path = root / RUN
            end_dead_run(path)
            remove_left_pointers(root)
            write_atomic(path, str(flow_run.get_id() or "").encode())
            yield
            path.unlink()
    finally:
        bring_pending(root)


def sweep(root: Path, *, wait: bool = False) -> FlowRun | None:
    """Mark a killed flow's run as Crashed in Prefect and return it, unless a flow is running here.

    `wait` waits some seconds for that flow to end: stages of a killed flow first write their checkpoints.
    """
    deadline = time.monotonic() + (ENDING_SECONDS if wait else 0.0)
    while True:
        try:
            with only_flow(root):
                return end_dead_run(root / RUN)
        except WorkspaceBusy:
            if time.monotonic() >= deadline:
                return None
            time.sleep(1)


def end_dead_run(path: Path) -> FlowRun | None:
    """Mark the run in `path` Crashed if Prefect still considers it running, and return it. Call it only while holding the lock.

    A worker marks a flow that dies under it and notifies the webhook. If the worker dies as well, the run stays Running and keeps its
    place in the queue, or the server marks it for its silence. In these cases this function sends the notification.
    In every case the run's tasks are still Running for Prefect, and end here.
    """
    identity = _identity(path)
    if not identity or identity == str(flow_run.get_id() or ""):
        return None
    with get_client(sync_client=True) as client:
        try:
            run = client.read_flow_run(UUID(identity))
        except ObjectNotFound:
            return None
        if run.state is None or run.state.is_paused():
            return None
        _end_tasks(client, run.id)
        if run.state.is_final() and run.state.message != SILENT:
            return None
        state = run.state
        if not state.is_final():
            state = Crashed(message="The process of this run is gone; the next run continues from its checkpoints.")
            client.set_flow_run_state(run.id, state, force=True)
        flow = client.read_flow(run.flow_id)
    print_line(f"flow run {run.name} was killed, and is now marked Crashed")
    path.unlink()
    notify_end(flow.name, run, state)
    return run


def _end_tasks(client: SyncPrefectClient, identity: UUID) -> None:
    """Mark the unfinished task runs of a killed flow run Crashed: Prefect leaves them Running when their flow run ends."""
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[identity]))
    for task in client.read_task_runs(flow_run_filter=of_run, task_run_filter=UNFINISHED):
        state: State[None] = Crashed(message="The process of its flow run is gone.")
        client.set_task_run_state(task.id, state, force=True)


def _identity(path: Path) -> str:
    """Return the id in the file, or nothing. A power cut leaves zeros: the file is removed, and Prefect marks the run by its silence."""
    text = path.read_bytes().decode("utf-8", "replace").strip() if path.is_file() else ""
    try:
        return str(UUID(text)) if text else ""
    except ValueError:
        print_line(f"{path} holds no flow run, as after a power cut, and is removed")
        path.unlink()
        return ""


def write_record(root: Path, started: float, ended: float, results: Mapping[str, StageResult]) -> None:
    """Write .posttrain/flow.json, with times in Unix seconds, for the page of costs."""
    path = root / ".posttrain" / "flow.json"
    stages = {
        name: {"started": result.started, "ended": result.ended, "ran": result.ran, "outcome": result.outcome}
        for name, result in sorted(results.items())
    }
    write_atomic(path, (json.dumps({"started": started, "ended": ended, "stages": stages}, indent=1) + "\n").encode())


@contextmanager
def costs_page(root: Path) -> Iterator[Callable[[], Path | None]]:
    """Write the page of machine costs for this flow in a separate process.

    Yields a function that waits for it and returns its path; None if no step recorded measurements, or it failed.
    """
    if not (root / ".posttrain" / "runs").is_dir():
        yield lambda: None
        return
    path = root / ".posttrain" / "logs" / "costs.log"
    path.parent.mkdir(parents=True, exist_ok=True)  # if all stages ran on workers, none has logged here
    with path.open("wb") as log:
        process = start([sys.executable, "-m", COSTS], root, output=log)

    def written() -> Path | None:
        if end(process, CATCH_UP_SECONDS):
            print_line(f"the page of costs could not be written: see {path}")
            return None
        return root / ".posttrain" / "costs" / "index.html"

    try:
        yield written
    finally:
        end(process, 0)


@contextmanager
def follower(root: Path, wanted: bool) -> Iterator[Callable[[], None]]:
    """Run one process that copies every stage's journal into MLflow while the stages run, and catches up at the end.

    Yields a function that lets it begin to catch up; leaving the block waits until it has done so.
    """
    if not wanted:
        yield lambda: None
        return
    path = root / ".posttrain" / "logs" / "follower.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as log:
        process = start(
            [sys.executable, "-m", "pipelines.commands.sync", "--follow"], root, stdin=subprocess.PIPE, output=log
        )
        assert process.stdin is not None
        try:
            yield process.stdin.close
        finally:
            process.stdin.close()
            if end(process, CATCH_UP_SECONDS):
                catch_up(root)


REGISTRY_MODULES = ("mlflow", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store")
"""Modules that MLflow imports on the first use of a registry in a database."""


@contextmanager
def early_import(wanted: bool) -> Iterator[Callable[[], None]]:
    """Yield a function that begins to import MLflow, for the registry at a flow's end; leaving the block waits for the import."""
    thread = Thread(target=lambda: [*map(import_module, REGISTRY_MODULES)], daemon=True)

    def begin() -> None:
        if wanted and thread.ident is None:
            thread.start()

    try:
        yield begin
    finally:
        if thread.ident is not None:
            thread.join()


LONGEST_TMPDIR = 80
"""Bytes: a socket's path may have 103, of which the folder and the name take 23."""


@contextmanager
def fork_server(root: Path) -> Iterator[None]:
    """Run one process that has imported torch and forks for each step, unless POSTTRAIN_WARM names one. Not used with GPUs."""
    if cuda_devices() or os.environ.get(FORK_SERVER):
        yield
        return
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR:
        print_line(
            f"each step imports torch itself, which takes longer: {tempfile.gettempdir()} is too long a path for a socket. Set TMPDIR to a"
            " shorter folder, e.g. /tmp"
        )
        yield
        return
    with tempfile.TemporaryDirectory(prefix="posttrain-") as folder:
        path = Path(folder) / "warm"
        log = root / ".posttrain" / "logs" / "warm.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = start(
                [sys.executable, "-m", "pipelines.runtime.fork_server", str(path)], root, output=output, grace_seconds=1
            )
        os.environ[FORK_SERVER] = str(path)
        try:
            yield
        finally:
            del os.environ[FORK_SERVER]
            end(process, 0)


@contextmanager
def early_fork_server(root: Path) -> Iterator[None]:
    """Run the fork server already while Prefect's server starts, if no stage has run here yet, so that every stage is stale."""
    if (root / "dvc.lock").exists() or os.environ.get(POOL):
        yield
        return
    with fork_server(root):
        yield


def catch_up(root: Path) -> None:
    """Copy every journal into MLflow. Tracking never fails a flow: the journals are kept, and a later sync copies them."""
    path = root / ".posttrain" / "logs" / "sync.log"
    with path.open("ab") as log:
        status = end(start([sys.executable, "-m", "pipelines.commands.sync"], root, output=log), CATCH_UP_SECONDS)
    if status:
        print_line(
            f"MLflow does not have all records yet: `posttrain sync` copies the rest from the journals (see {path})"
        )
