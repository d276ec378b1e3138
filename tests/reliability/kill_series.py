"""Kill every kind of training at random moments, started in every way, and compare its result with an undisturbed run.

    python -m tests.reliability.kill_series --kills 200 --seed 0 --folder /tmp/series

A trial starts one kind of training, sends SIGKILL to one of its processes up to four times, starts it again to its end, and compares
weights, journal, curves, tables, dvc.lock and the numbers in MLflow with those of an undisturbed run. Trials are written to
FOLDER/series.jsonl when they end: the same command continues an interrupted series. `--table` writes the summary into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipelines.config.yaml_files import read_yaml
from pipelines.runtime.identity import file_digest
from posttrain.files import write_atomic
from tests.reliability.kill_ways import AHEAD, ALGORITHMS, KINDS, Attempt, Kind, Starter, clone
from tests.reliability.workspace import OVERLAY, Warm

ROOT = Path(__file__).parents[2]
SHARES = {"warm": 14, "step": 3, "dvc": 2, "flow": 1, "worker": 1}
"""How often each way is drawn; a flow takes twenty times as long as a step in the warm process."""
MOST_KILLS = 4
USUAL = [name for name in KINDS if name not in AHEAD]
END = "<!-- end of the kill series -->\n"
Result = dict[str, Any]


@dataclass
class Trial:
    """One kind of training, killed some times and then run to its end."""

    index: int
    kind: str
    way: str
    victims: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


class Series:
    """The undisturbed results of a project, and trials that are compared with them."""

    def __init__(self, starter: Starter, numbers: Callable[[Kind], Result] | None = None) -> None:
        self.starter, self._numbers = starter, numbers
        self.expected: dict[str, Result] = {}
        self._seconds: dict[tuple[str, str], float] = {}

    def undisturbed(self, name: str) -> None:
        """Run a kind to its end in the warm process and remember its result."""
        began = time.monotonic()
        assert self.starter.ways["warm"](KINDS[name]).finished(), self._log()
        self._seconds[name, "warm"] = time.monotonic() - began
        self.expected[name] = self.result(name)

    def result(self, name: str) -> Result:
        """Return the digest of every output, the entry in dvc.lock and the numbers in MLflow."""
        kind, folder = KINDS[name], self.starter.folder
        files = (path for out in kind.outputs for path in sorted((folder / out).rglob("*")) if path.is_file())
        found: Result = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
        if self._numbers is not None:
            found["dvc.lock"] = read_yaml(folder / "dvc.lock")["stages"][kind.stage]
            found["MLflow"] = self._numbers(kind)
        plain: Result = json.loads(json.dumps(found))
        return plain

    def trial(self, index: int, name: str, way: str, chance: random.Random, kills: int) -> Trial:
        """Kill a run up to `kills` times, then let it end, and compare."""
        trial = Trial(index, name, way)
        start = self.starter.ways[way]
        for _ in range(kills):
            victim = self._kill(start(KINDS[name]), name, way, chance)
            if victim is None:
                break
            trial.victims.append(victim)
        began = time.monotonic()
        if not start(KINDS[name]).finished():
            trial.differences.append(f"the run does not end: {self._log()}")
            return trial
        self._seconds[name, way] = time.monotonic() - began
        found, expected = self.result(name), self.expected[name]
        trial.differences = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        return trial

    def _kill(self, attempt: Attempt, name: str, way: str, chance: random.Random) -> str | None:
        """Wait for a random time, kill one process, and return its name; None if the run ended before."""
        longest = self._seconds.get((name, way), 30.0 if way in ("flow", "worker") else 5.0)
        if chance.random() < 0.5:
            self._wait_for_work(attempt, KINDS[name])
        time.sleep(chance.uniform(0, longest))
        while attempt.running() and not attempt.victims():
            time.sleep(0.02)
        victims = attempt.victims()
        if not victims:
            attempt.finished()
            return None
        victim = chance.choice(victims)
        try:
            words = _described(victim)
            victim.kill()
        except psutil.NoSuchProcess:
            words = None
        attempt.finished()
        return words

    def _wait_for_work(self, attempt: Attempt, kind: Kind) -> None:
        """Wait until the run writes to its journal."""

        def written() -> list[tuple[str, int, int]]:
            found = self.starter.folder.glob(f".posttrain/runs/{kind.run}-*/journal.jsonl")
            return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(found)]

        before, deadline = written(), time.monotonic() + 120
        while attempt.running() and written() == before and time.monotonic() < deadline:
            time.sleep(0.005)

    def _log(self) -> str:
        return (self.starter.folder / "attempt.log").read_text(errors="replace")[-600:]


def _described(process: psutil.Process) -> str:
    """Return a short name of a process: its module or program."""
    words = process.cmdline()
    named = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m" and i + 1 < len(words)]
    return (named or [process.name()])[0]


def draw(seed: int, index: int, ways: list[str], kinds: Sequence[str] = USUAL) -> tuple[random.Random, str, str, int]:
    """Return the random numbers, kind, way and number of kills of a trial. They depend on nothing else."""
    chance = random.Random(f"{seed}-{index}")
    way = chance.choices(ways, weights=[SHARES[name] for name in ways])[0]
    return chance, kinds[index % len(kinds)], way, chance.randint(1, MOST_KILLS)


def mlflow_numbers(folder: Path) -> Callable[[Kind], Result]:
    """Return a function that copies a run's journal into MLflow and reads every value back."""
    from pipelines.commands.sync import catch_up
    from pipelines.tracking.projection import Projector
    from pipelines.tracking.store import open_client

    client = open_client(folder)
    projector = Projector(client, folder)

    def numbers(kind: Kind) -> Result:
        catch_up(projector, recheck=False)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments, max_results=1000)
        (run,) = (run for run in runs if run.data.tags["posttrain.run"].rpartition("-")[0] == kind.run)
        names = [n for n in run.data.metrics if not n.startswith(("seconds/", "throughput/", "memory/"))]
        values = {
            n: sorted([m.step, str(m.value)] for m in client.get_metric_history(run.info.run_id, n))
            for n in sorted(names)
        }
        return {"status": run.info.status, "params": run.data.params, "metrics": values}

    return numbers


@contextmanager
def prepared(folder: Path, kinds: Sequence[str] = USUAL) -> Iterator[Series]:
    """Make the project once, or open it, and yield its series with a warm process."""
    project = folder / "project"
    fresh = not (folder / "expected.json").exists()
    if fresh:
        project.mkdir(parents=True)
        clone(ROOT, project)
    warm = Warm(project, folder)
    try:
        starter = Starter(project, project, warm)
        if fresh:
            configured = starter.launch(
                "-m",
                "pipelines.commands.configure",
                str(OVERLAY),
                f"project.algorithms={[name for name in (*ALGORITHMS, *AHEAD) if name in kinds]}",
            )
            assert configured.wait() == 0, (project / "attempt.log").read_text()
            stages = [KINDS[name].stage for name in kinds]
            repro = starter.launch("-m", "dvc", "repro", "-q", *stages, POSTTRAIN_WARM=str(warm.socket))
            assert repro.wait() == 0, (project / "attempt.log").read_text()
        series = Series(starter, mlflow_numbers(project))
        if fresh:
            series.expected = {name: series.result(name) for name in kinds}
            write_atomic(folder / "expected.json", json.dumps(series.expected).encode())
        series.expected = json.loads((folder / "expected.json").read_text())
        yield series
    finally:
        warm.stop()
        warm.socket.unlink(missing_ok=True)


def run(
    folder: Path, seed: int, kills: int, ways: list[str], minutes: float = math.inf, kinds: Sequence[str] = USUAL
) -> list[Trial]:
    """Run trials until there were so many kills, or so many minutes have passed; continue the series that the folder holds."""
    record = folder / "series.jsonl"
    done = [Trial(**json.loads(line)) for line in record.read_text().splitlines()] if record.exists() else []
    end = time.monotonic() + 60 * minutes
    with prepared(folder, kinds) as series, series.starter.servers(set(ways)):
        while (killed := sum(len(trial.victims) for trial in done)) < kills and time.monotonic() < end:
            chance, kind, way, most = draw(seed, len(done), ways, kinds)
            trial = series.trial(len(done), kind, way, chance, min(most, kills - killed))
            done.append(trial)
            with record.open("a") as file:
                file.write(json.dumps(asdict(trial)) + "\n")
            bad = sum(bool(each.differences) for each in done)
            print(f"{killed + len(trial.victims)}/{kills} kills, {len(done)} runs, {bad} differ; last: {kind} by {way}"
                  f" {trial.victims} {trial.differences or 'identical'}", flush=True)  # fmt: skip
    return done


def start_mark(kinds: Sequence[str]) -> str:
    """Return the line of docs/reliability.md before the table of these kinds."""
    return f"<!-- kill series{' with staleness' if set(kinds) <= set(AHEAD) else ''} -->\n"


def table(trials: list[Trial], seed: int, started: str, kinds: Sequence[str] = USUAL) -> str:
    """Return the summary of a series as Markdown: kills and identical runs by kind and way. Runs that ended before a kill do not count."""
    trials = [trial for trial in trials if trial.victims or trial.differences]
    ways = list(SHARES)
    kills: Counter[tuple[str, str]] = Counter()
    for trial in trials:
        kills[trial.kind, trial.way] += len(trial.victims)
    same = [trial for trial in trials if not trial.differences]
    total = sum(kills.values())
    lines = [f"| kills | {' | '.join(ways)} | all | runs | identical |", "|---" * (len(ways) + 4) + "|"]
    for kind in kinds:
        mine = [trial for trial in trials if trial.kind == kind]
        row = [kills[kind, way] for way in ways]
        lines.append(
            f"| {kind} | {' | '.join(map(str, row))} | {sum(row)} | {len(mine)} | {sum(t in same for t in mine)} |"
        )
    whole = [sum(kills[kind, way] for kind in kinds) for way in ways]
    lines.append(f"| all | {' | '.join(map(str, whole))} | {total} | {len(trials)} | {len(same)} |")
    chosen = "" if list(kinds) == USUAL else f" --kinds {','.join(kinds)}"
    command = (
        f"`python -m tests.reliability.kill_series --kills {total} --seed {seed} --ways {started}{chosen} --table`"
    )
    return (
        f"{start_mark(kinds)}{command}: {total} kills in {len(trials)} runs; {len(same)} of {len(trials)} runs are identical.\n\n"
        + "\n".join(lines)
        + f"\n{END}"
    )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, default=Path(".posttrain/kill-series"), help="keeps the project and the series"
    )
    parser.add_argument(
        "--ways",
        default="warm,step,dvc",
        help="ways to start a run, of warm,step,dvc,flow,worker (default: the first three; the last two take some minutes a run)",
    )
    parser.add_argument(
        "--kinds",
        default=",".join(USUAL),
        help=f"kinds of training, of {','.join(KINDS)}; a folder keeps one choice (default: all but *_ahead)",
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no trial after so many minutes")
    parser.add_argument("--table", action="store_true", help="write the summary into docs/reliability.md")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    trials = run(args.folder.resolve(), args.seed, args.kills, args.ways.split(","), args.minutes, kinds)
    summary = table(trials, args.seed, args.ways, kinds)
    print(summary)
    if args.table:
        page = ROOT / "docs" / "reliability.md"
        head, _, rest = page.read_text(encoding="utf-8").partition(start_mark(kinds))
        write_atomic(page, (head + summary + rest.partition(END)[2]).encode())
    return int(any(trial.differences for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
