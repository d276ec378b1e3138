"""A folder with everything that the training steps read, in which they run as forks of one warm process: real processes, in a second."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.runtime.identity import file_digest

DROPPED = ("MLFLOW_TRACKING", "POSTTRAIN_", "DVC_")
CLIENT = "import sys; from pipelines.runtime.fork_server import run_in_fork_server; sys.exit(run_in_fork_server(sys.argv[1], sys.argv[2:]))"
"""`python -m` of a step hands over to the warm process too; this does it before anything is imported."""
ONCE = ("great_expectations", "matplotlib.backends.backend_agg", "matplotlib.pyplot", "scipy.stats")
"""Modules of `validate` and `compare`. A flow needs them once, so its own server does not import them; tests need them many times."""
OVERLAY = Path(__file__).with_name("tiny.yaml")


def environment(root: Path, **extra: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(DROPPED)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    quiet = {"TQDM_DISABLE": "1", "POSTTRAIN_FOLLOWER": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return inherited | {"PYTHONPATH": str(root), "PATH": path} | quiet | extra


class Warm:
    """`python -m pipelines.runtime.fork_server`: torch is imported once, every step is a fork."""

    def __init__(self, root: Path, folder: Path) -> None:
        """Start a server whose socket is in `folder`."""
        self.root, self.socket = root, folder / "warm"
        command = [sys.executable, "-m", "pipelines.runtime.fork_server", str(self.socket), *ONCE]
        self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
            command, env=environment(root), cwd=folder, start_new_session=True
        )
        self.pid = self.process.pid
        deadline = time.monotonic() + 60
        while not self.socket.exists():
            assert time.monotonic() < deadline, "the warm process does not start"
            assert self.process.poll() is None, "the warm process died"
            time.sleep(0.05)

    @classmethod
    def shared(cls, root: Path, folder: Path) -> Warm:
        """Return the server of several processes; the first one starts it. `users` in the folder has a line for each."""
        folder.mkdir(exist_ok=True)
        with locked(folder):
            users = folder / "users"
            if users.is_file() and users.read_text():  # empty: its last user has stopped it before this one came
                warm = cls.__new__(cls)
                warm.root, warm.socket, warm.process = root, folder / "warm", None
                warm.pid = int((folder / "pid").read_text())
            else:
                warm = cls(root, folder)
                (folder / "pid").write_text(f"{warm.pid}\n")
            with users.open("a") as file:
                file.write(f"{os.getpid()}\n")
        return warm

    def leave(self) -> None:
        """End the use of a shared server; the last user stops it."""
        users = self.socket.with_name("users")
        with locked(users.parent):
            left = [line for line in users.read_text().split() if line != f"{os.getpid()}"]
            users.write_text("".join(f"{line}\n" for line in left))
            if not left:
                self.stop()

    def stop(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        self.socket.unlink(missing_ok=True)
        if self.process is not None:
            self.process.wait()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock."""
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Workspace:
    """Tables, models and parameters, and the runs of the steps over them."""

    def __init__(self, folder: Path, warm: Warm) -> None:
        self.folder, self.warm = folder, warm

    def start(self, *command: str, **extra: str) -> subprocess.Popen[str]:
        env = environment(self.warm.root, POSTTRAIN_WARM=str(self.warm.socket), **extra)
        return subprocess.Popen(
            [sys.executable, "-c", CLIENT, *command], cwd=self.folder, env=env, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*command, **extra)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def succeed(self, *command: str, **extra: str) -> str:
        done = self.run(*command, **extra)
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def points(self, *step: str) -> list[str]:
        """Run a step undisturbed and list the points at which it could have been killed."""
        listing = self.folder / "points.json"
        self.succeed("tests.reliability.dying", "-", *step, POINTS=str(listing))
        passed: list[str] = json.loads(listing.read_text())
        return passed

    def killed_at(self, point: str, *step: str) -> None:
        """Run a step until it is killed at the point."""
        done = self.run("tests.reliability.dying", point, *step)
        assert (done.returncode, "Traceback" in done.stderr) == (128 + signal.SIGKILL, False), (
            f"{point}: {done.stdout}{done.stderr}"
        )

    def state(self, name: str) -> Path:
        """Return the live folder of the one run of that name."""
        (found,) = (self.folder / ".posttrain" / "runs").glob(f"{name}-" + "?" * 16)
        return found

    def results(self, *outputs: str) -> dict[str, str]:
        """Digest of every file that a run has left, by path."""
        files = [path for name in outputs for path in sorted((self.folder / name).rglob("*")) if path.is_file()]
        return {path.relative_to(self.folder).as_posix(): file_digest(path) for path in files}

    def forget(self, name: str, *outputs: str) -> None:
        """Remove the files and folders of a run, so that the next one passes the same points."""
        shutil.rmtree(self.state(name))
        for output in outputs:
            shutil.rmtree(self.folder / output)
            parent = (self.folder / output).parent
            if not any(parent.iterdir()):
                parent.rmdir()


def prepare(folder: Path, warm: Warm) -> Workspace:
    """Tables as `ingest` makes them, and the models that alignment starts from. Validation has no part in it."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(warm.root / name, folder)
    (folder / "data" / "raw").mkdir(parents=True)
    workspace = Workspace(folder, warm)
    workspace.succeed("pipelines.commands.configure", str(OVERLAY))
    workspace.succeed("pipelines.ingest")
    shutil.copytree(folder / "data" / "tables", folder / "data" / "valid")
    for step in ("base", "sft", "reward", "reward_readers"):
        workspace.succeed(f"pipelines.{step}")
    return workspace
