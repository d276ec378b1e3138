"""Bring one stage up to date: run one dvc subprocess, log its output, and stop it with the flow."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from pipelines.runtime.consistency import VARIABLE, InputSnapshot, listed
from pipelines.runtime.garbage import library_command
from pipelines.runtime.process import killed_by
from posttrain.errors import Interrupted, OrchestrationError
from tasks.cache import drop_damaged_outputs
from tasks.console import print_line
from tasks.dag import Kind, mend_rwlock
from tasks.lock_copy import keep_lock, mend_lock
from tasks.log import StageLog, StageOutcome
from tasks.process import chunks, end, start
from tasks.remote import restore_missing
from tasks.samplers import stage_slots
from tasks.slots import Lease, lease

RETRY_SECONDS = [1, 2, 4, 8]
CATCH_UP_SECONDS = 60.0
"""Maximum time that a flow waits for MLflow to receive all records."""
_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
stop = Event()
"""Set by the flow to stop every stage of this process; one flow runs per process."""


class LockBusy(OrchestrationError):
    """A dvc process already holds this stage; a retry may succeed."""


class StageFailed(OrchestrationError):
    """The step itself failed; a retry would fail again. `killed` names the signal that ended its command."""

    def __init__(self, message: str, killed: str | None = None) -> None:
        super().__init__(message)
        self.killed = killed


@dataclass(frozen=True)
class StageResult:
    """How one stage ended, and its times."""

    stage: str
    outcome: StageOutcome
    seconds: float
    started: float
    """Unix time at which the stage got its slot."""
    ended: float

    @property
    def ran(self) -> bool:
        """Return True if the stage's command ran."""
        return self.outcome == "ran"


def is_transient(_task: Any, _run: Any, state: Any) -> bool:
    """Tell Prefect to retry if the failure was a busy lock."""
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
    """Run `dvc repro --single-item` for one node, or `dvc update` for an import if `refresh` is true.

    `current` means that `dvc status` found the node and its dependencies up to date; the subprocess is then skipped.
    """
    if stop.is_set():
        raise Interrupted(f"{name} was not started: the flow was asked to stop")
    if current:
        now = time.time()
        return StageResult(name, "up-to-date", 0.0, now, now)
    slots = stage_slots(Path(root), name)
    with lease(slots, stop, on_wait=lambda: print_line(f"{name:<24} waits for a free slot")) as held:
        print_line(f"{name:<24} started" + (f" on {held.slot.device}" if held.slot.device else ""))
        project, command = Path(root), dvc_command(name, kind, refresh=refresh)
        if kind == "data":
            restore_missing(project, name)
        result = _run(project, name, command, held, flow_run)
        if result.outcome == "restored" and (damaged := drop_damaged_outputs(project, name)):
            print_line(f"{name:<24} runs again: {damaged[0]} is damaged in DVC's cache")
            result = _run(project, name, [*command, "--force"], held, flow_run)
        for change in _changes(project, name, result):
            # dvc has recorded the new state; only a forced run ignores that, and its cache of runs
            print_line(f"{name:<24} runs again: {change} while it ran")
            result = _run(project, name, [*command, "--force"], held, flow_run)
        if still := _changes(project, name, result):
            raise StageFailed(
                f"stage {name}: {still[0]} during both of its runs, so dvc.lock may record a state that it did not use. Run"
                f" `dvc repro --force --single-item {name}` while the project is not edited."
            )
        return result


def _changes(root: Path, name: str, result: StageResult) -> list[str]:
    """Return one phrase if something changed between a step's own check and dvc's record of it; else nothing."""
    snapshot = InputSnapshot.read(snapshot_path(root, name)) if result.ran else None
    found = snapshot.changes(root=root) if snapshot else []
    return [listed(found)] if found else []


def snapshot_path(root: Path, name: str) -> Path:
    """Return the file to which a stage's step writes its snapshot."""
    return root / ".posttrain" / "logs" / f"{name.replace('/', '_')}.snapshot.json"


def dvc_command(name: str, kind: Kind, *, refresh: bool) -> list[str]:
    """Return the dvc command line for a node."""
    action = ["update", name] if kind == "import" and refresh else ["repro", "--single-item", name]
    return library_command("dvc", "--wait-for-lock", *action)


def log_path(root: Path, name: str) -> Path:
    """Return the file that holds the stage's complete output."""
    return root / ".posttrain" / "logs" / f"{name.replace('/', '_')}.log"


def _run(root: Path, name: str, command: list[str], held: Lease, flow_run: str) -> StageResult:
    """Run the command and measure its time."""
    mend_rwlock(root)
    keep_lock(root)
    began, clock = time.time(), time.monotonic()
    try:
        log = run_logged(root, name, command, held=held, flow_run=flow_run)
    except StageFailed:
        try:
            mend_lock(root)
        except OSError as error:
            print_line(f"dvc.lock cannot be restored now ({error.strerror}); the next flow does it")
        raise
    return StageResult(name, log.outcome, round(time.monotonic() - clock, 3), began, time.time())


def run_logged(
    root: Path,
    name: str,
    command: list[str],
    *,
    held: Lease | None = None,
    flow_run: str = "",
    followed: bool = True,
    stopped: Event = stop,
) -> StageLog:
    """Run a command to its end; its lines go to Prefect's log, its whole output to .posttrain/logs.

    If `followed` is true, the flow copies the command's journal into MLflow, so the command does not. Raises Interrupted if `stopped`
    was set, LockBusy if a retry may succeed, else StageFailed with the last error line.
    """
    path = log_path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    follower = {"POSTTRAIN_FOLLOWER": "1"} if followed else {"POSTTRAIN_FOLLOWER_SECONDS": str(CATCH_UP_SECONDS)}
    snapshot = snapshot_path(root, name)
    snapshot.unlink(missing_ok=True)
    extra = follower | {VARIABLE: str(snapshot.absolute())} | ({"POSTTRAIN_FLOW_RUN": flow_run} if flow_run else {})
    descriptors = held.descriptors if held else ()
    with path.open("wb") as file:
        log = StageLog(get_run_logger().info, file, show=lambda words: print_line(f"{name:<24} {words}"))
        process = start(
            command,
            root,
            extra=extra | (held.environment() if held else {}),
            pass_fds=descriptors,
            grace_seconds=grace_seconds(),
        )
        status = _watch(process, log, stopped)
    if stopped.is_set() and status:
        raise Interrupted(f"{name} was stopped; its checkpoint is kept, and the next run continues from it")
    if status:
        raise _failure(name, log, path, status)
    return log


MOST_SECONDS = 86_400


def grace_seconds() -> float:
    """Return the time for a step to write its checkpoint before it is killed (POSTTRAIN_GRACE_SECONDS)."""
    text = os.environ.get("POSTTRAIN_GRACE_SECONDS", "8")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MOST_SECONDS:  # NaN would never end a step that does not stop
        raise OrchestrationError(
            f"POSTTRAIN_GRACE_SECONDS = {text[:40]!r}: must be a number of seconds, from 0 to {MOST_SECONDS}."
        )
    return seconds


def _watch(process: subprocess.Popen[bytes], log: StageLog, stopped: Event) -> int:
    """Feed the output to the log and return the exit status."""
    try:
        for chunk in chunks(process, stopped):
            log.feed(chunk)
        log.close()
        return process.wait()
    finally:
        if process.poll() is None:
            end(process, 0)
        assert process.stdout is not None
        process.stdout.close()


def _failure(name: str, log: StageLog, path: Path, status: int) -> OrchestrationError:
    """Return the exception for a failed command."""
    if log.transient:
        return LockBusy(
            f"stage {name}: a dvc process is already running here: {log.dvc_error()}. Wait for it or stop it, then run again."
        )
    killed = killed_by(status)
    reason = f"it was ended by {killed}" if killed else log.last_error()
    if any(words in reason for words in _FULL) and "ree space" not in reason:
        reason += ". Free space, then run again: finished stages are kept, and results in DVC's cache are restored"
    return StageFailed(f"stage {name} failed: {reason}\n  complete output: {path}", killed)
