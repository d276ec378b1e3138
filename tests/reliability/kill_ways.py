"""Ways to start a stage for the series of kills: as a command, in the warm process, by dvc, in a flow, and under a worker."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.runtime.environment import QUIET
from posttrain.files import write_atomic
from posttrain.network import answers, free_port, wait_until
from tests.reliability.workspace import CLIENT, Warm, environment

START_SECONDS = 600.0
"""For a Prefect server on a busy machine."""


@dataclass(frozen=True)
class Kind:
    """One kind of training: its stage in dvc.yaml, its run, its command and its outputs."""

    stage: str
    run: str
    command: tuple[str, ...]
    outputs: tuple[str, ...]


ALGORITHMS = ("dpo", "ppo", "grpo", "dapo", "gspo", "chord")
AHEAD = ("grpo_ahead", "gspo_ahead", "cispo_ahead")
"""Algorithms whose answers a second process samples during the update, with staleness 1, 2 and 4."""
KINDS = {
    "sft": Kind("sft", "sft", ("pipelines.sft",), ("models/sft", "runs/sft")),
    "reward": Kind("reward", "reward", ("pipelines.reward",), ("models/reward", "runs/reward")),
    **{
        name: Kind(
            f"align@{name}-0",
            f"align-{name}-0",
            ("pipelines.align", "--algorithm", name, "--seed", "0"),
            (f"models/align/{name}-0", f"runs/align/{name}-0"),
        )
        for name in (*ALGORITHMS, *AHEAD)
    },
    "evaluate": Kind("evaluate@sft", "evaluate-sft", ("pipelines.evaluate", "--model", "sft"), ("runs/evaluate/sft",)),
}


class Attempt:
    """A started stage: `victims` lists the processes that a kill may choose from, `finished` waits for the end."""

    def __init__(self, process: subprocess.Popen[bytes], relatives: Callable[[], list[psutil.Process]]) -> None:
        self._process, self._relatives = process, relatives

    def victims(self) -> list[psutil.Process]:
        """Return the living processes of this attempt."""
        found = _family(self._process.pid) if self._process.poll() is None else []
        return [process for process in [*found, *self._relatives()] if _lives(process)]

    def running(self) -> bool:
        """Return True until the command has ended."""
        return self._process.poll() is None

    def finished(self, seconds: float = 1800) -> bool:
        """Wait for the end of the command and of all its processes; return True if it succeeded."""
        everyone = self.victims()
        status = self._process.wait(seconds)
        _, alive = psutil.wait_procs([process for process in everyone if process.pid != self._process.pid], timeout=90)
        assert not [process for process in alive if _lives(process)], f"processes stay behind: {alive}"
        return status == 0


def _family(pid: int) -> list[psutil.Process]:
    """Return a process and everything below it; nothing if it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Starter:
    """Start a kind of training in a project, in one of the ways."""

    def __init__(self, folder: Path, root: Path, warm: Warm | None = None) -> None:
        self.folder, self.root, self.warm = folder, root, warm
        self.prefect: dict[str, str] = {}
        self.ways: dict[str, Callable[[Kind], Attempt]] = {
            "warm": self._in_warm, "step": self._as_command, "dvc": self._by_dvc, "flow": self._in_flow, "worker": self._under_worker,
        }  # fmt: skip

    def launch(self, *command: str, log: str = "attempt.log", **extra: str) -> subprocess.Popen[bytes]:
        env = environment(
            self.root,
            POSTTRAIN_GRACE_SECONDS="5",
            POSTTRAIN_SLOTS="1",
            CUDA_VISIBLE_DEVICES="",
            POSTTRAIN_LEASES=str(self.folder / ".posttrain" / "leases"),
            **QUIET,
            **extra,
        )
        with (self.folder / log).open("wb") as output:
            return subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _in_warm(self, kind: Kind) -> Attempt:
        assert self.warm is not None
        server = psutil.Process(self.warm.pid)
        before = {child.pid for child in server.children(recursive=True)}
        process = self.launch("-c", CLIENT, *kind.command, POSTTRAIN_WARM=str(self.warm.socket))
        return Attempt(process, lambda: [child for child in server.children(recursive=True) if child.pid not in before])

    def _as_command(self, kind: Kind) -> Attempt:
        return Attempt(self.launch("-m", *kind.command), list)

    def _by_dvc(self, kind: Kind) -> Attempt:
        return Attempt(self.launch("-m", "dvc", "repro", "--single-item", "--force", kind.stage), list)

    def _in_flow(self, kind: Kind) -> Attempt:
        self._forget(kind)
        extra = {**self.prefect, "POSTTRAIN_FOLLOWER": "0"}
        return Attempt(self.launch("-m", "flows.compare", kind.stage, **extra), list)

    def _under_worker(self, kind: Kind) -> Attempt:
        self._forget(kind)
        script = (
            "import sys; from prefect.deployments import run_deployment;"
            f"run = run_deployment('compare/weekly', parameters={{'targets': ['{kind.stage}'], 'tracking': True}}, poll_interval=1);"
            "sys.exit(not run.state.is_completed())"
        )
        worker = psutil.Process(self._worker())
        before = {child.pid for child in worker.children()}
        waiting = Attempt(self.launch("-c", script, **self.prefect), list)

        def flow() -> list[psutil.Process]:
            mine = [child.pid for child in worker.children() if child.pid not in before]
            return [process for pid in mine for process in _family(pid)]

        return _UnderWorker(waiting._process, flow)

    def _forget(self, kind: Kind) -> None:
        """Make a stage stale: without its entry in dvc.lock, and without DVC's cache of runs."""
        path = self.folder / "dvc.lock"
        entry = re.compile(rf"^  {re.escape(kind.stage)}:\n(?:   .*\n)*", re.MULTILINE)
        write_atomic(path, entry.sub("", path.read_text(encoding="utf-8")).encode())
        shutil.rmtree(self.folder / ".dvc" / "cache" / "runs", ignore_errors=True)

    def _worker(self) -> int:
        return int(self.prefect["KILL_SERIES_WORKER"])

    @contextmanager
    def servers(self, ways: set[str]) -> Iterator[None]:
        """Run a Prefect server, and a worker, if one of the ways needs them."""
        if not ways & {"flow", "worker"}:
            yield
            return
        port, home = free_port(0), self.folder / ".posttrain" / "prefect"
        base = {"PREFECT_HOME": str(home), "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home}/p.db"}
        home.mkdir(parents=True, exist_ok=True)
        command = ("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui")
        started = [self.launch(*command, log="server.log", **base)]
        try:
            healthy = f"http://127.0.0.1:{port}/api/health"
            assert wait_until(lambda: answers(healthy), lambda: started[0].poll() is None, START_SECONDS), (
                "see server.log"
            )
            self.prefect = base | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
            if "worker" in ways:
                assert self.launch("-m", "flows.deploy", **self.prefect).wait(START_SECONDS) == 0
                worker = {**self.prefect, "PREFECT_WORKER_QUERY_SECONDS": "2"}
                started.append(self.launch("-m", "flows.worker", log="worker.log", **worker))
                self.prefect["KILL_SERIES_WORKER"] = str(started[-1].pid)
                time.sleep(1)
            yield
        finally:
            for process in reversed(started):
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()


class _UnderWorker(Attempt):
    """The flow under a worker: only its processes are killed, not the command that waits for it."""

    def victims(self) -> list[psutil.Process]:
        return [process for process in self._relatives() if _lives(process)]


def clone(root: Path, folder: Path) -> None:
    """Copy the project's files, as git lists them, into a new repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "series"]):
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)
