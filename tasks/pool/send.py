"""Send a flow's stages to the workers of a pool, and merge their results into dvc.lock, which only the flow writes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any, TypeVar
from uuid import UUID

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import TaskRunContext
from prefect.states import Cancelled, Crashed, Scheduled
from prefect.types._datetime import now

from pipelines.config.yaml_files import parse_yaml
from pipelines.tracking.lockfile import read_lock
from posttrain.errors import ConfigError, Interrupted, OrchestrationError
from tasks.console import print_line
from tasks.dag import Dag, Node
from tasks.lockfile import lock_entries, write_entries
from tasks.pool.order import StageOrder
from tasks.pool.record import Record, insist
from tasks.pool.settings import WorkerSettings
from tasks.pool.snapshot import StagePaths, committed, order, read_paths, recorded_stages
from tasks.pool.watch import Sight, Watch
from tasks.remote import has_remote, run_dvc
from tasks.stage import StageFailed, StageResult, grace_seconds
from tasks.stage import stop as stop_flow

T = TypeVar("T")
WAIT_SECONDS = 0.5
SKEW = timedelta(days=1)
"""A stage is scheduled so long ago: a worker, whose clock may be late, takes only those whose time has come by its own clock."""
SENDING_SECONDS = 30.0
"""Time for a stopped stage's last checkpoint to reach the remote."""


class WorkerLost(OrchestrationError):
    """A worker that had the stage is gone or could not run it."""


class Pool:
    """The workers of one pool as a flow sees them. One object for a flow; its methods are called by the stages' threads."""

    def __init__(self, root: Path, name: str, whole: Dag, settings: WorkerSettings, flow_run: str = "") -> None:
        self.root, self.name, self.whole, self.settings, self.flow_run = root, name, whole, settings, flow_run
        if not has_remote(root):
            raise OrchestrationError(
                "stages on other machines need DVC's remote, which carries their inputs and results: `python -m dvc remote add --default"
                " NAME URL`, on every worker too (or commit .dvc/config). Unset POSTTRAIN_POOL to run them here."
            )
        self.paths: dict[str, StagePaths] = read_paths(root)
        self.commit = committed(root, self.paths)
        self._lock, self._writing, self._connection = threading.Lock(), threading.Lock(), threading.Lock()
        self._watch, self._sent = Watch(), set[str]()
        self._made: set[str] = set()
        # dvc.lock in memory: parsing or sorting a large one takes seconds, so it is not read again, and written once for many results
        self._locked: dict[str, Any] = dict(read_lock(root))
        path = root / "dvc.lock"
        self._entries = lock_entries(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._unwritten = Event()

    @contextmanager
    def open(self, deployment: UUID) -> Iterator[None]:
        """Send stages as runs of this deployment while inside, follow them, and write dvc.lock."""
        self._deployment, over = deployment, Event()
        writer = threading.Thread(target=self._write_often, args=(over,), daemon=True)
        writer.start()
        try:
            # not the flow's client, which belongs to the flow's thread
            with get_client(httpx_settings={"timeout": 30.0}, sync_client=True) as self._client, self._watch.running():
                yield
        finally:
            over.set()
            writer.join()
            self._write()

    def run(self, node: Node, stop: Event) -> StageResult:
        """Bring one stage up to date on a worker; a stage whose worker is lost goes to the next one.

        Raises StageFailed if the stage itself failed, WorkerLost after `attempts` workers, Interrupted if `stop` was set.
        """
        began = time.time()
        wanted = self._order(node)
        made = 0
        for attempt in itertools.count(1):
            run = self._submit(wanted, attempt, stop)
            if run.state is not None and run.state.is_final():
                continue  # an attempt of an earlier flow
            made += 1
            try:
                record = self._wait(node.name, run, stop)
                self._merge(node, record)
            except WorkerLost as lost:
                if made == self.settings.attempts:
                    raise
                print_line(f"{node.name:<24} attempt {attempt} lost: {lost}")
                continue
            return StageResult(node.name, record.outcome, record.seconds.get("running", 0.0), began, time.time())
        raise AssertionError("attempts are counted without end")

    def bring_back(self) -> None:
        """Pull the results of all stages that workers have made since the last call."""
        with self._lock:
            names, self._made = sorted(self._made), set()
        self._write()
        if not names:
            return
        error = run_dvc(self.root, "pull", "--force", *names)
        if error is not None:
            raise OrchestrationError(
                f"the results of {len(names)} stages are in DVC's remote and dvc.lock, but could not be pulled: {error}. Type `dvc pull`."
            )

    def _order(self, node: Node) -> StageOrder:
        """Return the order for a stage, after the remote holds those inputs that this machine made."""
        with self._lock:
            own = sorted({*node.after, *recorded_stages(node, self.paths)} - self._sent)
            error = run_dvc(self.root, "push", *own) if own else None
            if error is not None:
                raise OrchestrationError(f"inputs of {node.name} could not be copied to DVC's remote: {error}")
            self._sent.update(own)
            return order(self.root, self.commit, node, self.paths, self._locked)

    def _submit(self, wanted: StageOrder, attempt: int, stop: Event) -> FlowRun:
        """Create the flow run of an attempt. A run of the same order and attempt, of any flow, is joined instead."""
        title = f"{wanted.name}" if attempt == 1 else f"{wanted.name} attempt {attempt}"

        context = TaskRunContext.get()

        def create(client: SyncPrefectClient) -> FlowRun:
            return client.create_flow_run_from_deployment(
                self._deployment,
                parameters=wanted.parameters() | {"parent": self.flow_run},
                state=Scheduled(scheduled_time=now("UTC") - SKEW),
                name=title,
                tags=["posttrain"],
                idempotency_key=f"{wanted.key}-{attempt}",
                parent_task_run_id=context.task_run.id if context else None,
                work_queue_name=self.settings.queue(wanted.name),
            )

        return self._request(create, stop)

    def _request(self, act: Callable[[SyncPrefectClient], T], stop: Event | None = None) -> T:
        """Send a request by the one connection that all stages share: a client for each would cost seconds."""

        def once() -> T:
            with self._connection:
                return act(self._client)

        return insist(once, self.settings.remote_seconds, stop)

    def _wait(self, name: str, run: FlowRun, stop: Event) -> Record:
        """Wait until the attempt is done. Raises StageFailed, WorkerLost or Interrupted; the run is then closed for its worker."""
        sight, named = self._watch.add(run.id), False
        try:
            while True:
                sight.news.wait(WAIT_SECONDS)
                sight.news.clear()
                if stop.is_set():
                    self._cancel(run.id, sight)
                    raise Interrupted(
                        f"{name} was stopped; its checkpoint is in DVC's remote, and the next run continues"
                    )
                record, state = sight.record, sight.state
                if record is not None and not named:
                    named = True
                    print_line(f"{name:<24} started on {record.worker}")
                if record is not None and record.phase == "done":
                    return record
                if record is not None and record.phase == "failed":
                    raise StageFailed(f"{record.error} (on {record.worker})")
                if record is not None and record.phase == "lost":
                    self._close(run.id, record.error)
                    raise WorkerLost(f"{record.worker}: {record.error}")
                if sight.silent_seconds > self.settings.lease_seconds:
                    words = f"{record.worker if record else 'its worker'} was silent for {self.settings.lease_seconds:.0f} s"
                    self._close(run.id, words)
                    raise WorkerLost(words)
                if record is None and state is not None and state.is_final():
                    raise WorkerLost(f"ended {state.name} before it began: {state.message or 'no message'}")
        finally:
            self._watch.remove(run.id)

    def _close(self, run: UUID, words: str) -> None:
        """End an attempt, so that a worker that comes back late finds that the stage is no longer its own."""
        self._set(run, Crashed(message=words[:500]))

    def _cancel(self, run: UUID, sight: Sight) -> None:
        """Cancel an attempt, and wait until its worker has stopped the stage and copied its checkpoint."""
        self._set(run, Cancelled(message="the flow was stopped"))
        deadline = time.monotonic() + grace_seconds() + 3 * self.settings.beat_seconds + SENDING_SECONDS
        while sight.record is not None and not sight.record.ended and time.monotonic() < deadline:
            sight.news.wait(WAIT_SECONDS)
            sight.news.clear()
            if sight.silent_seconds > self.settings.lease_seconds:
                return

    def _set(self, run: UUID, state: State[Any]) -> None:
        self._request(lambda client: client.set_flow_run_state(run, state, force=True))

    def _merge(self, node: Node, record: Record) -> None:
        """Put the entry into dvc.lock. Raises WorkerLost if it is not one of this stage with the inputs that were ordered."""
        with self._lock:
            try:
                above = {name: self._locked[name] for name in node.after if name in self._locked}
                self._locked[node.name] = checked_entry(node.name, record.entry, self.paths[node.name], above)
            except ConfigError as wrong:
                raise WorkerLost(f"{record.worker} returned a result that is refused: {wrong}") from None
            self._entries[node.name] = record.entry
            self._made.add(node.name)
            self._sent.add(node.name)
            self._unwritten.set()

    def _write_often(self, over: Event) -> None:
        """Write dvc.lock after each result, but at most a tenth of the time. The next flow restores a killed flow's last results."""
        pause = 0.0
        while not over.wait(max(WAIT_SECONDS, pause)):
            began = time.monotonic()
            self._write()
            pause = 10 * (time.monotonic() - began)

    def _write(self) -> None:
        """Write dvc.lock if a result is not in it yet."""
        with self._writing:
            if self._unwritten.is_set():
                self._unwritten.clear()
                with self._lock:
                    entries = dict(self._entries)
                write_entries(self.root, entries, self.whole)


def checked_entry(name: str, entry: str, paths: StagePaths, locked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of an entry of dvc.lock.

    Raises ConfigError if it is a different stage's, or was made from other inputs than those that `locked` names.
    """
    tree = parse_yaml(entry, "the entry")
    if list(lock_entries(f"stages:\n{entry}")) != [name] or not isinstance(tree, dict) or list(tree) != [name]:
        raise ConfigError("it is not one entry of this stage")
    stage = tree[name]
    if not isinstance(stage, dict) or {str(out.get("path")) for out in stage.get("outs", ())} != set(paths.outs):
        raise ConfigError("its outputs are not those of dvc.yaml")
    used = {str(dep.get("path")): dep.get("md5") for dep in stage.get("deps", ())}
    ours = {str(out["path"]): out.get("md5") for each in locked.values() for out in each.get("outs", ())}
    other = [path for path, md5 in used.items() if path in ours and ours[path] != md5]
    if other or set(used) != set(paths.deps):
        raise ConfigError(f"it was made from other inputs{f' (first: {other[0]})' if other else ''}")
    return stage


@task(name="stage", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def bring_up_to_date_on_worker(pool: Pool, name: str) -> StageResult:
    """Bring one stage up to date on a worker of the pool."""
    if stop_flow.is_set():
        raise Interrupted(f"{name} was not started: the flow was asked to stop")
    return pool.run(pool.whole[name], stop_flow)
