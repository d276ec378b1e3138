"""Measure the cost of running stages on workers: of one stage, of two workers next to one, and of a flow over many trivial stages.

    python benchmarks/workers.py overhead [--stages 6] [--write]     one worker with its own clone, an S3 store, a git server
    python benchmarks/workers.py two [--stages 4] [--write]          the same stages on one worker, then on two
    python benchmarks/workers.py many [--stages 500] [--postgres] [--write]      the flow's process and Prefect's server only

`overhead` runs a chain of stages that copy one byte on a worker, and the same chain by `dvc repro --single-item` on this machine; the
difference of the times from one stage's end to the next one's is the overhead. Other work on the machine lengthens these times, but hardly
the processor seconds of the worker and of the flow, which are measured too. `two` compares the time with two workers with that of one, and
with the prediction of `posttrain plan --workers 2` (its schedule, with the stages' times of one worker). `many` has workers that answer at
once with a finished record, so only the flow's own work and Prefect's server are left: seconds for a stage, and peak memory. The server
keeps its database in SQLite, as by `make serve`, or with --postgres in a private PostgreSQL cluster, as by `make up`.
--write puts the table into benchmarks/workers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

import flows  # noqa: F401  (Prefect's quiet environment)
from benchmarks.orchestration import prefect
from benchmarks.stage_project import POOL, background, git, processor, project, publish, run
from benchmarks.workers_many import many
from pipelines.report.makespan import Work, schedule
from posttrain.network import free_port, wait_until

PAGE = Path(__file__).with_suffix(".md")


@dataclass
class Site:
    """A flow's project, its Prefect server, and clones of the project for workers; they share an S3 store and a git server."""

    folder: Path
    url: str
    git: str

    @property
    def root(self) -> Path:
        return self.folder / "parent"

    @contextmanager
    def worker(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a worker with one place, in its own clone and with its own leases, while inside."""
        home = self.folder / name
        if not home.exists():
            git(self.folder, "clone", "-q", "--branch", "main", str(self.folder / "project.git"), str(home))
            git(home, "remote", "set-url", "origin", self.git)
        command = [sys.executable, "-m", "flows.workers", "add", POOL, "--name", name]
        own = {
            "POSTTRAIN_SLOTS": "1",
            "POSTTRAIN_WARM": "none",
            "POSTTRAIN_LEASES": str(self.folder / f"{name}-leases"),
        }
        with background(home, command, PREFECT_API_URL=self.url, CUDA_VISIBLE_DEVICES="", **own) as process:
            log = self.folder / f"{name}-{Path(sys.executable).name}.log"
            wait_until(lambda: b"stages at once" in log.read_bytes(), lambda: process.poll() is None, 300)
            yield process

    def flow(self) -> dict[str, Any]:
        """Run the flow on the workers and return its record."""
        run(self.root, "flows.compare", "--no-tracking", POSTTRAIN_POOL=POOL, PREFECT_API_URL=self.url)
        record: dict[str, Any] = json.loads((self.root / ".posttrain" / "flow.json").read_text(encoding="utf-8"))
        return record


@contextmanager
def site(stages: list[str]) -> Iterator[Site]:
    """Run the servers of a site whose project has these stages."""
    with tempfile.TemporaryDirectory(prefix="posttrain-") as name, prefect(Path(name), None) as url:
        folder = Path(name)
        root, port, store = project(folder / "parent", stages), free_port(), free_port()
        moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(store)]
        daemon = [
            "git",
            "daemon",
            "--export-all",
            f"--base-path={folder}",
            "--listen=127.0.0.1",
            f"--port={port}",
            name,
        ]
        with background(folder / "parent", moto), background(folder / "parent", daemon):
            endpoint, address = f"http://127.0.0.1:{store}", f"git://127.0.0.1:{port}/project.git"
            ready = ["curl", "-sf", "-X", "PUT", f"{endpoint}/store"]
            wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, lambda: True, 60)
            publish(root, "s3://store/dvc", endpoint, folder / "project.git", address)
            yield Site(folder, url, address)


def overhead(stages: int) -> dict[str, list[float] | float]:
    """Return the seconds of a stage on a worker, and by dvc without Prefect, and the processor seconds that each takes."""
    chain = ["  s1: {cmd: cp in out-1, deps: [in], outs: [out-1]}"]
    for i in range(2, stages + 1):
        chain.append(f"  s{i}: {{cmd: cp out-{i - 1} out-{i}, deps: [out-{i - 1}], outs: [out-{i}]}}")
    with site(chain) as here:
        with here.worker("one") as process:
            before, flows_before = processor(process.pid), _children()
            remote = _gaps(here.flow())
            on_worker, in_flow = processor(process.pid) - before, _children() - flows_before
        spent, local = _children(), []
        for number in range(1, stages + 1):
            began = time.monotonic()
            run(here.root, "dvc", "repro", "--single-item", "--force", f"s{number}")
            local.append(time.monotonic() - began)
        by_dvc = _children() - spent  # before the servers end, whose time would count too
    return {
        "a stage on a worker": remote[1:],
        "a stage by dvc without Prefect": local[1:],
        "difference of the medians": statistics.median(remote[1:]) - statistics.median(local[1:]),
        "processor seconds of the worker for a stage": on_worker / stages,
        "processor seconds of the flow for a stage, with its start and end": in_flow / stages,
        "processor seconds of a stage by dvc without Prefect": by_dvc / stages,
    }


def two(stages: int) -> dict[str, float]:
    """Return the time of independent stages with one worker and with two, and the time that the plan predicts for two.

    The stages take 24, 18, 12 and 6 seconds of processor time, and so on.
    """
    seconds = [6 * (4 - i % 4) for i in range(stages)]
    wide = [
        f"  s{i}: {{cmd: python burn.py {each} out-{i}, deps: [burn.py], params: [turn], outs: [out-{i}]}}"
        for i, each in enumerate(seconds)
    ]
    with site(wide) as here, here.worker("one"):
        first = here.flow()["stages"]
        (here.root / "params.yaml").write_text(
            "turn: 1\n"
        )  # every stage is stale again; the file travels with its order
        with here.worker("two"):
            second = here.flow()["stages"]
    work = {name: Work(each["ended"] - each["started"], ()) for name, each in first.items()}
    one, both = _span(first), _span(second)
    predicted = schedule(work, 2).wall
    return {
        "seconds with one worker": one,
        "seconds with two workers": both,
        "their ratio": both / one,
        "seconds that the plan predicts for two, from the times with one": predicted,
        "seconds with two workers, as a part of the prediction": both / predicted,
    }


def _span(stages: Mapping[str, Any]) -> float:
    """Return the seconds from the first stage's start on its worker to the last one's end."""
    return max(each["ended"] for each in stages.values()) - min(each["started"] for each in stages.values())


def _children() -> float:
    """Return the processor time of the processes that this one has started and that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _gaps(record: Mapping[str, Any]) -> list[float]:
    """Return the seconds from one stage's end to the next one's, in the record of the flow."""
    ends = sorted(stage["ended"] for stage in record["stages"].values())
    return [later - earlier for earlier, later in pairwise(ends)]


def table(mode: str, stages: int, found: Mapping[str, list[float] | float]) -> str:
    """Return the measurements as a section of benchmarks/workers.md."""
    rows = [f"| {name} | {_number(value)} |" for name, value in found.items()]
    words, *options = mode.split(" ")
    command = "`" + " ".join(["python benchmarks/workers.py", words, f"--stages {stages}", *options]) + "`"
    load = f"Load of the machine at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores."
    return "\n".join([f"## {mode}", "", command, "", "| | |", "|---|---|", *rows, "", load, ""])


def _number(value: list[float] | float) -> str:
    if isinstance(value, list):
        return f"{statistics.median(value):.2f} s (least {min(value):.2f}, most {max(value):.2f})"
    return f"{value:.3g}"


def write(mode: str, section: str) -> None:
    """Replace one section of the page."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Stages on workers\n\n"
    head, *sections = text.split("\n## ")
    kept = [f"## {each}" for each in sections if each.partition("\n")[0] != mode]
    PAGE.write_text(
        "\n".join([head.rstrip() + "\n", *(each.rstrip() + "\n" for each in [*kept, section])]), encoding="utf-8"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("overhead", "two", "many"))
    parser.add_argument("--stages", type=int)
    parser.add_argument("--postgres", action="store_true", help="many: Prefect's database in PostgreSQL, not SQLite")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/workers.md")
    args = parser.parse_args(argv)
    if args.postgres and args.mode != "many":
        parser.error("--postgres belongs to many")
    measure: dict[str, tuple[Callable[[int], Mapping[str, list[float] | float]], int]] = {
        "overhead": (overhead, 6),
        "two": (two, 4),
        "many": (partial(many, postgres=args.postgres), 500),
    }
    function, usual = measure[args.mode]
    stages = args.stages or usual
    found = function(stages)
    mode = f"{args.mode} --postgres" if args.postgres else args.mode
    section = table(mode, stages, found)
    print(section)
    if args.write:
        write(mode, section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
