"""Predict how long a flow takes with more or fewer stages side by side, from the times of the last flow.

Example:
    Two alignments after one supervised training; the second worker saves the shorter one:

    >>> work = {"sft": Work(10.0, ()), "align@dpo-0": Work(20.0, ("sft",)), "align@grpo-0": Work(40.0, ("sft",))}
    >>> [schedule(work, workers).wall for workers in (1, 2, 3)]
    [70.0, 50.0, 50.0]
    >>> critical_path(work)
    ['sft', 'align@grpo-0']
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.config.params import Params
from pipelines.report.measured import flow_time
from posttrain.errors import DataError

ALIGNED = re.compile(r"(?P<kind>align|evaluate_aligned)@(?P<algorithm>.+)-(?P<seed>\d+)")
LAST = "compare"


@dataclass(frozen=True)
class Work:
    """Seconds of one stage, and the stages that must have finished before."""

    seconds: float
    after: tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """A flow with a number of workers: seconds from start to end, and the share of the workers' time in which they are busy."""

    workers: int
    wall: float
    busy: float


def schedule(work: Mapping[str, Work], workers: int) -> Schedule:
    """Run the stages in thought, as flows do: whenever a worker is free, it takes the first stage that may start.

    Args:
        work: every stage, in the order in which a flow prefers them.
    """
    waiting, finished, running = list(work), set[str](), list[tuple[float, str]]()
    now = 0.0
    while waiting or running:
        ready = [name for name in waiting if finished.issuperset(work[name].after)]
        for name in ready[: workers - len(running)]:
            heapq.heappush(running, (now + work[name].seconds, name))
            waiting.remove(name)
        now, name = heapq.heappop(running)
        finished.add(name)
    total = sum(each.seconds for each in work.values())
    return Schedule(workers, now, total / (workers * now) if now else 1.0)


def critical_path(work: Mapping[str, Work]) -> list[str]:
    """Return the stages, from first to last, that take longest one after another: no number of workers is faster than they are."""
    reached: dict[str, tuple[float, list[str]]] = {}

    def reach(name: str) -> tuple[float, list[str]]:
        if name not in reached:
            seconds, path = max((reach(above) for above in work[name].after), default=(0.0, []), key=itemgetter(0))
            reached[name] = (seconds + work[name].seconds, [*path, name])
        return reached[name]

    return max((reach(name) for name in work), default=(0.0, []), key=itemgetter(0))[1]


def expected_work(project: Path, lock: Mapping[str, Any], params: Params) -> dict[str, Work]:
    """Return the stages that params.yaml asks for, with the times of the last flow.

    A seed that has not run yet takes as long as the mean of its algorithm's other seeds; an algorithm that has not, as the mean of all.

    Args:
        lock: the stages of dvc.lock, whose paths show which stage reads from which.

    Raises:
        DataError: no flow has run here, or one of the stages has never run in it.
    """
    flow = flow_time(project, [])
    timed = {stage.name: stage.wall for stage in flow.ran} if flow is not None else {}
    above = _dependencies(lock)
    known = {name: Work(timed[name], above[name]) for name in above if name in timed}
    fixed = {name: each for name, each in known.items() if not ALIGNED.fullmatch(name)}
    if LAST not in known or not any(map(ALIGNED.fullmatch, known)):
        raise DataError(
            "the time with more workers follows from a flow that ran every stage here; run `make demo`, or `python -m flows.compare`,"
            " once with few steps, and ask again"
        )
    last = fixed.pop(LAST)
    names = [f"{name}-{seed}" for name in params.project.algorithms for seed in params.project.seeds]
    aligned = {f"align@{name}": _of("align", name, known) for name in names}
    evaluated = {f"evaluate_aligned@{name}": _of("evaluate_aligned", name, known) for name in names}
    first = {name: each for name, each in fixed.items() if not name.startswith("evaluate")}
    others = {name: each for name, each in fixed.items() if name not in first}
    work = first | aligned | others | evaluated
    return _present(work | {LAST: Work(last.seconds, tuple(work))})


def _present(work: Mapping[str, Work]) -> dict[str, Work]:
    """Return the stages without dependencies on stages that were up to date in the last flow."""
    return {
        name: Work(each.seconds, tuple(above for above in each.after if above in work)) for name, each in work.items()
    }


def _of(kind: str, name: str, known: Mapping[str, Work]) -> Work:
    """Return the time of a stage, and its dependencies after those of a stage like it. `name` is algorithm-seed."""
    alike = like(f"{kind}@{name}", known)
    if not alike:
        raise DataError(
            f"the last flow here ran no stage {kind}; run `dvc repro` with all algorithms once, and ask again"
        )
    suffix = alike[0].partition("@")[2]
    after = (above.replace(f"align@{suffix}", f"align@{name}") for above in known[alike[0]].after)
    return Work(sum(known[each].seconds for each in alike) / len(alike), tuple(after))


def like(name: str, known: Iterable[str]) -> list[str]:
    """Return the stages whose mean time predicts that of `name`: itself, else its algorithm's other seeds, else all of its kind.

    Example:
        >>> like("align@dpo-1", ["sft", "align@dpo-0", "align@grpo-0"]), like("align@ppo-0", ["align@dpo-0", "align@grpo-0"])
        (['align@dpo-0'], ['align@dpo-0', 'align@grpo-0'])
    """
    kind, _, item = name.partition("@")
    alike = [each for each in known if each.partition("@")[0] == kind]
    own = [each for each in alike if each.partition("@")[2].rpartition("-")[0] == item.rpartition("-")[0]]
    return [name] if name in alike else own or alike


def _dependencies(lock: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return for each stage the stages whose outputs it reads."""
    outputs = {name: _paths(stage.get("outs", ())) for name, stage in lock.items()}
    return {
        name: tuple(
            other
            for other, written in outputs.items()
            if other != name and any(_overlap(out, dep) for out in written for dep in _paths(stage.get("deps", ())))
        )
        for name, stage in lock.items()
    }


def _paths(entries: Iterable[Mapping[str, Any]]) -> list[PurePosixPath]:
    return [PurePosixPath(str(entry["path"])) for entry in entries]


def _overlap(one: PurePosixPath, other: PurePosixPath) -> bool:
    """Return True if one path is the other, or is inside it."""
    return one.is_relative_to(other) or other.is_relative_to(one)


def worker_counts(most: int) -> Sequence[int]:
    """Return 1, 2, 4 and so on up to `most`, with `most` as the last.

    Example:
        >>> list(worker_counts(6))
        [1, 2, 4, 6]
    """
    doubled = [2**power for power in range(most.bit_length()) if 2**power < most]
    return [*doubled, most]
