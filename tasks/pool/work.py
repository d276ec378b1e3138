"""Run one stage on a worker that shares nothing with the flow: fetch, run, send, and report."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from prefect.logging import get_run_logger

from pipelines.runtime.environment import machine_fault
from posttrain.errors import PosttrainError
from tasks.background import in_background
from tasks.console import log_line
from tasks.lockfile import lock_entries
from tasks.pool import checkpoints
from tasks.pool.copies import Copies
from tasks.pool.order import StageOrder
from tasks.pool.record import Lease, Phase, Record
from tasks.pool.requests import own_retries
from tasks.pool.settings import WorkerSettings
from tasks.pool.transfer import opened, patiently, pull_inputs, push_results
from tasks.pool.tree import NoCommit, check_out, free_tree
from tasks.samplers import stage_slots
from tasks.slots import lease
from tasks.stage import StageFailed, dvc_command, run_logged

T = TypeVar("T")
POLL_SECONDS = 0.5
MACHINE = "cannot continue: "
"""In the error of a step that met a fault of its machine; see pipelines.runtime.step."""


@dataclass(frozen=True)
class Worker:
    """One worker of a pool: its name, its clone, and how many stages it runs at once."""

    name: str
    workspace: Path
    places: int
    stop: threading.Event
    """Set when the worker is asked to end: its stages write a checkpoint and are given to other workers."""


def run_order(worker: Worker, order: StageOrder, run: UUID, settings: WorkerSettings, parent: str = "") -> Record:
    """Bring the stage up to date in a worktree, copy its results to the remote, and return the record.

    Raises the stage's error, after the record reports it. `parent` is the id of the flow run that sent the stage.
    """
    held = Lease(run, Record(worker.name), settings.beat_seconds, settings.remote_seconds)
    work = _Work(worker, order, held, settings, parent)
    with own_retries(), held.held(), _stopped_with(worker, held):
        try:
            work.run()
        except (PosttrainError, OSError) as error:
            held.record.phase, held.record.error = blame(error), _words(error)
            raise
        finally:
            held.report()
    return held.record


def blame(error: BaseException) -> Phase:
    """Return `failed` if the stage would fail on every worker, else `lost`."""
    if isinstance(error, StageFailed):
        return "lost" if error.killed or MACHINE in str(error) else "failed"
    return "failed" if isinstance(error, NoCommit) else "lost"


def _words(error: Exception) -> str:
    """Return the error in words; a fault of the machine with its remedy."""
    return (machine_fault(error) if isinstance(error, OSError) else None) or str(error)


@dataclass
class _Work:
    """The steps of one stage."""

    worker: Worker
    order: StageOrder
    lease: Lease
    settings: WorkerSettings
    parent: str

    def run(self) -> None:
        order, record = self.order, self.lease.record
        with free_tree(self.worker.workspace, self.worker.places) as tree:
            with self._phase("fetching"):
                self._fetch(tree)
            with (
                self._phase("waiting"),
                lease(stage_slots(tree, order.name), self.lease.stop) as slot,
            ):
                record.seconds["waiting"] = round(time.monotonic() - self._began, 3)
                with self._phase("running"), self._copies(tree).made():
                    command = dvc_command(order.name, "stage", refresh=False)
                    log = run_logged(
                        tree, order.name, command, held=slot, flow_run=self.parent, stopped=self.lease.stop
                    )
            with self._phase("sending"):
                self.lease.require()
                self._remote(lambda: push_results(tree, order.name), "copying results to DVC's remote")
                self.lease.require()
            record.entry = lock_entries((tree / "dvc.lock").read_text(encoding="utf-8"))[order.name]
            record.outcome, record.phase = log.outcome, "done"
            self.lease.report()  # the flow need not wait for what follows
            if record.checkpoint:
                self._remote(lambda: checkpoints.remove(tree, order.key), "removing checkpoints")

    def _fetch(self, tree: Path) -> None:
        """Bring the code, the inputs and the newest checkpoint to the worktree."""
        order, record = self.order, self.lease.record
        check_out(self.worker.workspace, tree, order.commit, order.files, order.lock)

        def fetch() -> str | None:
            with opened(tree) as repo:  # opened once: a client of an S3 store takes a third of a second
                pull_inputs(repo, order.name)
                return checkpoints.download(repo, tree, order.key, order.name)

        record.checkpoint = self._remote(fetch, "fetching inputs and checkpoint from DVC's remote") or ""
        if record.checkpoint:
            log_line(f"{order.name} continues from checkpoint {record.checkpoint} of the remote")

    @contextmanager
    def _phase(self, name: Phase) -> Iterator[None]:
        """Report the phase and measure its seconds."""
        self._began = began = time.monotonic()
        self.lease.record.phase = name
        try:
            yield
        finally:
            self.lease.record.seconds.setdefault(name, round(time.monotonic() - began, 3))

    def _remote(self, act: Callable[[], T], what: str) -> T:
        return patiently(act, what, self.settings.remote_seconds, self.lease.stop)

    def _copies(self, tree: Path) -> Copies:
        """Return the stage's checkpoints in the remote; each new one is named in the record."""
        return Copies(
            tree, self.order.name, self.order.key, self.settings.checkpoint_seconds, get_run_logger().warning,
            newest=self.lease.record.checkpoint, on_copy=self._name_checkpoint,
        )  # fmt: skip

    def _name_checkpoint(self, name: str) -> None:
        self.lease.record.checkpoint = name


@contextmanager
def _stopped_with(worker: Worker, held: Lease) -> Iterator[None]:
    """Stop the stage when the worker is asked to end."""

    def follow(over: threading.Event) -> None:
        while not over.wait(POLL_SECONDS):
            if worker.stop.is_set():
                held.stop.set()
                return

    with in_background(follow):
        yield
