"""A small server with vLLM's protocol that computes with transformers. It is the peer of the tested code, not a part of it.

Run as a script it takes vLLM's command line: python peer.py -m vllm.entrypoints.openai.api_server --model FOLDER --uds SOCKET …
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from socketserver import TCPServer, ThreadingUnixStreamServer
from threading import Event, Lock, Thread
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Reply = tuple[int, Any]


class Peer:
    """`faults`: called with the number of a completion before it is made; its return value is answered instead, and 0 hangs up.

    tied: the output head is never replaced. raw: log-probabilities before the temperature. loads: weights are loaded when it says so.
    counted: its counter of tokens, if it has one.
    silent: pages that are never answered; cut: answers of completions end after their header, without a byte of content.
    extension: it knows the trainer's transfer, and sleeps.
    memory: called with the change of its memory in bytes when it goes to sleep or wakes, if it can sleep.
    fetched: the bytes of each transfer.
    unhealthy: so many times it will say that it is not well. paths and asked: what was posted.
    """

    def __init__(self, model: PreTrainedModel, context: int = 64, socket: str | None = None) -> None:
        self.model, self.context = model.eval(), context
        self.tied = self.raw = False
        self.loads = self.development = self.token_ids = True
        self.unhealthy = 0
        self.silent: set[str] = set()
        self.cut, self.over = False, Event()
        self.memory: Callable[[int], None] | None = None
        self.asleep, self.extension, self.fetched = False, True, list[int]()
        self.counted: Callable[[], float] | None = None
        self.faults: Callable[[int], Reply | None] = lambda number: None
        self.paths: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self._lock = Lock()
        # by the name under which vLLM's workers import it, if this is a server that a test started as they are
        name = "posttrain_receiver"
        self.worker = import_module(name if find_spec(name) else f"posttrain.rollouts.vllm.worker.{name}").Receiver()
        self.worker.reload_weights = self.reload_weights
        peer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path in peer.silent:
                    peer.over.wait(300)
                if self.path == "/metrics" and peer.counted is not None:
                    self._send(200, f'vllm:generation_tokens_total{{model="policy"}} {peer.counted()}\n'.encode())
                    return
                self._reply(*peer.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path.split("?")[0] in peer.silent:
                    peer.over.wait(300)
                status, value = peer.post(self.path.split("?")[0], body)
                if status == 0:
                    self.connection.close()
                    return
                self._reply(status, value)

            def _reply(self, status: int, value: Any) -> None:
                self._send(status, json.dumps(value).encode())

            def _send(self, status: int, data: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if peer.cut and self.path == "/v1/completions":
                    self.wfile.flush()
                    peer.over.wait(300)
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (OSError, ValueError):  # the other side has gone, or this one has hung up
                    self.close_connection = True

        if socket is None:
            self._server: TCPServer = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        else:
            self._server = ThreadingUnixStreamServer(socket, Handler)
            self.url = f"unix:{socket}"

    def start(self) -> Peer:
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self) -> None:
        self._server.serve_forever()

    def get(self, path: str) -> Reply:
        if path == "/health" and self.unhealthy:
            self.unhealthy -= 1
            return 503, None
        if path == "/v1/models":
            return 200, {"data": [{"id": "policy", "max_model_len": self.context}]}
        if path == "/is_sleeping":
            return 200, {"is_sleeping": self.asleep}
        return 200, None

    def post(self, path: str, body: dict[str, Any]) -> Reply:
        with self._lock:
            self.paths.append(path)
            if path == "/v1/completions":
                self.asked.append(body)
                return self.faults(len(self.asked)) or (200, {"choices": [self.complete(body)]})
            if not self.development:
                return 404, {"detail": "Not Found"}
            if path == "/collective_rpc":
                return self._call(body["method"], body["kwargs"])
            if path == "/sleep" and not self.extension:
                return 500, {"error": "Sleep-mode backend 'cumem' is not supported on this platform."}
            if path in ("/sleep", "/wake_up"):
                self._sleep(path == "/sleep")
            return 200, {"success": True}

    def _call(self, method: str, arguments: dict[str, Any]) -> Reply:
        if method == "reload_weights":
            self._load(Path(arguments["weights_path"]))
            return 200, {"results": [None]}
        if not self.extension:
            return 500, {"error": f"Worker has no attribute {method}"}
        if method == "posttrain_groups":
            return 200, {"results": [self.worker.posttrain_groups()]}
        result = self.worker.posttrain_load(**arguments)
        self.fetched.append(result.get("bytes", 0))
        return 200, {"results": [result]}

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take the weights as vLLM's worker does."""
        state = {name: tensor.clone() for name, tensor in weights_iterator}
        if self.loads:
            self.model.load_state_dict(state, strict=False)

    def _sleep(self, asleep: bool) -> None:
        if self.memory is not None and asleep != self.asleep:
            self.asleep = asleep
            self.memory(1 if asleep else -1)

    def _load(self, folder: Path) -> None:
        """If it ties the embeddings, its output head stays as it was, as with vLLM."""
        if not self.loads:
            return
        head = self.model.get_output_embeddings()
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        if self.tied:
            self.model.set_output_embeddings(head)

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Compute one token at a time, from scratch each time."""
        generator = torch.Generator().manual_seed(body["seed"])
        prompt, tokens, logprobs, reason = list(body["prompt"]), [], [], "length"
        while len(tokens) < body["max_tokens"] and reason == "length":
            logits = self.model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].float()
            tempered = (logits / (body["temperature"] or 1.0)).log_softmax(-1)
            greedy = body["temperature"] == 0
            token = int(tempered.argmax() if greedy else torch.multinomial(tempered.exp(), 1, generator=generator))
            tokens.append(token)
            logprobs.append(float((logits.log_softmax(-1) if self.raw else tempered)[token]))
            reason = "stop" if token in body.get("stop_token_ids", ()) else "length"
        choice: dict[str, Any] = {"finish_reason": reason, "logprobs": {"token_logprobs": logprobs}}
        if self.token_ids:
            choice["token_ids"] = tokens
        if body.get("prompt_logprobs") is not None:
            own = self.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
            choice["prompt_logprobs"] = [None] + [
                {str(t): {"logprob": float(own[i, t])}} for i, t in enumerate(prompt[1:])
            ]
        return choice


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = dict(zip(sys.argv[3::2], sys.argv[4::2], strict=False))
    if arguments.get("--load-format") == "dummy":
        served = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments["--model"]))
    else:
        served = AutoModelForCausalLM.from_pretrained(arguments["--model"])
    Peer(served, int(arguments["--max-model-len"]), arguments["--uds"]).serve()
