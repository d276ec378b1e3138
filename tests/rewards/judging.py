"""A server with OpenAI's interface whose answers are computed from the question, for tests of judges."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str], str | int]
"""From a question to the judge's answer, or to the status of an error."""


class JudgeHandler(BaseHTTPRequestHandler):
    server: TestServer

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = asked["messages"][-1]["content"]
        with self.server.lock:
            self.server.asked.append(asked)
            self.server.headers.append(dict(self.headers))
            self.server.active += 1
            self.server.most = max(self.server.most, self.server.active)
        try:
            said = self.server.reply(question)
        finally:
            with self.server.lock:
                self.server.active -= 1
        if isinstance(said, int):
            self._send(said, {"error": {"message": f"status {said}"}})
            return
        usage = {"prompt_tokens": len(question), "completion_tokens": len(said)}
        self._send(200, {"choices": [{"message": {"role": "assistant", "content": said}}], "usage": usage})

    def _send(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/v1/chat/completions")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        return


class TestServer(ThreadingHTTPServer):
    __test__ = False
    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), JudgeHandler)
        self.reply, self.lock = reply, threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.active = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def judge_server(reply: Reply) -> Iterator[TestServer]:
    """Serve `reply` until the end of the block."""
    server = TestServer(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer_in(question: str, tag: str = "answer") -> str:
    """Return the answer that a question shows."""
    found = re.search(rf"<{tag}>\n(.*?)\n</{tag}>", question, re.DOTALL)
    assert found is not None
    return found[1]
