"""Choose the next nodes to start: dependencies first, at most one per slot; a failure stops only the nodes that depend on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event
from typing import Protocol

from tasks.dag import Dag, Node
from tasks.stage import StageResult

POLL_SECONDS = 0.2


class Future(Protocol):
    """The part of a Prefect future that the schedule uses."""

    def result(self) -> StageResult: ...


Submit = Callable[[Node, list[Future], Callable[[str], None]], Future]
"""Start the node's task after these futures; call back with the node's name when it is done."""


@dataclass
class DagOutcome:
    results: dict[str, StageResult] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    not_started: list[str] = field(default_factory=list)
    interrupted: bool = False


def run_all(dag: Dag, submit: Submit, limit: int, stop: Event, on_end: Callable[[str, DagOutcome], None]) -> DagOutcome:
    """Run every node of `dag`, at most `limit` at once. Returns when no node is running any more."""
    outcome, done = DagOutcome(), SimpleQueue[str]()
    futures: dict[str, Future] = {}
    running: set[str] = set()
    while True:
        for node in _ready(dag, futures, outcome.results):
            if len(running) >= limit or stop.is_set():
                break
            running.add(node.name)
            futures[node.name] = submit(node, [futures[name] for name in node.after if name in futures], done.put)
        if not running:
            break
        try:
            name = done.get(timeout=POLL_SECONDS)
        except Empty:
            continue
        running.remove(name)
        _settle(name, futures[name], outcome)
        on_end(name, outcome)
    outcome.interrupted = stop.is_set()
    outcome.not_started = [name for name in dag if name not in futures]
    return outcome


def _ready(dag: Dag, started: Mapping[str, Future], finished: Mapping[str, StageResult]) -> list[Node]:
    """Return the nodes that have not started and whose dependencies have finished."""
    return [
        node
        for name, node in dag.items()
        if name not in started and all(above in finished for above in node.after if above in dag)
    ]


def _settle(name: str, future: Future, outcome: DagOutcome) -> None:
    """Store the result or the failure of one node."""
    try:
        outcome.results[name] = future.result()
    except Exception as error:  # One stage failed: report it at the end and let the other stages continue.
        outcome.failures[name] = error
