"""Run the DAG: read it, bring its nodes up to date in parallel, record the times, publish the report and print a summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from prefect.client.schemas import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Cancelled

from flows.answer import answer
from flows.pool import Workers, workers_of_pool
from flows.remaining import last_seconds, time_left
from flows.schedule import DagOutcome, Future, run_all
from flows.signals import reason, stop_on_signal
from flows.workspace import costs_page, early_import, follower, fork_server, write_record
from pipelines.runtime.command_line import print_text
from pipelines.runtime.environment import machine_fault
from pipelines.runtime.publish import SHARED_REPORT
from pipelines.runtime.redaction import printable
from posttrain.errors import Interrupted, OrchestrationError
from tasks import stage as stages
from tasks.console import log_line, print_line
from tasks.dag import Dag, Node, before_plan, changed, needed_for, read_dag, stale
from tasks.lockfile import sort_lock
from tasks.publish import publish_report
from tasks.slots import machine_slots
from tasks.whole import drop_damaged


def bring_all_up_to_date(
    root: Path, targets: Collection[str], *, tracking: bool, refresh: bool = False
) -> State[None] | None:
    """Bring the targets and their dependencies up to date; the body of both flows, inside `exclusive`.

    Returns a Cancelled state if it was stopped. Raises OrchestrationError if a stage failed.
    """
    with stop_on_signal(stages.stop) as received:
        whole = read_dag(root)
        dag = needed_for(whole, targets)
        imports = {name for name, node in dag.items() if node.kind == "import"} if refresh else set()
        todo = _stale(root, dag, imports)
        if not todo:
            _announce(dag, todo, None)
            _finish(root)
            return None
        started = time.time()
        with ExitStack() as helpers:
            with workers_of_pool(root, whole) as workers:
                begin_last_copy = helpers.enter_context(follower(root, tracking))
                if workers is None:  # stages on other machines fork from a fork server there
                    helpers.enter_context(fork_server(root))
                when_idle = helpers.enter_context(early_import(tracking and not targets))
                outcome = _plan_and_run(root, dag, todo, imports, refresh, workers, when_idle)
            sort_lock(root, whole)
            write_record(root, started, time.time(), outcome.results)
            begin_last_copy()  # MLflow gets the last records while the rest is checked and written
            if outcome.interrupted:
                return Cancelled(message=f"{reason(received)}; finished stages are kept, and the next run continues")
            _raise_failures(outcome)
            with costs_page(root) as written:
                _assert_current(root, dag)
                costs = written()
        _print_seconds(outcome, time.time() - started)
        if costs is not None:
            print_line(f"costs: {costs}")
        _finish(root)
    return None


def _stale(root: Path, dag: Dag, imports: Collection[str]) -> set[str]:
    """Return the nodes to bring up to date: those that DVC names, and those whose outputs are damaged."""
    todo = stale(dag, changed(root) | set(imports))
    return stale(dag, todo | drop_damaged(root, dag, todo))


def _plan_and_run(
    root: Path,
    dag: Dag,
    todo: set[str],
    imports: set[str],
    refresh: bool,
    workers: Workers,
    when_idle: Callable[[], None],
) -> DagOutcome:
    """Run the stages on whose results the plan depends, count the stale stages again, and run them."""
    first = before_plan(dag, todo)
    early = _run(root, needed_for(dag, first), first, refresh, workers, lambda: None) if first else DagOutcome()
    if early.failures or early.interrupted:
        early.not_started = [name for name in dag if name in todo - first]
        return early
    if first:
        todo = _stale(root, dag, imports)
    _announce(dag, todo, workers)
    outcome = _run(root, dag, todo, refresh, workers, when_idle)
    outcome.results |= {name: result for name, result in early.results.items() if result.ran}
    return outcome


def _run(
    root: Path, dag: Dag, todo: set[str], refresh: bool, workers: Workers, when_idle: Callable[[], None]
) -> DagOutcome:
    """Bring the nodes of `todo` up to date, in the order of the DAG and as many at once as there are slots.

    `when_idle` is called when fewer nodes are left than slots.
    """
    slots = len(machine_slots()) if workers is None else workers.settings.in_flight
    progress = _Progress(todo, last_seconds(root), slots, when_idle)
    if len(todo) < slots:
        when_idle()
    outcome = run_all(dag, _submitter(root, todo, refresh, workers), slots, stages.stop, progress)
    if workers is not None and not outcome.interrupted:
        workers.bring_back()
    return outcome


def _submitter(
    root: Path, todo: set[str], refresh: bool, workers: Workers
) -> Callable[[Node, list[Future], Callable[[str], None]], Future]:
    """Return the function that submits one node as a Prefect task."""
    identity = str(flow_run.get_id() or "")

    def submit(node: Node, above: list[Future], done: Callable[[str], None]) -> Future:
        if workers is not None and node.kind == "stage" and node.name in todo:
            sent = workers.submit(node)
            sent.add_done_callback(lambda _: done(node.name))
            return sent
        # pyrefly: ignore[no-matching-overload]
        future = stages.bring_up_to_date.submit(
            str(root),
            node.name,
            node.kind,
            current=node.name not in todo,
            flow_run=identity,
            refresh=refresh,
            return_state=False,
            wait_for=[each for each in above if isinstance(each, PrefectFuture)],
        )
        future.add_done_callback(lambda _: done(node.name))
        return future

    return submit


def _announce(dag: Dag, todo: set[str], workers: Workers) -> None:
    """Log the number of stages to run."""
    if not todo:
        log_line(f"nothing to do: all {len(dag)} stages are up to date")
        return
    where = f"{len(machine_slots())} in parallel" if workers is None else f"by the workers of {workers.name}"
    log_line(f"{len(todo)} of {len(dag)} stages to bring up to date, {where}")


@dataclass
class _Progress:
    """Log the end of each stage with the number of finished stages and the time left."""

    todo: Collection[str]
    seconds: dict[str, float]
    slots: int
    when_idle: Callable[[], None]

    def __call__(self, name: str, outcome: DagOutcome) -> None:
        ran = {stage: result.seconds for stage, result in outcome.results.items() if result.ran}
        left = set(self.todo) - outcome.results.keys() - outcome.failures.keys()
        if len(left) < self.slots:
            self.when_idle()
        words = time_left(left, self.seconds | ran, self.slots)
        count = f"{len(self.todo) - len(left)} of {len(self.todo)}"
        _report_end(name, outcome, f"   [{count}{', ' + words if words else ''}]" if name in self.todo else "")


def _report_end(name: str, outcome: DagOutcome, progress: str) -> None:
    """Log the result of one stage."""
    if name in outcome.failures:
        error = outcome.failures[name]
        log_line(f"{name:<24} {'stopped' if isinstance(error, Interrupted) else 'FAILED'}: {_words(error)}")
        return
    result = outcome.results[name]
    if result.ended > result.started:
        words = {"ran": "done", "restored": "restored from the cache", "up-to-date": "was up to date"}
        log_line(f"{name:<24} {words[result.outcome]} in {result.seconds:.1f} s{progress}")


def _words(error: BaseException) -> str:
    """Return an error in words; a fault of the machine, such as a limit of open files, with its remedy."""
    fault = machine_fault(error) if isinstance(error, OSError | RuntimeError) else None
    return f"{fault}, then run again." if fault else str(error)


def _raise_failures(outcome: DagOutcome) -> None:
    """Raise OrchestrationError with the errors of all failed stages."""
    if not outcome.failures:
        return
    lines = [_words(error) for _, error in sorted(outcome.failures.items())]
    if outcome.not_started:
        lines.append(f"not started, because they depend on a failed stage: {', '.join(outcome.not_started)}")
    raise OrchestrationError("\n".join(lines))


def _assert_current(root: Path, dag: Dag) -> None:
    """Raise OrchestrationError if a stage is still stale after the flow."""
    # results of workers came back from DVC's remote, and the gate reads them next
    left = sorted((changed(root) | drop_damaged(root, dag, set())) & set(dag))
    if left:
        raise OrchestrationError(
            f"still not up to date after the flow: {', '.join(left)}. An input changed during the flow; run the flow again."
        )


def _finish(root: Path) -> None:
    """Publish the report and print its address."""
    report = publish_report(root)
    if report is not None:
        print_text("\n".join(["", *map(printable, answer(root)), ""]))
        print_line(f"report: {report}")
        shared = root / SHARED_REPORT
        if shared.is_file():
            print_line(f"the same page with this machine's times, as one file to send: {shared}")
        print_line("metrics: `make ui` opens MLflow")


def _print_seconds(outcome: DagOutcome, total: float) -> None:
    """Print the seconds of each stage and the wall time."""
    spent = {name: result.seconds for name, result in outcome.results.items() if result.seconds}
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"    {name:<28} {seconds:8.1f} s")
    print(f"    {'wall time':<28} {total:8.1f} s")
