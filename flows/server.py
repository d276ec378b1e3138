"""Provide the Prefect API of a command: the configured server, or a private one that ends with the command, however it ends."""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_HOME, temporary_settings

from pipelines.runtime import credentials
from pipelines.runtime.credentials import SERVING
from pipelines.runtime.garbage import library_command
from pipelines.runtime.listening import listens
from pipelines.runtime.redaction import redact
from posttrain.errors import OrchestrationError
from posttrain.network import answers, free_port, wait_until
from tasks.process import end, start

START_SECONDS, ANSWER_SECONDS = 120.0, 5.0


@contextmanager
def prefect_api(root: Path, meanwhile: Callable[[], object] = lambda: None) -> Iterator[str | None]:
    """Yield the configured server's URL, or None if a private one was started.

    Prefect's own temporary server shares the terminal's process group: Ctrl-C stops it while the flow still needs it, and it outlives
    a killed flow. This private server runs under a guard and uses the same database. `meanwhile` is called while it starts.
    """
    configured = PREFECT_API_URL.value()
    if configured:
        require_server(configured)
        yield configured
        return
    require_home(root)
    port = free_port(0)
    path = root / ".posttrain" / "logs" / "prefect.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = library_command("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    auth = credentials.prefect_auth(root)
    extra = credentials.prefect_server(auth, port) | {"PREFECT_SERVER_UI_ENABLED": "false"}
    with path.open("wb") as log:
        process = start(command, root, output=log, extra=extra, grace_seconds=5)
    # Prefect sends its last log lines and events when the interpreter shuts its threads down, which comes before this.
    atexit.register(end, process, 0)
    meanwhile()
    wait_until_healthy(process, port, path)
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api", PREFECT_API_AUTH_STRING: auth}):
        yield None


def require_home(root: Path) -> Path:
    """Return the folder of Prefect's database. Raises OrchestrationError if it cannot be written, as with a HOME that does not exist."""
    home = Path(PREFECT_HOME.value())
    probe = home / f".writable.{os.getpid()}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise OrchestrationError(
            f"{home} cannot be written: {error.strerror}. Prefect keeps the history of the flows there. Set PREFECT_HOME to a folder"
            f" that this user may write, e.g. PREFECT_HOME={root.absolute() / '.posttrain' / 'prefect'}"
        ) from None
    return home


def require_server(url: str) -> None:
    """Raise OrchestrationError if no Prefect server responds at the URL, or it is not the address of one."""
    if not url.startswith(("http://", "https://")):
        raise OrchestrationError(
            f"PREFECT_API_URL = {redact(url)}: not an address of a Prefect server. Set it to http://HOST:PORT/api, or unset it to use a"
            " private one."
        )
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        # Prefect's own client handles authentication and certificates.
        with get_client(httpx_settings={"timeout": ANSWER_SECONDS}, sync_client=True) as client:
            error = client.api_healthcheck()
        if error is None:
            return
        if time.monotonic() > deadline:
            raise OrchestrationError(
                f"the Prefect server at {redact(url)} (PREFECT_API_URL) does not respond: {redact(str(error))}. Start it (`make status`"
                " shows the servers of `make up`), or unset PREFECT_API_URL to use a private one."
            )
        time.sleep(0.5)


def wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until this process, and no other one, answers on the port. Raises OrchestrationError if it does not."""
    health = f"http://127.0.0.1:{port}/api/health"

    def is_up() -> bool:
        return answers(health) and listens(process.pid, port)

    if wait_until(is_up, lambda: process.poll() is None, START_SECONDS):
        return
    if process.poll() is not None:
        raise OrchestrationError(
            f"Prefect's server ended with status {process.returncode} while starting{_reason(log)}. If a full disk or a limit is the"
            f" cause, free space or raise the limit (`ulimit -n`), then run again; its log is {log}"
        )
    raise OrchestrationError(f"Prefect's server did not answer in {START_SECONDS:.0f} s; see {log}")


def _reason(log: Path) -> str:
    """Return the last line of a log that names an error, after a colon; nothing without one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    named = [line.strip() for line in lines if re.search(r"\w(Error|Exception)\b", line)]
    return f": {redact(named[-1])}" if named else ""


@contextmanager
def only_serving(root: Path) -> Iterator[None]:
    """Hold the lock of Prefect's database folder. Raises OrchestrationError if a different project serves from it.

    Two projects in one database would replace each other's schedules, and either would run the other's flows.
    """
    if PREFECT_API_URL.value():
        yield
        return
    home = require_home(root)
    with (home / "posttrain-serve.lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            if holder.endswith(f" in {root}"):
                raise OrchestrationError(f"`make serve` is already running here ({holder}). Stop it first.") from None
            raise OrchestrationError(
                f"`make serve` is already running ({holder}) with Prefect's database in {home}. Two"
                " projects in one database would replace each other's schedules. Stop the other one, or give this project"
                f" its own database: PREFECT_HOME={root / '.posttrain' / 'prefect'} make serve PREFECT_PORT=0"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} in {root}")
        file.flush()
        yield


@contextmanager
def announced(root: Path, url: str) -> Iterator[None]:
    """Write the server's address to .posttrain/serve.lock and hold the lock, so that `make ui` finds the running server.

    Raises OrchestrationError if a second `make serve` holds it: both would start the same runs.
    """
    with (root / SERVING).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise OrchestrationError(
                f"`make serve` is already running in {root} with the Prefect server at {redact(file.read().strip())}. Use its pages"
                " (`make ui` shows them), or stop it first."
            ) from None
        file.truncate(0)
        file.write(url)
        file.flush()
        yield
