"""A vLLM server that this process starts, restarts after a crash, and stops at its own end.

vLLM's password protects only its `/v1` pages, not those that load weights. So the server listens on no port, but on a Unix socket in a
folder of mode 0700: other users and web pages cannot reach it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from tqdm import tqdm

from posttrain.errors import RolloutError, ServerError
from posttrain.guard import GROUP_GRACE_SECONDS, guarded_group
from posttrain.rollouts.vllm.connection import UNIX, private_folder
from posttrain.rollouts.vllm.server import REQUEST_SECONDS, VllmServer

if TYPE_CHECKING:
    from posttrain.rollouts.vllm.broadcast import Sender

START_SECONDS, POLL_SECONDS = 900.0, 0.5
DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    # by default the CPU build reserves half of the memory and binds itself to cores
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Environment of the server; variables that the caller has set take precedence."""
NAME_LENGTH = 36
"""Characters of a socket's name in the server's folder: vLLM names those between its processes by a UUID."""
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
WORKER = Path(__file__).resolve().parent / "worker"
"""Folder of the extension by which vLLM's workers fetch weights."""


@dataclass(frozen=True)
class Launch:
    """How to start the server.

    Attributes:
        python: interpreter of an environment with vLLM.
        context: tokens of prompt and answer together.
        memory_share: most of the device's memory that the server may use, next to a trainer on the same device; None: vLLM's default.
        sleeps: it can give its memory back while the trainer works.
        fetches: its workers can fetch weights from the trainer's memory.

    Example:
        >>> launch = Launch("python", tokenizer="models/sft", dtype="float32", context=64)
        >>> command = launch.command(Path("weights"), Path("/run/vllm/socket"))
        >>> command[command.index("--max-model-len") + 1], command[command.index("--uds") + 1]
        ('64', '/run/vllm/socket')
    """

    python: str
    tokenizer: str
    dtype: str
    context: int
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    start_seconds: float = START_SECONDS
    memory_share: float | None = None
    sleeps: bool = False
    fetches: bool = False

    def command(self, folder: Path, socket: Path, empty: bool = False) -> list[str]:
        """Return the command. `empty`: the folder has no weights, and the server starts with arbitrary ones."""
        share = [] if self.memory_share is None else ["--gpu-memory-utilization", f"{self.memory_share:.2f}"]
        share += ["--enable-sleep-mode"] if self.sleeps else []
        share += ["--load-format", "dummy"] if empty else []
        share += ["--worker-extension-cls", "posttrain_receiver.Receiver"] if self.fetches else []
        return [
            self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "policy",
            "--tokenizer", self.tokenizer, "--generation-config", "vllm", "--logprobs-mode", "processed_logprobs",
            "--dtype", self.dtype, "--max-model-len", str(self.context), "--uds", str(socket),
            *share, *self.arguments,
        ]  # fmt: skip


class LocalServer(VllmServer):
    """A server that starts with the first weights it gets. Its process group ends with this process, however that ends."""

    def __init__(self, launch: Launch, log: Path, request_seconds: float = REQUEST_SECONDS) -> None:
        super().__init__(UNIX, request_seconds)
        self.socket: Path | None = None
        self.launch, self.log = launch, log
        self._process: subprocess.Popen[bytes] | None = None
        self._stop, self._begin = Event(), 0

    def update(self, folder: Path) -> None:
        """Load weights as VllmServer does; if the server does not run, start it with them."""
        if self._process is not None and self._process.poll() is None:
            try:
                super().update(folder)
                return
            except ServerError as error:
                tqdm.write(f"{error}; restarting it", file=sys.stderr)
        self._start(folder)

    def fetch(
        self, sources: Sequence[Mapping[str, str]], size: int, folder: Path, sender: Sender | None = None
    ) -> None:
        """Fetch weights as VllmServer does; if the server does not run, start it first."""
        if self._process is not None and self._process.poll() is None:
            try:
                super().fetch(sources, size, folder, sender)
                return
            except ServerError as error:
                tqdm.write(f"{error}; restarting it", file=sys.stderr)
        self._start(folder, empty=True)
        super().fetch(sources, size, folder, sender)

    def close(self) -> None:
        self._stop.set()
        super().close()
        self._end()
        if self.socket is not None:
            shutil.rmtree(self.socket.parent, ignore_errors=True)

    def _start(self, folder: Path, empty: bool = False) -> None:
        self._end()
        socket = self._socket()
        socket.unlink(missing_ok=True)  # a killed server leaves it, and a new one cannot listen on it
        tqdm.write(f"starting a vLLM server, which takes a minute or more; log: {self.log}", file=sys.stderr)
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._begin = log.tell()
            self._process = subprocess.Popen(
                guarded_group(self.launch.command(folder, socket, empty), scratch=socket.parent),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # the sockets between the server's processes are next to its own
                env={
                    **DEFAULTS,
                    **inherited,
                    **self.launch.environment,
                    "VLLM_SERVER_DEV_MODE": "1",
                    **({"PYTHONPATH": str(WORKER)} if self.launch.fetches else {}),
                    "VLLM_RPC_BASE_PATH": str(socket.parent),
                },
                cwd=self.log.parent,
                start_new_session=True,
            )
        weakref.finalize(self, _end, self._process)
        self._wait(self._process)

    def _socket(self) -> Path:
        """Return the socket of all starts. Other processes keep its address, so it does not change."""
        if self.socket is None:
            folder = private_folder(NAME_LENGTH)
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self.socket = folder / "vllm.sock"
            self.url = f"{UNIX}{self.socket}"
        return self.socket

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self.launch.start_seconds
        while not self._stop.wait(POLL_SECONDS):
            if process.poll() is not None:
                raise RolloutError(self._exited())
            try:
                self.connect()
                return
            except ServerError as error:
                if time.monotonic() > deadline:
                    raise RolloutError(
                        f"the vLLM server did not answer within {self.launch.start_seconds:g} seconds ({error}); its log {self.log} ends"
                        f" with:\n{self._tail()}"
                    ) from error
        raise ServerError(f"{self.url} was closed while it started")

    def _exited(self) -> str:
        """Return the message of a server that ended during its start: the end of its log, or how to see the reason."""
        if tail := self._tail():
            return f"the vLLM server exited during its start; its log {self.log} ends with:\n{tail}"
        return (
            f"the vLLM server exited during its start and wrote nothing, so its interpreter may not have vLLM. Try:"
            f" {self.launch.python} -m vllm.entrypoints.openai.api_server --help"
        )

    def _tail(self, lines: int = 15) -> str:
        """Return the last lines of this start's log."""
        written = self.log.read_bytes()[self._begin :].decode(errors="replace")
        return "\n".join(written.splitlines()[-lines:])

    def _end(self) -> None:
        if self._process is not None:
            _end(self._process)
            self._process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop the whole process group through its guard, and wait until it has ended."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(2 * GROUP_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
