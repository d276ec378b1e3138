"""Find the project root, and set environment variables that silence third-party tools.

Import this module before Prefect, MLflow, DVC and Great Expectations: they read these variables when they are imported.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pipelines.runtime import threads
from posttrain.errors import OrchestrationError

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "2000",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
}
"""Environment variables that turn off telemetry and keep the Hugging Face libraries offline. Threads that wait for each other spin for some
microseconds, as long as one operator follows the next, and then sleep: by spinning on, two threads of a stage on taken cores would be four
times as slow as one, and by sleeping at once they would gain a tenth instead of a third. Processes started from here set no small blocks
aside for each thread, which would separate freed tensors from the bytes that the next ones need (posttrain/models/allocator.py)."""


FAULTS_OF_THE_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENAMETOOLONG,
)
"""Errors of disk, rights and quota, which are not bugs of the code."""
LIMITS = {
    errno.EMFILE: "Raise this process's limit of open files, e.g. `ulimit -n 4096`",
    errno.ENFILE: "Close other programs, or have root raise the machine's limit of open files (fs.file-max)",
    errno.EAGAIN: "End other processes of this user, or raise the limit of processes and threads (`ulimit -u`, or the container's)",
    errno.ENOMEM: "End other processes, or give this one more memory",
}
"""What to do about a limit of the system."""
_NO_THREAD = "can't start new thread"
_PANIC_CODE = re.compile(r"Os { code: (\d+)")
"""How a Rust library such as tokenizers names the error of the system for which it gives up."""
FULL_BYTES = 1 << 22
THREADS = 16
"""Threads of a step besides those that its libraries start for each processor."""


def started_by_console() -> bool:
    """Return True if this process was started as `posttrain NAME` and not by a module's own name."""
    started = sys.orig_argv[1:3]
    return any(Path(word).name == "posttrain" for word in started) or "pipelines.commands" in started


def quiet() -> None:
    """Turn off telemetry and network access of third-party tools; a variable that is already set keeps its value."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    _reach_loopback()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a name that the terminal cannot show must not end a command in the middle
            stream.reconfigure(errors="backslashreplace")


def require_own_code(project: Path) -> None:
    """Raise OrchestrationError if the project's folder has its own code, and different code runs.

    Its results would be recorded for code that did not make them.
    """
    running, own = Path(__file__).resolve().parents[1], project / "pipelines"
    if own.is_dir() and own.resolve() != running:
        raise OrchestrationError(
            f"the code that runs is {running}, and this project has its own in {own.absolute()}: results would be recorded for code that"
            " did not make them. Unset PYTHONSAFEPATH and PYTHONPATH, or use the .venv of this folder (`make setup`)."
        )


def _reach_loopback() -> None:
    """Exclude loopback addresses from a configured proxy, so that requests to local servers do not leave the machine."""
    if not any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return
    for name in ("no_proxy", "NO_PROXY"):
        listed = [part.strip() for part in os.environ.get(name, "").split(",") if part.strip()]
        os.environ[name] = ",".join(dict.fromkeys([*listed, "127.0.0.1", "localhost"]))


def root() -> Path:
    """Return the project root: the nearest folder at or above the working directory that holds params.yaml."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "params.yaml").is_file():
            return folder
    return here


def require_writable(project: Path) -> None:
    """Raise OrchestrationError if .posttrain cannot be written: a read-only checkout, a full disk, or a file of that name."""
    folder = (project / ".posttrain").absolute()
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise OrchestrationError(
            f"{folder} cannot be written: {error.strerror}. The command keeps its logs and its state there. Make the project writable"
            " for this user, free disk space, or copy the project to a writable folder."
        ) from None


def require_threads() -> None:
    """Raise RuntimeError if the system refuses as many threads as a step may need: torch and tokenizers abort or hang for lack of one."""
    threads.require_threads(THREADS + 2 * (os.cpu_count() or 1))


def machine_fault(error: OSError | RuntimeError) -> str | None:
    """Return an error of the machine (disk, rights, quota, limits) and what to do about it, without a full stop; None for a bug."""
    if isinstance(error, RuntimeError):
        return f"{error}. {LIMITS[errno.EAGAIN]}" if str(error) == _NO_THREAD else None
    number = error.errno or 0
    if number in LIMITS:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}. {LIMITS[number]}"
    if number not in FAULTS_OF_THE_MACHINE:
        return None
    place = error.filename or _full_disk() or Path.cwd()
    return f"{error.strerror or error}: {place}. Free space, or give this user the right to read and write there"


def is_panic(error: BaseException) -> bool:
    """Return True if a library in Rust has given up, which pyo3 raises as no Exception."""
    return type(error).__name__ == "PanicException"


def panic_fault(error: BaseException) -> str | None:
    """Return a limit of the system for which a library in Rust has given up, and what to do about it; None for a bug."""
    found = _PANIC_CODE.search(str(error)) if is_panic(error) else None
    number = int(found[1]) if found else 0
    return f"{os.strerror(number)}. {LIMITS[number]}" if number in LIMITS else None


def _full_disk() -> str:
    """Return the folders of this process that have less than FULL_BYTES left, for errors that do not name a file."""
    named = [Path.cwd(), Path(os.environ.get("TMPDIR", "/tmp")), Path.home()]
    full = [str(path) for path in named if path.is_dir() and shutil.disk_usage(path).free < FULL_BYTES]
    return ", ".join(dict.fromkeys(full))


def states(project: Path) -> Path:
    """Return the untracked folder of live journals, measurements and checkpoints: one sub-folder per run identity."""
    return project / ".posttrain" / "runs"


def commit() -> str | None:
    """Return the checked-out git commit, or None without git or a repository."""
    git = shutil.which("git")
    if git is None:
        return None
    answer = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None
