"""Send a flow's stages to the workers of a pool, and take in their results: one thread for all stages, however many are at work."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed, Scheduled
from prefect.types._datetime import now

from posttrain.errors import ConfigError, Interrupted, OrchestrationError
from tasks.background import in_background
from tasks.console import print_line
from tasks.dag import Dag, Node
from tasks.pool.graph import Graph
from tasks.pool.merged_lock import MergedLock
from tasks.pool.order import StageOrder
from tasks.pool.record import Record
from tasks.pool.requests import ServerAway, insist, own_retries, prefect_client
from tasks.pool.settings import WorkerSettings
from tasks.pool.snapshot import StagePaths, changed_files, committed, order, read_paths, recorded_stages
from tasks.pool.transfer import patiently, pull_stages, push_stages
from tasks.pool.watch import Sight, deleted, look, online_workers
from tasks.remote import has_remote
from tasks.stage import StageFailed, StageResult, grace_seconds

T = TypeVar("T")
POLL_SECONDS, WAIT_SECONDS = 0.5, 0.1
COUNT_SECONDS = 20.0
"""How often the flow looks whether a stage that waits was deleted in Prefect."""
STATUS_SECONDS = 1.0
"""How long git's answer about changed files is used: many stages are often sent at once."""
SKEW = timedelta(days=1)
"""A stage is scheduled so long ago: a worker, whose clock may be late, takes only those whose time has come by its own clock."""
SENDING_SECONDS = 30.0
"""Time for a stopped stage's last checkpoint to reach the remote."""


class WorkerLost(OrchestrationError):
    """A worker that had the stage is gone or could not run it."""


@dataclass
class _Sent:
    """A stage at work: its order, and its present attempt."""

    node: Node
    future: Future[StageResult]
    began: float
    order: StageOrder
    run: FlowRun
    number: int
    """Of the present attempt, counted over all flows that gave this order."""
    made: int = 1
    """Attempts of this flow."""
    sight: Sight = field(default_factory=Sight)
    named: bool = False
    """True after the worker's name was printed."""


class Pool:
    """The workers of one pool as a flow sees them. One object for a flow."""

    def __init__(self, root: Path, name: str, whole: Dag, settings: WorkerSettings, flow_run: str = "") -> None:
        self.root, self.name, self.settings, self.flow_run = root, name, settings, flow_run
        if not has_remote(root):
            raise OrchestrationError(
                "stages on other machines need DVC's remote, which carries their inputs and results: `python -m dvc remote add --default"
                " NAME URL`, on every worker too (or commit .dvc/config). Unset POSTTRAIN_POOL to run them here."
            )
        self.paths: dict[str, StagePaths] = read_paths(root)
        self.commit = committed(root, self.paths)
        self._merged = MergedLock(root, whole)
        self._in_remote, self._made, self._making = set[str](), set[str](), Lock()
        self._new = SimpleQueue[tuple[Node, Future[StageResult]]]()
        self._sent: dict[UUID, _Sent] = {}
        self._changed, self._asked = set[str](), -math.inf
        self._counted, self._unattended = time.monotonic(), False
        self._over: BaseException | None = None
        """Why no stage is sent or followed any more."""

    @contextmanager
    def open(self, deployment: UUID, stop: Event) -> Iterator[None]:
        """Send stages as runs of this deployment while inside, follow them, and write dvc.lock. `stop` ends all stages."""
        self._deployment, self._stop = deployment, stop
        # not the flow's client, which belongs to the flow's thread
        with prefect_client(30.0) as self._client, self._merged.written():
            self._graph = Graph(self._client, self.flow_run)
            with in_background(self._serve):
                yield

    def submit(self, node: Node) -> Future[StageResult]:
        """Bring one stage up to date on a worker; a stage whose worker is lost goes to the next one.

        The future raises StageFailed if the stage itself failed, WorkerLost after `attempts` workers, ServerAway if Prefect's server does
        not respond for `remote_seconds`, and Interrupted if `stop` was set.
        """
        future = Future[StageResult]()
        self._new.put((node, future))
        return future

    def bring_back(self) -> None:
        """Pull the results of all stages that workers have made since the last call."""
        with self._making:
            names, self._made = sorted(self._made), set()
        self._merged.write()
        if not names:
            return
        try:
            self._transfer(lambda: pull_stages(self.root, names), "pulling results from DVC's remote")
        except OrchestrationError as error:
            raise OrchestrationError(
                f"the results of {len(names)} stages are in DVC's remote and dvc.lock, but could not be pulled: {error}. Type `dvc pull`."
            ) from error

    @own_retries()
    def _serve(self, over: Event) -> None:
        """Send each new stage, and look at all stages twice a second."""
        before = time.monotonic()
        while not over.is_set():
            try:
                if self._stop.is_set() and self._over is None:
                    self._cancel()
                passed = time.monotonic() - before
                if passed >= POLL_SECONDS:
                    self._look(min(passed, 2 * POLL_SECONDS))
                    before = time.monotonic()
                self._send_next(WAIT_SECONDS)
            except Exception as error:  # the flow waits for the futures, so each must get an end
                self._end_all(error)

    def _send_next(self, patience_seconds: float) -> None:
        """Send the next new stage, if one comes in time."""
        try:
            node, future = self._new.get(timeout=patience_seconds)
        except Empty:
            return
        if self._over is not None:
            future.set_exception(self._over)
            return
        try:
            began, wanted = time.time(), self._order(node)
            run, number = self._submit(node, wanted, 1)
        except (ServerAway, Interrupted) as error:
            future.set_exception(error)
            raise
        except Exception as error:  # of this stage only
            future.set_exception(error)
            return
        self._sent[run.id] = _Sent(node, future, began, wanted, run, number)

    def _end_all(self, error: BaseException) -> None:
        """End every stage with this error, and all that come later."""
        self._over = error
        for sent in list(self._sent.values()):
            self._end(sent, error)

    def _end(self, sent: _Sent, end: StageResult | BaseException) -> None:
        """Give a stage its result or its error, and follow it no longer."""
        del self._sent[sent.run.id]
        if isinstance(end, StageResult):
            sent.future.set_result(end)
        else:
            sent.future.set_exception(end)

    def _order(self, node: Node) -> StageOrder:
        """Return the order for a stage, after the remote holds those inputs that this machine made."""
        own = sorted({*node.after, *recorded_stages(node, self.paths)} - self._in_remote)
        if own:
            self._transfer(lambda: push_stages(self.root, own), f"copying inputs of {node.name} to DVC's remote")
        self._in_remote.update(own)
        if time.monotonic() > self._asked + STATUS_SECONDS:
            self._changed, self._asked = changed_files(self.root), time.monotonic()
        return order(self.root, self.commit, node, self.paths, self._merged.stages, self._changed)

    def _submit(self, node: Node, wanted: StageOrder, number: int) -> tuple[FlowRun, int]:
        """Create the flow run of an attempt, and return it with its number.

        A run of the same order and number, of any flow, is joined instead; if it has ended, the next number is used.
        """
        while True:
            title = wanted.name if number == 1 else f"{wanted.name} attempt {number}"

            def create(client: SyncPrefectClient, title: str = title, key: str = f"{wanted.key}-{number}") -> FlowRun:
                return client.create_flow_run_from_deployment(
                    self._deployment,
                    parameters=wanted.parameters() | {"parent": self.flow_run},
                    state=Scheduled(scheduled_time=now("UTC") - SKEW),
                    name=title,
                    tags=["posttrain"],
                    idempotency_key=key,
                    parent_task_run_id=self._graph.add(node),
                    work_queue_name=self.settings.queue(wanted.name),
                )

            run = self._request(create)
            if run.state is None or not run.state.is_final():
                return run, number
            number += 1

    def _transfer(self, act: Callable[[], None], what: str) -> None:
        patiently(act, what, self.settings.remote_seconds, self._stop)

    def _request(self, act: Callable[[SyncPrefectClient], T]) -> T:
        return insist(lambda: act(self._client), self.settings.remote_seconds, self._stop)

    def _look(self, passed: float) -> None:
        """Look at all stages, and act on what has changed."""
        sights, gone = {run: sent.sight for run, sent in self._sent.items()}, list[UUID]()
        try:
            look(self._client, sights, passed)
            if time.monotonic() > self._counted + COUNT_SECONDS:
                gone, self._counted = deleted(self._client, sights), time.monotonic()
                self._name_absence(sights.values())
        except httpx.HTTPError:  # the server is away, which is no worker's silence
            return
        for run in gone:
            self._sent[run].sight.deleted = True
        for sent in list(self._sent.values()):
            try:
                self._advance(sent)
            except (ServerAway, Interrupted):
                raise
            except Exception as error:  # of this stage only
                self._end(sent, error)

    def _name_absence(self, sights: Collection[Sight]) -> None:
        """Print once that stages wait and no worker of the pool is online, as with a misspelt name."""
        waiting = sum(sight.waits for sight in sights)
        absent = waiting > 0 and not online_workers(self._client, self.name)
        if absent and not self._unattended:
            others = sorted(
                each.name for each in self._client.read_work_pools() if online_workers(self._client, each.name)
            )
            found = f" Pools with workers: {', '.join(others)}." if others else ""
            print_line(
                f"{waiting} stages wait: no worker of the pool {self.name} is online. `make worker POOL={self.name}` starts one.{found}"
            )
        self._unattended = absent

    def _advance(self, sent: _Sent) -> None:
        """Take in the result of a stage that is done, and give one that was lost to the next worker."""
        if self._over is not None:
            self._end_if_stopped(sent)
            return
        try:
            record = self._record(sent)
            if record is not None:
                self._merge(sent, record)
        except WorkerLost as lost:
            self._try_again(sent, lost)

    def _record(self, sent: _Sent) -> Record | None:
        """Return the record of a stage that is done. Raises StageFailed or WorkerLost; the run is then closed for its worker."""
        record, state, lease = sent.sight.record, sent.sight.state, self.settings.lease_seconds
        if record is not None and not sent.named:
            sent.named = True
            print_line(f"{sent.node.name:<24} started on {record.worker}")
        if record is not None and record.phase == "done":
            return record
        if record is not None and record.phase == "failed":
            raise StageFailed(f"{record.error} (on {record.worker})")
        if record is not None and record.phase == "lost":
            self._close(sent, record.error)
            raise WorkerLost(f"{record.worker}: {record.error}")
        if sent.sight.silent_seconds > lease:
            words = f"{record.worker if record else 'its worker'} was silent for {lease:.0f} s"
            self._close(sent, words)
            raise WorkerLost(words)
        if sent.sight.deleted:
            raise WorkerLost("its flow run was deleted in Prefect")
        if record is None and state is not None and state.is_final():
            raise WorkerLost(f"ended {state.name} before it began: {state.message or 'no message'}")
        return None

    def _merge(self, sent: _Sent, record: Record) -> None:
        """Put the result into dvc.lock, and end the stage. Raises WorkerLost if the result is refused."""
        name = sent.node.name
        try:
            self._merged.put(sent.node, record.entry, self.paths[name])
        except ConfigError as wrong:
            raise WorkerLost(f"{record.worker} returned a result that is refused: {wrong}") from None
        with self._making:
            self._made.add(name)
        self._in_remote.add(name)
        self._request(lambda _: self._graph.ended(sent.node, sent.run))
        ended = time.time()
        started = max(sent.began, ended - sum(record.seconds.values()))  # on the worker, in the flow's clock
        self._end(sent, StageResult(name, record.outcome, record.seconds.get("running", 0.0), started, ended))

    def _try_again(self, sent: _Sent, lost: WorkerLost) -> None:
        """Give the stage to the next worker, unless `attempts` have lost it."""
        if sent.made == self.settings.attempts:
            self._end(sent, lost)
            return
        print_line(f"{sent.node.name:<24} attempt {sent.number} lost: {lost}")
        run, number = self._submit(sent.node, sent.order, sent.number + 1)
        del self._sent[sent.run.id]
        self._sent[run.id] = _Sent(sent.node, sent.future, sent.began, sent.order, run, number, made=sent.made + 1)

    def _close(self, sent: _Sent, words: str) -> None:
        """End an attempt, so that a worker that comes back late finds that the stage is no longer its own."""
        self._set(sent, Crashed(message=words[:500]))

    def _set(self, sent: _Sent, state: State[Any]) -> None:
        with contextlib.suppress(ObjectNotFound):  # a person deleted the run
            self._request(lambda client: client.set_flow_run_state(sent.run.id, state, force=True))

    def _cancel(self) -> None:
        """Cancel all attempts; their workers then stop the stages and copy their checkpoints."""
        self._over = Interrupted("the stage was not started: the flow was asked to stop")
        most = grace_seconds() + 3 * self.settings.beat_seconds + SENDING_SECONDS
        self._deadline = time.monotonic() + most
        for sent in self._sent.values():
            self._set(sent, Cancelled(message="the flow was stopped"))

    def _end_if_stopped(self, sent: _Sent) -> None:
        """End a cancelled stage if no worker had it, if its worker has stopped it or is silent, or if it takes too long."""
        record, silent = sent.sight.record, sent.sight.silent_seconds > self.settings.lease_seconds
        if record is None or record.ended or silent or time.monotonic() > self._deadline:
            words = (
                "was stopped before a worker took it"
                if record is None
                else "was stopped; it has no checkpoint yet, and begins anew"
            )
            if record is not None and record.checkpoint:
                words = "was stopped; its checkpoint is in DVC's remote, and the next run continues"
            self._end(sent, Interrupted(f"{sent.node.name} {words}"))
