"""Simulate flows on 1 to 1,000 workers and 10 to 10,000 stages, and name the limit of each: stages, parent, lock, server or remote.

    python benchmarks/scale.py [--write]

The stages are those of dvc.yaml: a chain (ingest to reward_readers), then one alignment and one evaluation for each algorithm and seed,
then the comparison. Seconds, bytes and costs of the orchestration are the constants below; those of stages, server and links are
assumptions. --write puts the tables into docs/scale.md between its marks.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

CHAIN, ALIGN, EVALUATE, COMPARE = 45.0, 30.0, 6.0, 8.0
"""Seconds of a demo's stages on one core: the chain before the alignments, one alignment, one evaluation, the comparison."""
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
MARKS = ("<!-- tables -->", "<!-- end of tables -->")


@dataclass(frozen=True)
class Costs:
    """Costs of running a stage elsewhere. Seconds, bytes a second, and requests a second."""

    worker: float = 2.2
    """Seconds of a worker for a stage beyond the stage itself: fetching, starting dvc, sending; measured by `workers.py overhead`."""
    parent: float = 0.11
    """Seconds of the flow and of Prefect's server for a stage, one stage at a time: processor time, by `workers.py many --postgres`."""
    lock: float = 0.1
    """Share of its time that the flow spends at most on writing dvc.lock (tasks/pool/send.py)."""
    server: float = 400.0
    """Requests a second that one Prefect server over PostgreSQL answers."""
    remote: float = 1.25e9
    """Bytes a second of DVC's remote for all workers together: a 10 Gbit/s link."""
    link: float = 1.25e9
    """Bytes a second of one worker's own link."""


IDLE_REQUESTS, BUSY_REQUESTS, STAGE_REQUESTS = 2.5, 1.5, 25.0
"""Requests a second of an idle worker (two polls, and whether it was drained every two seconds) and of a busy one (a report and a look
every two seconds, and the drain), and requests of a stage in all."""


@dataclass(frozen=True)
class Case:
    """A flow: workers, pairs of alignment and evaluation, seconds of an alignment, and bytes of a model."""

    workers: int
    pairs: int
    align: float = ALIGN
    model: float = 2e6

    @property
    def stages(self) -> int:
        return 2 * self.pairs + 7


@dataclass(frozen=True)
class Outcome:
    """The makespan in seconds, the share of the workers' time that trains or evaluates, and the busiest resource's name."""

    wall: float
    busy: float
    limit: str


class Resource:
    """Serve one request after the other: the flow's process, Prefect's server, or a shared link."""

    def __init__(self) -> None:
        self.free = self.used = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """Return the time at which a request that comes `now` is served. Requests come in the order of time."""
        self.free = max(self.free, now) + seconds
        self.used += seconds
        return self.free


class Flow:
    """One simulated flow: a clock, free workers, and the stages' steps as generators that yield the time of their next step."""

    def __init__(self, case: Case, costs: Costs) -> None:
        self.case, self.costs, self.now, self.last, self.busy = case, costs, 0.0, 0.0, 0.0
        self.parent, self.remote, self.server = Resource(), Resource(), Resource()
        self.free, self.waiting = case.workers, deque[Iterator[float | None]]()
        # reports and polls take their share of the server before any stage does
        share = case.workers * max(IDLE_REQUESTS, BUSY_REQUESTS) / costs.server
        self.request = STAGE_REQUESTS / costs.server / max(0.01, 1.0 - share)

    def run(self, begun: float) -> None:
        """Run every alignment and its evaluation from the time `begun` on."""
        events = [(begun, number, self.pair()) for number in range(self.case.pairs)]
        while events:
            self.now, number, step = heapq.heappop(events)
            moment = next(step, -1.0)
            if moment is None:
                self.waiting.append(step)
            elif moment >= 0.0:
                heapq.heappush(events, (moment, number, step))
            while self.free and self.waiting:
                self.free -= 1
                number += self.case.pairs  # a different place in the heap for each event
                heapq.heappush(events, (self.now, number, self.waiting.popleft()))

    def pair(self) -> Iterator[float | None]:
        """Align one model, then evaluate it."""
        model, slower = self.case.model, self.case.align / ALIGN
        yield from self.stage(self.case.align, 2 * model, model)  # base and supervised model in, aligned model out
        yield from self.stage(EVALUATE * slower, model, 0.0)
        self.last = max(self.last, self.now)

    def stage(self, seconds: float, inputs: float, outputs: float) -> Iterator[float | None]:
        """Send one stage, wait for a worker, fetch, run, store and merge."""
        yield self.parent.serve(self.now, self.costs.parent / (1.0 - self.costs.lock))
        yield self.server.serve(self.now, self.request)
        yield None  # until a worker is free
        yield from self.transfer(inputs)
        yield self.now + seconds + self.costs.worker
        yield from self.transfer(outputs)
        self.free += 1
        self.busy += seconds

    def transfer(self, size: float) -> Iterator[float | None]:
        """Move bytes through the worker's link and the remote, which all workers share."""
        yield max(self.remote.serve(self.now, size / self.costs.remote), self.now + size / self.costs.link)


def simulate(case: Case, costs: Costs = Costs()) -> Outcome:
    """Return how long the flow takes, and its limit.

    Example:
        >>> [round(simulate(Case(workers, 8)).wall) for workers in (1, 2, 8)]
        [394, 233, 114]
    """
    flow = Flow(case, costs)
    slower = case.align / ALIGN  # a larger model takes longer in every stage
    begun = CHAIN * slower + 6 * (costs.worker + costs.parent)
    flow.run(begun)
    wall = flow.last + COMPARE + costs.worker
    loads = {
        "stages": flow.busy / case.workers,
        "parent and lock": flow.parent.used,
        "Prefect's server": flow.server.used,
        "remote": flow.remote.used,
    }
    longest = begun + (ALIGN + EVALUATE) * slower + 2 * costs.worker + COMPARE + costs.worker
    limit = "longest chain" if longest > 0.8 * wall else max(loads, key=lambda name: loads[name])
    return Outcome(wall, flow.busy / (case.workers * wall), limit)


def lines(costs: Costs) -> Iterator[str]:
    """Yield the two tables."""
    yield "| workers | " + " | ".join(f"{2 * pairs + 7:,} stages" for pairs in PAIRS) + " |"
    yield "|---|" + "---|" * len(PAIRS)
    for workers in WORKERS:
        cells = [cell(simulate(Case(workers, pairs), costs)) for pairs in PAIRS]
        yield f"| {workers:,} | " + " | ".join(cells) + " |"
    yield ""
    yield "| model | bytes | alignment | 1 worker | 8 | 64 | 512 |"
    yield "|---|---|---|---|---|---|---|"
    for name, size, seconds in MODELS:
        cells = [cell(simulate(Case(workers, 100, seconds, size), costs)) for workers in (1, 8, 64, 512)]
        yield f"| {name} | {size / 1e9:,.3g} GB | {duration(seconds)} | " + " | ".join(cells) + " |"


WORKERS, PAIRS = (1, 2, 8, 32, 128, 512, 1000), (2, 20, 200, 2000, 5000)
MODELS = (("0.5 B", 1e9, 1800.0), ("7 B", 14e9, 4 * 3600.0), ("70 B", 140e9, 24 * 3600.0))
"""Name, bytes in bf16, and assumed seconds of one alignment on one worker (a host of eight GPUs for 70 B)."""


def cell(outcome: Outcome) -> str:
    return f"{duration(outcome.wall)}, {100 * outcome.busy:.0f} %, {outcome.limit}"


def duration(seconds: float) -> str:
    """Return a duration in its natural unit.

    Example:
        >>> [duration(seconds) for seconds in (90.0, 5400.0, 200000.0)]
        ['90 s', '90 min', '56 h']
    """
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36000 else f"{seconds / 3600:.0f} h"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/scale.md")
    for name in ("worker", "parent", "lock", "server", "remote"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Costs(), name))
    args = parser.parse_args(argv)
    costs = replace(Costs(), **{name: getattr(args, name) for name in ("worker", "parent", "lock", "server", "remote")})
    text = "\n".join(lines(costs))
    print(text)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(MARKS[0])
        PAGE.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
