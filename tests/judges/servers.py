"""A real HTTP server that judges by a rule, and can be slow, busy or broken."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Rule = Callable[[str, str], str]
"""Return the reply to a system text and a user text."""


class Server:
    """Counts requests, and how many were under way at once. `faults` are statuses to answer first."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.faults, self.bodies = rule, list[int](), list[dict[str, Any]]()
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.wait = lambda: None
        self.raw: bytes | None = None
        self.url = ""


@contextmanager
def serving(rule: Rule) -> Iterator[Server]:
    """Serve on a free port of this machine until the block ends."""
    made = Server(rule)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with made.lock:
                made.bodies.append(body)
                made.headers.append(dict(self.headers))
                made.at_once += 1
                made.most_at_once = max(made.most_at_once, made.at_once)
                fault = made.faults.pop(0) if made.faults else 200
            made.wait()
            system, user = (message["content"] for message in body["messages"])
            reply = {
                "choices": [{"message": {"role": "assistant", "content": made.rule(system, user)}}],
                "usage": {"prompt_tokens": len(user.split()), "completion_tokens": 3},
            }
            data = json.dumps(reply).encode() if made.raw is None else made.raw
            with made.lock:
                made.at_once -= 1
            self.send_response(fault)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
