"""Measure the cost of running stages on workers: of one stage, of two workers next to one, and of a flow over many trivial stages.

    python benchmarks/workers.py overhead [--stages 6] [--write]     one worker with its own clone, an S3 store, a git server
    python benchmarks/workers.py two [--stages 4] [--write]          the same stages on one worker, then on two
    python benchmarks/workers.py many [--stages 500] [--write]       the flow's process and Prefect's server only

`overhead` runs a chain of stages that copy one byte on a worker, and the same chain by `dvc repro --single-item` on this machine; the
difference of the times from one stage's end to the next one's is the overhead. Other work on the machine lengthens these times, but hardly
the processor seconds of the worker and of the flow, which are measured too. `two` compares the time with two workers with that of one, and
with the prediction of `posttrain plan --workers 2` (its schedule, with the stages' times of one worker). `many` has workers that answer at
once with a finished record, so only the flow's own work and Prefect's server are left: seconds for a stage, and peak memory.
--write puts the table into benchmarks/workers.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

import flows  # noqa: F401  (Prefect's quiet environment)
from benchmarks.orchestration import prefect
from pipelines.report.makespan import Work, schedule
from posttrain.network import free_port, wait_until
from tasks.process import child_environment

PROJECT = Path(__file__).parents[1]
PAGE = Path(__file__).with_suffix(".md")
POOL = "stages"
KEYS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_DEFAULT_REGION": "us-east-1"}


def project(folder: Path, stages: list[str]) -> Path:
    """Create a committed project of stages with this checkout's code and settings of workers."""
    folder.mkdir(parents=True)
    (folder / "in").write_text("x")
    (folder / "params.yaml").write_text("turn: 0\n")
    (folder / "burn.py").write_text(BURN)
    (folder / "dvc.yaml").write_text("\n".join(["stages:", *stages]) + "\n")
    for name in ("flows", "tasks", "pipelines", "posttrain", "infra"):
        subprocess.run(["cp", "-r", str(PROJECT / name), str(folder / name)], check=True)
    git(folder, "init", "-q")
    run(folder, "dvc", "init", "-q")
    (folder / ".gitignore").write_text(".posttrain/\n__pycache__/\nout-*\n")
    (folder / ".dvcignore").write_text("__pycache__\n")
    return folder


def publish(root: Path, remote: str, endpoint: str | None, bare: Path, address: str) -> None:
    """Commit the project with its DVC remote, and push it to a bare repository."""
    run(root, "dvc", "remote", "add", "-q", "--default", "store", remote)
    if endpoint:
        run(root, "dvc", "remote", "modify", "store", "endpointurl", endpoint)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "benchmark")
    git(root, "init", "-q", "--bare", str(bare))
    git(root, "remote", "add", "origin", address)
    git(root, "push", "-q", str(bare), "HEAD:refs/heads/main")


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def run(folder: Path, *command: str, **extra: str) -> str:
    environment = child_environment({**KEYS, "CUDA_VISIBLE_DEVICES": "", **extra})
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


@contextmanager
def background(folder: Path, command: list[str], **extra: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process while inside; its output goes to a file next to its folder."""
    with folder.with_name(f"{folder.name}-{Path(command[0]).name}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=child_environment({**KEYS, **extra}),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


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
            before, flows_before = _processor(process.pid), _children()
            remote = _gaps(here.flow())
            on_worker, in_flow = _processor(process.pid) - before, _children() - flows_before
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


BURN = "import sys, time\nwhile time.process_time() < float(sys.argv[1]): pass\nopen(sys.argv[2], 'w').write('x')\n"


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


def many(stages: int) -> dict[str, float]:
    """Return the seconds of a flow for each stage, and its peak memory in megabytes, with workers that answer at once."""
    wide = [f"  s{i}: {{cmd: cp in out-{i}, deps: [in], outs: [out-{i}]}}" for i in range(stages)]
    with tempfile.TemporaryDirectory(prefix="posttrain-") as name, prefect(Path(name), None) as url:
        folder = Path(name)
        root = project(folder / "parent", wide)
        publish(root, str(folder / "store"), None, folder / "project.git", str(folder / "project.git"))
        run(root, "dvc", "repro", "-q", "s0")  # one byte, which all outputs share
        run(root, "dvc", "push", "-q")
        (root / "dvc.lock").unlink()
        over = threading.Event()
        thread = threading.Thread(target=_answer, args=(url, over), daemon=True)
        thread.start()
        command = [sys.executable, "-m", "flows.compare", "--no-tracking"]
        environment = child_environment(
            {**KEYS, "POSTTRAIN_POOL": POOL, "PREFECT_API_URL": url, "CUDA_VISIBLE_DEVICES": ""}
        )
        with (folder / "flow.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
        peak, spent, server = 0.0, 0.0, _listening(url)
        served = _processor(server)
        while process.poll() is None:
            peak, spent = max(peak, _memory(process.pid)), max(spent, _processor(process.pid))
            time.sleep(0.5)
        served = _processor(server) - served
        over.set()
        thread.join()
        if process.returncode:
            raise SystemExit((folder / "flow.log").read_text(encoding="utf-8")[-3000:])
        record = json.loads((root / ".posttrain" / "flow.json").read_text(encoding="utf-8"))
        ends = sorted(stage["ended"] for stage in record["stages"].values())
        lines = (folder / "flow.log").read_text(encoding="utf-8").splitlines()
        begun = record["started"]
        return {
            "seconds a stage, from the first sent to the last merged": (ends[-1] - begun) / stages,
            "seconds from the last merged to the flow's end": record["ended"] - ends[-1],
            "processor seconds of the flow's process for a stage, with its start and end": spent / stages,
            "processor seconds of Prefect's server for a stage, with its answers to the stand-in of the workers": served
            / stages,
            "megabytes of the flow's process, at most": peak,
            "lines in the terminal": float(len(lines)),
        }


def _memory(pid: int) -> float:
    """Return the peak resident memory of a process in megabytes."""
    path = Path(f"/proc/{pid}/status")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = [line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")]
    return int(found[0]) / 1024 if found else 0.0


def _listening(url: str) -> int:
    """Return the process id of the Prefect server of this address."""
    port = url.rpartition(":")[2].partition("/")[0]
    done = subprocess.run(
        ["pgrep", "-f", f"server start .*--port {port}( |$)"], capture_output=True, text=True, check=True
    )
    return max(map(int, done.stdout.split()))  # the guard, which started it, has a smaller one


def _processor(pid: int) -> float:
    """Return the processor seconds of a process and of its ended children; other work on the machine hardly changes them."""
    path = Path(f"/proc/{pid}/stat")
    fields = path.read_text(encoding="utf-8").rpartition(")")[2].split() if path.exists() else []
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _answer(url: str, over: threading.Event) -> None:
    """Finish every stage that is sent: stand in for workers that need no time."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import ArtifactCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.states import Completed

    from flows.stage_worker import QUERY_SECONDS
    from tasks.pool.record import TYPE, Record

    md5 = hashlib.md5(b"x", usedforsecurity=False).hexdigest()
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        while not over.wait(QUERY_SECONDS):
            try:
                found = client.get_scheduled_flow_runs_for_work_pool(POOL)
            except ObjectNotFound:
                continue
            for each in found:
                number = each.flow_run.parameters["name"][1:]
                same = f"      hash: md5\n      md5: {md5}\n      size: 1\n"
                entry = f"  s{number}:\n    cmd: cp in out-{number}\n    deps:\n    - path: in\n{same}"
                entry += f"    outs:\n    - path: out-{number}\n{same}"
                record = Record("stand-in", 1, "done", {"running": 0.01}, "", "ran", entry)
                client.set_flow_run_state(each.flow_run.id, Completed(), force=True)
                client.create_artifact(ArtifactCreate(type=TYPE, flow_run_id=each.flow_run.id, data=vars(record)))


def table(mode: str, stages: int, found: Mapping[str, list[float] | float]) -> str:
    """Return the measurements as a section of benchmarks/workers.md."""
    rows = [f"| {name} | {_number(value)} |" for name, value in found.items()]
    command = f"`python benchmarks/workers.py {mode} --stages {stages}`"
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
    kept = [f"## {each}" for each in sections if not each.startswith(mode)]
    PAGE.write_text(
        "\n".join([head.rstrip() + "\n", *(each.rstrip() + "\n" for each in [*kept, section])]), encoding="utf-8"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("overhead", "two", "many"))
    parser.add_argument("--stages", type=int)
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/workers.md")
    args = parser.parse_args(argv)
    measure: dict[str, tuple[Callable[[int], Mapping[str, list[float] | float]], int]] = {
        "overhead": (overhead, 6),
        "two": (two, 4),
        "many": (many, 500),
    }
    function, usual = measure[args.mode]
    stages = args.stages or usual
    found = function(stages)
    section = table(args.mode, stages, found)
    print(section)
    if args.write:
        write(args.mode, section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
