"""Attacks on the ports of our own servers: a different user of the machine, a web page of a foreign origin, a rebound host name."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

from flows.server import prefect_api
from pipelines.runtime import credentials
from pipelines.tracking.server import MOST_BYTES
from tests.sockets import addresses, command_line, family

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]
EVIL = "http://evil.example"


@dataclass
class Servers:
    """Start the servers of `make ui`."""

    project: Path
    process: psutil.Process
    mlflow: str
    prefect: str

    @property
    def admin(self) -> dict[str, str]:
        return basic(f"{credentials.ADMIN}:{credentials.secret(self.project, 'mlflow')}")

    @property
    def posttrain(self) -> dict[str, str]:
        return basic(credentials.prefect_auth(self.project))


def basic(auth: str) -> dict[str, str]:
    return {"Authorization": "Basic " + b64encode(auth.encode()).decode()}


def status(url: str, body: Any = None, method: str | None = None, **headers: str) -> int:
    """Return the status of one request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def home(prefect_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of Prefect's database."""
    folder = tmp_path_factory.mktemp("prefect")
    shutil.copy(prefect_database, folder)
    return folder


@pytest.fixture(scope="module")
def servers(root: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    project = tmp_path_factory.mktemp("project")
    (project / "params.yaml").write_text((root / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    output = project / "output.txt"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_API", "MLFLOW_TR"))
    }
    environment |= {"PREFECT_HOME": str(home), "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pipelines.commands.ui", "--port", "0", "--prefect-port", "0"]
    with output.open("w") as file:
        started = subprocess.Popen(
            command, cwd=project, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 400
        while "Ctrl-C stops them" not in output.read_text():
            assert started.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        bases = dict(re.findall(r"(\w+) answers at (http://127\.0\.0\.1:\d+)", output.read_text()))
        yield Servers(project, psutil.Process(started.pid), bases["MLflow"], bases["Prefect"])
    finally:
        os.killpg(started.pid, signal.SIGINT)
        started.wait(60)


FLOW = {"name": "attack"}


@pytest.mark.parametrize(
    "headers", [{}, {"Origin": EVIL}, {"Host": "evil.example"}], ids=["user", "origin", "rebinding"]
)
def test_nobody_makes_a_deployment_without_the_password(servers: Servers, headers: dict[str, str]) -> None:
    """With a shell command as its pull step, a worker would run it."""
    assert status(f"{servers.prefect}/api/flows/", FLOW, **headers) == 403
    assert status(f"{servers.prefect}/api/flow_runs/filter", {}, **headers) == 403
    assert status(f"{servers.prefect}/api/admin/version", **headers) == 401
    assert status(f"{servers.prefect}/api/csrf-token?client=x", **headers) == 401


def test_a_password_without_a_token_changes_nothing_and_no_other_origin_may_read(servers: Servers) -> None:
    """A browser that is signed in would send the password along; the token it would not know."""
    url = f"{servers.prefect}/api/flows/"
    assert status(url, FLOW, **servers.posttrain) == 403
    request = urllib.request.Request(url, method="OPTIONS")
    for name, value in {"Origin": EVIL, "Access-Control-Request-Method": "POST"}.items():
        request.add_header(name, value)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.headers["Access-Control-Allow-Origin"] is None


def test_who_has_the_password_is_served(servers: Servers) -> None:
    settings = {
        PREFECT_API_URL: f"{servers.prefect}/api",
        PREFECT_API_AUTH_STRING: credentials.prefect_auth(servers.project),
    }
    with temporary_settings(settings), get_client(sync_client=True) as client:
        assert client.read_flow(client.create_flow_from_name("ours")).name == "ours"


def test_events_are_taken_from_nobody_without_the_password(servers: Servers) -> None:
    url = f"{servers.prefect.replace('http', 'ws', 1)}/api/events/in"
    with pytest.raises((ConnectionClosed, InvalidHandshake)):
        send_event(url)


def send_event(url: str) -> None:
    with connect(url) as socket:
        socket.send("{}")
        socket.recv(10)


def test_mlflow_asks_for_the_password_and_answers_to_its_own_address_only(servers: Servers) -> None:
    url = f"{servers.mlflow}/api/2.0/mlflow/experiments/search"
    body = {"max_results": 5}
    assert status(url, body) == 401
    assert status(url, body, **servers.admin) == 200
    assert status(url, body, Host="evil.example", **servers.admin) == 403
    assert status(url, body, Host="192.168.1.7:5000", **servers.admin) == 403
    assert status(url, body, Origin=EVIL, **servers.admin) == 403


def test_mlflow_holds_no_large_body_before_it_asks_for_the_password(servers: Servers) -> None:
    request = urllib.request.Request(f"{servers.mlflow}/signup", b"a" * 10, {"Content-Length": str(MOST_BYTES + 1)})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 413


def test_a_page_of_a_different_port_neither_reads_nor_changes_what_mlflow_keeps(servers: Servers) -> None:
    """A signed-in browser sends the password along to every port of localhost."""
    url, body = f"{servers.mlflow}/api/2.0/mlflow/experiments/search", {"max_results": 5}
    own = servers.mlflow
    assert status(url, body, Origin=own, **servers.admin) == 200
    for origin in (f"{own}1", "http://127.0.0.1:9999", "http://localhost:3000", "null", EVIL):
        assert status(url, body, Origin=origin, **servers.admin) == 403, origin
        assert (
            status(f"{own}/ajax-api/2.0/mlflow/experiments/search?max_results=1", Origin=origin, **servers.admin) == 403
        )


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/ajax-api/3.0/mlflow/assistant/config", {"providers": {"claude_code": {"selected": True}}}),
        ("POST", "/ajax-api/3.0/mlflow/assistant/skills/install", {"type": "custom", "custom_path": "skills"}),
        ("POST", "/ajax-api/3.0/mlflow/assistant/message", {"message": "hello"}),
        ("PATCH", "/ajax-api/3.0/mlflow/assistant/sessions/a%0Ab", {"status": "cancelled"}),
        ("POST", "/gateway/mlflow/v1/chat/completions", {"model": "x", "messages": []}),
        ("POST", "/ajax-api/2.0/mlflow/gateway-proxy", {"gateway_path": "api/2.0/endpoints/"}),
        ("POST", "/ajax-api/3.0/jobs/search", {}),
        ("GET", "/api/3.0/mlflow/gateway/secrets/list", None),
        ("POST", "/ajax-api/3.0/mlflow/scorer/invoke", {}),
        ("GET", "/api/2.0/mlflow/webhooks", None),
    ],
)
def test_the_password_of_mlflow_starts_no_assistant_gateway_or_job(
    servers: Servers, method: str, path: str, body: dict[str, Any] | None
) -> None:
    """MLflow's assistant would start coding agents and write files as the user who runs the server."""
    url = servers.mlflow + path
    assert status(url, body, method) == 401
    assert status(url, body, method, **servers.admin) == 403


def test_the_charts_of_mlflow_find_no_models_of_a_gateway_instead_of_an_error(servers: Servers) -> None:
    url = f"{servers.mlflow}/ajax-api/2.0/mlflow/gateway-proxy?gateway_path=api%2F2.0%2Fendpoints%2F"
    assert status(url) == 401
    assert status(url, **servers.admin) == 200


def test_secrets_are_in_private_files_and_in_no_process_list(servers: Servers) -> None:
    folder = servers.project / credentials.FOLDER
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    secrets = {name: credentials.secret(servers.project, name) for name in ("mlflow", "prefect", "flask")}
    for name in secrets:
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    lines = [command_line(process) for process in family(servers.process)]
    assert len(lines) > 2
    assert not [line for line in lines for value in secrets.values() if value in line]
    assert addresses(family(servers.process)) == {"127.0.0.1"}


def test_the_private_server_of_a_command_asks_too(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(home))
    with temporary_settings(restore_defaults={PREFECT_API_URL}), prefect_api(tmp_path):
        url = PREFECT_API_URL.value()
        assert status(f"{url}/flow_runs/filter", {}) == 403
        assert status(f"{url}/admin/version") == 401
        with get_client(sync_client=True) as client:
            assert client.read_flow_runs() == []


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    from posttrain.errors import ConfigError

    made = credentials.secret(tmp_path, "prefect")
    assert credentials.secret(tmp_path, "prefect") == made
    path = tmp_path / credentials.FOLDER / "prefect"
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by other users"):
        credentials.secret(tmp_path, "prefect")
    path.unlink()
    credentials.write_private(path, "")
    with pytest.raises(ConfigError, match="is empty"):
        credentials.secret(tmp_path, "prefect")
