"""One vLLM server, by its URL: OpenAI's completions API, and the calls of its development mode that load weights."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.errors import RolloutError, ServerError
from posttrain.network import shut_after
from posttrain.rollouts.engine import Completion, SamplingSettings
from posttrain.rollouts.vllm.connection import base_path, new_connection
from posttrain.rollouts.vllm.progress import LOOK_SECONDS, STALL_SECONDS, tokens_counted, wait_for_reply
from posttrain.rollouts.vllm.replies import field, first, of_prompt, sampled, served_model

if TYPE_CHECKING:
    from posttrain.rollouts.vllm.broadcast import Sender

REQUEST_SECONDS = 900.0
"""A server that has not answered by then is considered hung, whatever it counts."""
HEALTH_SECONDS = 10.0
"""Longest answer to a question that needs no computation, and longest pause within an answer."""
LOAD_SECONDS, LOAD_BYTES_PER_SECOND = 60.0, 20e6
"""Longest load of weights: a start, and the pace of a slow disk or network."""
CACHE_RESETS = 20
"""Attempts to empty the prefix cache; the server refuses while an aborted request still holds a part of it."""
AWAY = (
    "A server on a different host, in a different container or of a different user needs POSTTRAIN_VLLM_TRANSFER=stream:HOST:PORT, an"
    " address of this machine that it reaches, or POSTTRAIN_VLLM_TRANSFER=folder"
)
REACH = {
    "memory": AWAY,
    "stream": AWAY,
    "ipc": f"ipc needs a server on the trainer's GPU, of the same user, that shares /dev/shm. {AWAY}",
    "nccl": "Servers on other hosts need POSTTRAIN_VLLM_TRANSFER=nccl:HOST:PORT, an address of this machine that they reach; if NCCL"
    " finds no network, set NCCL_SOCKET_IFNAME, or POSTTRAIN_VLLM_TRANSFER=stream:HOST:PORT",
}
"""How to mend weights that do not arrive, for each way."""
SLEEPLESS = "start it on a GPU with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1, or unset POSTTRAIN_VLLM_SLEEP (docs/rollouts.md)"


class VllmServer:
    """A vLLM server at `http://…`, `https://…` or `unix:PATH`.

    All methods are thread-safe. They raise ServerError if it is gone, hung or broken.
    """

    def __init__(self, url: str, request_seconds: float = REQUEST_SECONDS) -> None:
        self.url, self.request_seconds = url.rstrip("/"), request_seconds
        self.look_seconds, self.stall_seconds, self.pause_seconds = LOOK_SECONDS, STALL_SECONDS, HEALTH_SECONDS
        self.model, self.context = "", 0
        self._open: set[HTTPConnection] = set()
        self._lock = Lock()
        self._closed = Event()

    def connect(self) -> None:
        """Ask which model and context length it serves.

        Raises:
            ServerError: it does not answer.
        """
        self._exchange("GET", "/health", None, HEALTH_SECONDS)
        self.model, self.context = served_model(self._exchange("GET", "/v1/models", None, HEALTH_SECONDS), self.url)

    def update(self, folder: Path) -> None:
        """Load the weights of `folder`, and drop everything that was computed with older ones."""
        self.connect()
        size = sum(file.stat().st_size for file in folder.iterdir())
        self._call("reload_weights", {"weights_path": str(folder)}, size)
        self._reset()

    def fetch(
        self, sources: Sequence[Mapping[str, str]], size: int, folder: Path, sender: Sender | None = None
    ) -> None:
        """Let every worker fetch `size` bytes of weights from the trainer's memory, and drop everything computed with older ones.

        Args:
            folder: of the model's configuration, for a server that has yet to start.
            sender: sends the weights to the workers, which else read them.

        Raises:
            RolloutError: it was started without the extension that fetches, or cannot reach the memory.
        """
        self.connect()
        if sender is None:
            results = self._extension("posttrain_load", {"sources": list(sources)}, size)
        else:
            results = sender.send(
                self.url,
                sources,
                lambda: self._extension("posttrain_groups", {}, 0),
                lambda announced: self._call("posttrain_load", {"sources": announced}, size),
            )
        for found in results:
            if not isinstance(found, dict) or "error" in found:
                reason = found["error"] if isinstance(found, dict) else f"it answered {found!r}"
                raise RolloutError(
                    f"{self.url} cannot read the weights from {sources[-1]['path']}: {reason}. {REACH[sources[-1]['way']]}"
                    " (docs/rollouts.md)"
                )
        self._reset()

    def _extension(self, method: str, arguments: Mapping[str, Any], size: int) -> list[Any]:
        """Call a method of the extension that fetches weights.

        Raises:
            RolloutError: the server was started without it.
        """
        try:
            return self._call(method, arguments, size)
        except ServerError as error:
            self.connect()  # raises ServerError if the server has ended, which a restart may mend
            raise RolloutError(
                f"the workers of {self.url} cannot fetch weights ({error}). Start it with"
                " --worker-extension-cls posttrain_receiver.Receiver and the folder of that module in PYTHONPATH, or set"
                " POSTTRAIN_VLLM_TRANSFER=folder (docs/rollouts.md)"
            ) from error

    def sleep(self) -> None:
        """Give the memory of weights and cache back until `wake`.

        Raises:
            RolloutError: it stays awake.
        """
        try:
            self._exchange("POST", "/sleep?level=2", {}, LOAD_SECONDS)
        except ServerError as error:
            self.connect()  # raises ServerError if the server has ended
            raise RolloutError(f"{self.url} cannot sleep ({error}): {SLEEPLESS}") from error
        if not field(self._exchange("GET", "/is_sleeping", None, HEALTH_SECONDS), "is_sleeping", self.url):
            raise RolloutError(f"{self.url} does not sleep: {SLEEPLESS}")

    def wake(self, part: str) -> None:
        """Claim the memory of `weights`, whose values are then arbitrary, or of the `kv_cache`."""
        self._exchange("POST", f"/wake_up?tags={part}", {}, LOAD_SECONDS)

    def _call(self, method: str, arguments: Mapping[str, Any], size: int) -> list[Any]:
        """Call a method of all workers, which reads `size` bytes; return their results."""
        seconds = min(self.request_seconds, LOAD_SECONDS + size / LOAD_BYTES_PER_SECOND)
        reply = self._exchange("POST", "/collective_rpc", {"method": method, "kwargs": arguments}, seconds)
        return list(reply.get("results", [])) if isinstance(reply, dict) else []

    def _reset(self) -> None:
        for _ in range(CACHE_RESETS):
            reset = self._exchange("POST", "/reset_prefix_cache?reset_running_requests=true", {}, LOAD_SECONDS)
            if not isinstance(reset, dict) or reset.get("success", True):
                return
        raise ServerError(f"{self.url} did not empty its prefix cache after {CACHE_RESETS} requests to")

    def complete(
        self,
        prompt: Sequence[int],
        seed: Sequence[int],
        settings: SamplingSettings,
        ends: Sequence[int],
        vocabulary: int,
    ) -> Completion:
        """Return one answer. It ends only with one of `ends`, whatever the server's own configuration is."""
        if self.context and len(prompt) + settings.max_new_tokens > self.context:
            raise RolloutError(
                f"a prompt of {len(prompt)} tokens and {settings.max_new_tokens} new ones exceed the {self.context} tokens that"
                f" {self.url} serves; start it with a larger --max-model-len, or lower max_new_tokens or validation.max_prompt_tokens"
            )
        body = self._body(prompt, settings.max_new_tokens, settings.temperature) | {
            "seed": server_seed(seed),
            "stop_token_ids": list(ends),
        }
        choice = self._choice(body)
        tokens, logprobs = sampled(choice, self.url, settings.max_new_tokens, vocabulary)
        finished = choice.get("finish_reason") == "stop" and tokens[-1] in ends
        return Completion(tokens, logprobs, finished)

    def probe(self, ids: Sequence[int], temperature: float, vocabulary: int) -> tuple[list[float], int, float]:
        """Return the log-probabilities of ids[1:] at temperature 1, then a sampled next token and its log-probability."""
        body = self._body(ids, 1, temperature) | {"prompt_logprobs": 0, "seed": 0}
        choice = self._choice(body)
        tokens, logprobs = sampled(choice, self.url, 1, vocabulary)
        return of_prompt(choice, ids, self.url), tokens[0], logprobs[0]

    def close(self) -> None:
        """Abort every open request, and refuse new ones."""
        self._closed.set()
        with self._lock:
            for connection in self._open:
                # close() would leave the thread that reads from it waiting, so shut down
                with contextlib.suppress(OSError, AttributeError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _body(self, ids: Sequence[int], new_tokens: int, temperature: float) -> dict[str, Any]:
        """Return the fields of every request, so that no default of the server or of its generation_config.json applies."""
        return {
            "model": self.model,
            "prompt": list(ids),
            "max_tokens": new_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
        }

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        reply = self._exchange("POST", "/v1/completions", body, self.request_seconds, watched=True)
        return first(reply, "choices", self.url)

    def _tokens_counted(self) -> float | None:
        """Return the server's counter of tokens, None if it has none."""
        response, text = self._fetch("GET", "/metrics", None, self.pause_seconds)
        return tokens_counted(text.decode(errors="replace")) if response.status == 200 else None

    def _exchange(self, method: str, path: str, body: Any, seconds: float, watched: bool = False) -> Any:
        return self._answer(*self._fetch(method, path, body, seconds, watched), path)

    def _fetch(
        self, method: str, path: str, body: Any, seconds: float, watched: bool = False
    ) -> tuple[HTTPResponse, bytes]:
        """Use a new connection for each request: the server may close a kept one at the moment when it is used again.

        Args:
            watched: give up as soon as the server makes no tokens any more.
        """
        connection = new_connection(self.url, seconds)
        with self._lock:
            self._open.add(connection)
        try:
            payload = None if body is None else json.dumps(body).encode()
            with shut_after(connection, seconds):
                if self._closed.is_set():  # close() cannot shut down a socket that did not exist yet
                    raise ServerError(f"{self.url} is not asked for {path} any more: the run is stopping")
                connection.request(method, base_path(self.url) + path, payload, {"Content-Type": "application/json"})
                if watched and not wait_for_reply(
                    connection.sock, self._tokens_counted, self.look_seconds, seconds, self.stall_seconds
                ):
                    raise ServerError(
                        f"{self.url} does not answer {path} and makes no tokens any more, so it is considered hung"
                    )
                if watched:  # the answer has begun, and comes whole
                    connection.sock.settimeout(self.pause_seconds)
                response = connection.getresponse()
                text = response.read()
        except (OSError, HTTPException) as error:
            raise ServerError(f"{self.url} does not answer {path}: {error or type(error).__name__}") from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        return response, text

    def _answer(self, response: HTTPResponse, text: bytes, path: str) -> Any:
        shown = text[:500].decode(errors="replace")
        if response.status >= 500:
            raise ServerError(f"{self.url} answered {path} with {response.status}: {shown}")
        if response.status == 404 and not path.startswith("/v1"):
            raise RolloutError(
                f"{self.url} has no {path}, which updates its weights: start it with VLLM_SERVER_DEV_MODE=1"
                " in its environment (docs/rollouts.md)"
            )
        if response.status != 200:
            raise RolloutError(f"{self.url} refused {path} with {response.status}: {shown}")
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise ServerError(f"{self.url} answered {path} with invalid JSON: {shown}") from None


def server_seed(seed: Sequence[int]) -> int:
    """Return one number of 63 bits for a seed of several numbers, as vLLM needs it.

    Example:
        >>> server_seed((1, 2, 3)) == server_seed((1, 2, 3)), server_seed((1, 2, 3)) < 2**63
        (True, True)
    """
    return int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0] >> 1)
