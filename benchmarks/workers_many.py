"""Measure a flow over many trivial stages, with a stand-in for its workers: see `python benchmarks/workers.py many`."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.orchestration import prefect
from benchmarks.stage_project import KEYS, POOL, processor, project, publish, run
from infra.postgres import Postgres
from posttrain.network import free_port, wait_until
from tasks.background import in_background
from tasks.process import child_environment

SECONDS = 0.5
"""How often the processes are measured."""


def many(stages: int, postgres: bool = False) -> dict[str, float]:
    """Return the seconds of a flow for each stage, and its peak memory in megabytes, with workers that answer at once."""
    wide = [f"  s{i}: {{cmd: cp in out-{i}, deps: [in], outs: [out-{i}]}}" for i in range(stages)]
    with tempfile.TemporaryDirectory(prefix="posttrain-") as name:
        folder = Path(name)
        database = _database(folder) if postgres else nullcontext(None)
        with database as address, prefect(folder, address) as url:
            root = project(folder / "parent", wide)
            publish(root, str(folder / "store"), None, folder / "project.git", str(folder / "project.git"))
            run(root, "dvc", "repro", "-q", "s0")  # one byte, which all outputs share
            run(root, "dvc", "push", "-q")
            (root / "dvc.lock").unlink()
            with in_background(lambda over: _answer(url, over)):
                return _measured(root, url, stages)


def _measured(root: Path, url: str, stages: int) -> dict[str, float]:
    """Run the flow and return the measurements."""
    command = [sys.executable, "-m", "flows.compare", "--no-tracking"]
    environment = child_environment(
        {**KEYS, "POSTTRAIN_POOL": POOL, "PREFECT_API_URL": url, "CUDA_VISIBLE_DEVICES": ""}
    )
    log, server = root.with_name("flow.log"), _listening(url)
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=output)
    peak, spent, served = 0.0, 0.0, processor(server)
    while process.poll() is None:
        peak, spent = max(peak, _memory(process.pid)), max(spent, processor(process.pid))
        time.sleep(SECONDS)
    served = processor(server) - served
    text = log.read_text(encoding="utf-8")
    if process.returncode:
        raise SystemExit(text[-3000:])
    record = json.loads((root / ".posttrain" / "flow.json").read_text(encoding="utf-8"))
    ends = sorted(stage["ended"] for stage in record["stages"].values())
    return {
        "seconds a stage, from the first sent to the last merged": (ends[-1] - record["started"]) / stages,
        "seconds from the last merged to the flow's end": record["ended"] - ends[-1],
        "processor seconds of the flow's process for a stage, with its start and end": spent / stages,
        "processor seconds of Prefect's server for a stage, with its answers to the stand-in of the workers": served
        / stages,
        "megabytes of the flow's process, at most": peak,
        "lines in the terminal": float(len(text.splitlines())),
        "seconds of Prefect's server for the graph on the flow's page": _graph(url),
    }


@contextmanager
def _database(folder: Path) -> Iterator[str]:
    """Run a PostgreSQL cluster with the settings of `make up` while inside, and yield the address of Prefect's database."""
    with tempfile.TemporaryDirectory(prefix="posttrain-pg-") as name:
        Path(name).chmod(0o755)  # root's cluster belongs to the user postgres
        server = Postgres(folder, free_port(), "benchmark")
        server.data = Path(name, "data")
        server.create()
        process = subprocess.Popen(
            server.command(), cwd="/", env=server.environment(), user=server.user, group=server.user,
            extra_groups=[] if server.user else None, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_until(server.healthy, lambda: process.poll() is None, 60)
            server.create_databases()
            yield server.uri("prefect", "asyncpg")
        finally:
            process.terminate()
            process.wait(60)


def _graph(url: str) -> float:
    """Return the seconds of the request for the graph of the only run of the flow, which its page shows."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        (found,) = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["compare"])))
        began = time.monotonic()
        client.request("GET", "/flow_runs/{id}/graph-v2", path_params={"id": found.id}).raise_for_status()
        return time.monotonic() - began


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


def _answer(url: str, over: threading.Event) -> None:
    """Finish every stage that is sent: stand in for workers that need no time."""
    from prefect.client.schemas.actions import ArtifactCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.states import Completed

    from flows.stage_worker import QUERY_SECONDS
    from tasks.pool.record import TYPE, Record
    from tasks.pool.requests import insist, own_retries, prefect_client

    def repeat(request: Callable[[], Any]) -> Any:
        return insist(request, 600.0)

    with temporary_settings({PREFECT_API_URL: url}), own_retries(), prefect_client(30.0) as client:
        while not over.wait(QUERY_SECONDS):
            try:
                found = repeat(lambda: client.get_scheduled_flow_runs_for_work_pool(POOL))
            except ObjectNotFound:
                continue
            for each in found:
                run, record = each.flow_run.id, Record("stand-in", 1, "done", {"running": 0.01})
                record.entry = _entry(each.flow_run.parameters["name"][1:])
                made = ArtifactCreate(type=TYPE, flow_run_id=run, data=vars(record))
                repeat(lambda made=made: client.create_artifact(made))
                repeat(lambda run=run: client.set_flow_run_state(run, Completed(), force=True))


def _entry(number: str) -> str:
    """Return the entry of dvc.lock of a stage that copied its byte."""
    md5 = hashlib.md5(b"x", usedforsecurity=False).hexdigest()
    same = f"      hash: md5\n      md5: {md5}\n      size: 1\n"
    inputs = f"  s{number}:\n    cmd: cp in out-{number}\n    deps:\n    - path: in\n{same}"
    return f"{inputs}    outs:\n    - path: out-{number}\n{same}"
