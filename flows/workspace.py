"""What a flow keeps in .posttrain: the lock that makes it the only one, the record of its stages, and its follower."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment, flow_run
from prefect.states import Crashed

from flows.hooks import tell_end
from posttrain.errors import OrchestrationError
from posttrain.files import write_atomic
from tasks import stage as stages
from tasks.console import say, tell
from tasks.process import end, start
from tasks.slots import cuda_devices
from tasks.stage import CATCH_UP_SECONDS, StageResult

WAIT_SECONDS = 2.0
RUN = Path(".posttrain/flow.run")
"""Holds the id of the flow run at work; left behind by one that was killed."""
SILENCE_SECONDS = 300
"""Longer than a restart of the Prefect server or its database takes, during which heartbeats are lost."""
SILENT = f"no heartbeat for {SILENCE_SECONDS} s"
"""What the server says of a run that it marks Crashed; see flows.deploy."""


class WorkspaceBusy(OrchestrationError):
    """Another flow is at work in this workspace."""


def refuse_second_flow(root: Path) -> None:
    """Raise at once if a flow is at work in this workspace."""
    with only_flow(root):
        pass


@contextmanager
def only_flow(root: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold .posttrain/flow.lock; a second flow in the same workspace waits or is refused, naming the first one's process."""
    path = root / ".posttrain" / "flow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        told = False
        while not _locked(file):
            file.seek(0)
            holder = f"another flow is running in {root.absolute()} (process {file.read().strip() or 'unknown'})"
            if not wait:
                raise WorkspaceBusy(
                    f"{holder}. Wait for it, stop it with Ctrl-C, or use a git worktree with the shared DVC cache."
                )
            if not told:
                told = bool(tell(f"waits: {holder}"))
            time.sleep(WAIT_SECONDS)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Be the only flow in this workspace: a run of a deployment waits for its turn, a command is refused at once.

    A run that was here before and was killed is marked Crashed in Prefect.
    """
    stages.stop.clear()
    with only_flow(root, wait=deployment.get_id() is not None):
        path = root / RUN
        end_dead_run(path)
        path.write_text(str(flow_run.get_id() or ""), encoding="utf-8")
        yield
        path.unlink()


def sweep(root: Path) -> None:
    """End what a killed flow left behind in Prefect, unless a flow is at work here."""
    try:
        with only_flow(root):
            end_dead_run(root / RUN)
    except WorkspaceBusy:
        return


def end_dead_run(path: Path) -> str | None:
    """Mark the run that `path` names Crashed if Prefect still believes it at work; its name. Only for who holds the lock.

    A worker marks a flow that it sees dying, and tells the webhook; one that dies with its worker would stay Running, and
    hold its place in the queue, for ever, or be marked by the server for its silence. Then we tell.
    """
    identity = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not identity or identity == str(flow_run.get_id() or ""):
        return None
    with get_client(sync_client=True) as client:
        try:
            run = client.read_flow_run(UUID(identity))
        except ObjectNotFound:
            return None
        if run.state is None or run.state.is_paused() or (run.state.is_final() and run.state.message != SILENT):
            return None
        state = run.state
        if not state.is_final():
            state = Crashed(message="The process of this run is gone; the next run goes on from its checkpoints.")
            client.set_flow_run_state(run.id, state, force=True)
        flow = client.read_flow(run.flow_id)
    say(f"flow run {run.name} was killed: marked Crashed")
    path.unlink()
    tell_end(flow.name, run, state)
    return str(run.name)


def write_record(root: Path, started: float, ended: float, results: Mapping[str, StageResult]) -> None:
    """.posttrain/flow.json, in Unix seconds, for the report's page of costs."""
    path = root / ".posttrain" / "flow.json"
    stages = {
        name: {"started": result.started, "ended": result.ended, "ran": result.ran, "outcome": result.outcome}
        for name, result in sorted(results.items())
    }
    write_atomic(path, (json.dumps({"started": started, "ended": ended, "stages": stages}, indent=1) + "\n").encode())


def write_costs(root: Path) -> Path | None:
    """The page of machine costs over this flow's record; None where no step has measured anything."""
    if not (root / ".posttrain" / "runs").is_dir():
        return None
    path = root / ".posttrain" / "logs" / "costs.log"
    with path.open("wb") as log:
        status = end(start([sys.executable, "-m", "pipelines.report.costs"], root, output=log), CATCH_UP_SECONDS)
    if status:
        say(f"the page of costs could not be written: see {path}")
        return None
    return root / ".posttrain" / "costs" / "index.html"


@contextmanager
def follower(root: Path, wanted: bool) -> Iterator[None]:
    """One process that carries every stage's journal into MLflow while the stages run, and catches up at the end."""
    if not wanted:
        yield
        return
    path = root / ".posttrain" / "logs" / "follower.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as log:
        process = start(
            [sys.executable, "-m", "pipelines.commands.sync", "--follow"], root, stdin=subprocess.PIPE, output=log
        )
        try:
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()
            if end(process, CATCH_UP_SECONDS):
                catch_up(root)


@contextmanager
def warm_process(root: Path) -> Iterator[None]:
    """One process that has torch imported and forks for each step; not where steps use a GPU, or see another environment."""
    if cuda_devices():
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
        os.environ["POSTTRAIN_WARM"] = str(path)
        try:
            yield
        finally:
            del os.environ["POSTTRAIN_WARM"]
            end(process, 0)


def catch_up(root: Path) -> None:
    """Carry every journal into MLflow. Tracking never fails a flow: the journals are kept, and this can be done at any time."""
    path = root / ".posttrain" / "logs" / "sync.log"
    with path.open("ab") as log:
        status = end(start([sys.executable, "-m", "pipelines.commands.sync"], root, output=log), CATCH_UP_SECONDS)
    if status:
        say(f"MLflow is behind: `python -m pipelines.commands.sync` catches up from the journals (see {path})")
