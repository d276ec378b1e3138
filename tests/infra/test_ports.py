"""The servers of `make up` refuse a port that a different program holds, before any of them starts."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path

import pytest

from infra.topology import ORDER, Topology
from posttrain import network
from posttrain.errors import OrchestrationError


def first_port() -> int:
    """Return the first of four free ports."""
    while True:
        first = network.free_port()
        with contextlib.suppress(OSError, OverflowError):
            for k in range(1, 4):
                network.free_port(first + k)
            return first


@pytest.mark.parametrize("place", range(4))
def test_a_taken_port_is_refused_with_other_ports_before_any_server_starts(tmp_path: Path, place: int) -> None:
    with socket.create_server(("127.0.0.1", first_port() + place)) as taken:
        port = taken.getsockname()[1]
        topology = Topology(tmp_path, first_port=port - place)
        with pytest.raises(OrchestrationError) as refused:
            topology.up()
    assert f"port {port} on 127.0.0.1, for {ORDER[place]}: Address already in use." in str(refused.value)
    assert f"POSTTRAIN_PORTS={port - place + 10} make up" in str(refused.value)
    assert [topology.processes.pid(name) for name in ORDER] == [None] * 5


def test_two_first_calls_at_once_have_the_same_passwords(tmp_path: Path) -> None:
    """`make up` and `make status` of a new project: one of two sets would be lost, and servers run with either."""
    start, found = threading.Barrier(4), list[dict[str, str]]()

    def call() -> None:
        start.wait()
        found.append(Topology(tmp_path).secrets)

    calls = [threading.Thread(target=call) for _ in range(4)]
    for each in calls:
        each.start()
    for each in calls:
        each.join()
    assert found == [json.loads((tmp_path / ".posttrain/servers/secrets.json").read_text())] * 4
