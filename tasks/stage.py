"""The task that brings one stage up to date: one dvc subprocess, watched, logged and taken down with the flow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from posttrain.errors import Interrupted, OrchestrationError
from tasks.console import say
from tasks.dag import Kind
from tasks.log import Outcome, StageLog
from tasks.process import chunks, end, start
from tasks.slots import Lease, lease, machine_slots

RETRY_SECONDS = [1, 2, 4, 8]
CATCH_UP_SECONDS = 60.0
"""So long a flow waits for MLflow to have everything."""
stop = Event()
"""Set by the flow to stop every stage of this process; one flow runs per process."""


class LockBusy(OrchestrationError):
    """Another dvc process holds this stage; worth another try."""


class StageFailed(OrchestrationError):
    """The step itself failed; trying again would fail again."""


@dataclass(frozen=True)
class StageResult:
    stage: str
    outcome: Outcome
    seconds: float
    started: float
    """Unix time at which the stage had its slot."""
    ended: float

    @property
    def ran(self) -> bool:
        return self.outcome == "ran"


def is_transient(_task: Any, _run: Any, state: Any) -> bool:
    """Prefect's question after a failure: is it worth another try? Only a lock is."""
    return isinstance(state.result(raise_on_failure=False), LockBusy) and not stop.is_set()


@task(
    name="stage",
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=len(RETRY_SECONDS),
    retry_delay_seconds=[float(seconds) for seconds in RETRY_SECONDS],
    retry_condition_fn=is_transient,
)
def bring_up_to_date(
    root: str, name: str, kind: Kind = "stage", current: bool = False, flow_run: str = "", refresh: bool = False
) -> StageResult:
    """Run `dvc repro --single-item` for one node (`dvc update` for an import, when `refresh`).

    `current` says that `dvc status` found nothing to do for it or above it, and saves the subprocess.
    """
    if stop.is_set():
        raise Interrupted(f"{name} was not started: the flow was asked to stop")
    if current:
        now = time.time()
        return StageResult(name, "up-to-date", 0.0, now, now)
    with lease(machine_slots(), stop, on_wait=lambda: say(f"{name:<24} waits for a free slot")) as held:
        say(f"{name:<24} started" + (f" on {held.slot.device}" if held.slot.device else ""))
        return _run(Path(root), name, dvc_command(name, kind, refresh=refresh), held, flow_run)


def dvc_command(name: str, kind: Kind, *, refresh: bool) -> list[str]:
    action = ["update", name] if kind == "import" and refresh else ["repro", "--single-item", name]
    return [sys.executable, "-m", "dvc", "--wait-for-lock", *action]


def log_path(root: Path, name: str) -> Path:
    """Where the stage's complete output is kept."""
    return root / ".posttrain" / "logs" / f"{name.replace('/', '_')}.log"


def _run(root: Path, name: str, command: list[str], held: Lease, flow_run: str) -> StageResult:
    began, clock = time.time(), time.monotonic()
    log = run_logged(root, name, command, held=held, flow_run=flow_run)
    return StageResult(name, log.outcome, round(time.monotonic() - clock, 3), began, time.time())


def run_logged(
    root: Path,
    name: str,
    command: list[str],
    *,
    held: Lease | None = None,
    flow_run: str = "",
    followed: bool = True,
) -> StageLog:
    """Run a command to its end, line by line into Prefect's log and whole into .posttrain/logs.

    `followed` says that carrying its journal into MLflow is not the command's own business: the flow does it, or nobody.
    Raises Interrupted when `stop` was set, LockBusy where another try is worth it, else StageFailed with its last error line.
    """
    path = log_path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    follower = {"POSTTRAIN_FOLLOWER": "1"} if followed else {"POSTTRAIN_FOLLOWER_SECONDS": str(CATCH_UP_SECONDS)}
    extra = follower | ({"POSTTRAIN_FLOW_RUN": flow_run} if flow_run else {})
    descriptors = held.descriptors if held else ()
    with path.open("wb") as file:
        log = StageLog(get_run_logger().info, file)
        process = start(
            command,
            root,
            extra=extra | (held.environment() if held else {}),
            pass_fds=descriptors,
            grace_seconds=grace_seconds(),
        )
        status = _watch(process, log)
    if stop.is_set() and status:
        raise Interrupted(f"{name} was stopped; its checkpoint is kept, the next run resumes from it")
    if status:
        raise _failure(name, log, path)
    return log


def grace_seconds() -> float:
    """Time for a step to write its checkpoint before it is put down (POSTTRAIN_GRACE_SECONDS)."""
    text = os.environ.get("POSTTRAIN_GRACE_SECONDS", "8")
    try:
        return float(text)
    except ValueError:
        raise OrchestrationError(f"POSTTRAIN_GRACE_SECONDS = {text!r}: must be a number of seconds.") from None


def _watch(process: subprocess.Popen[bytes], log: StageLog) -> int:
    try:
        for chunk in chunks(process, stop):
            log.feed(chunk)
        log.close()
        return process.wait()
    finally:
        if process.poll() is None:
            end(process, 0)
        assert process.stdout is not None
        process.stdout.close()


def _failure(name: str, log: StageLog, path: Path) -> OrchestrationError:
    if log.transient:
        return LockBusy(
            f"stage {name}: another dvc process is at work here: {log.dvc_error()}. Wait for it or stop it, then run again."
        )
    return StageFailed(f"stage {name} failed: {log.last_error()}\n  its whole output: {path}")
