"""`make serve` and `make ui` as their user has them: processes of only this machine, which end with their command."""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from pipelines.commands.configure import configure
from pipelines.runtime import credentials
from tests.end_to_end.conftest import Clone, new_clone  # noqa: F401  (a fixture)
from tests.servers.conftest import QUICK, tables, wait
from tests.sockets import addresses, family

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def clone(new_clone: Callable[[], Clone]) -> Clone:  # noqa: F811
    made = new_clone()
    configure(made.root / "params.yaml", [str(made.root / "tests/servers/tiny.yaml")])
    tables(made.root)
    return made


@contextmanager
def at_work(clone: Clone, home: Path, *command: str) -> Iterator[tuple[psutil.Process, Callable[[str, float], str]]]:
    """Yield the command's process and a wait for a line of its output. At the end interrupt it; no process may be left."""
    output = home / "output.txt"
    variables = QUICK | {"PREFECT_HOME": str(home), "POSTTRAIN_LEASES": str(home / "leases"), "PYTHONUNBUFFERED": "1"}
    with output.open("w") as file:
        started = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=clone.root, env=clone.environment(**variables), stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    process = psutil.Process(started.pid)

    def said(pattern: str, seconds: float) -> str:
        def look() -> str | None:
            assert started.poll() is None, output.read_text()
            found = re.search(pattern, output.read_text())
            return found and found.group(1)

        found: str = wait(look, seconds)
        return found

    try:
        yield process, said
    finally:
        below = process.children(recursive=True)
        os.killpg(started.pid, signal.SIGINT)
        try:
            status = started.wait(40)
        finally:
            _, alive = psutil.wait_procs(below, timeout=10)
            for left in (process, *alive):
                if left.is_running():
                    left.kill()
    assert status == 0, output.read_text()
    assert not alive


def test_serve_retrains_and_is_heard_on_loopback_alone(clone: Clone, tmp_path: Path) -> None:
    with at_work(clone, tmp_path, "flows.serve", "--port", "0") as (process, said):
        pages = said(r"Prefect: (http://127\.0\.0\.1:\d+)", 90)
        assert addresses(family(process)) == {"127.0.0.1"}
        (clone.root / "inbox" / "preferences" / "more.jsonl").write_text(
            '{"prompt": "n?", "chosen": "1", "rejected": "0"}\n'
        )
        auth = {PREFECT_API_URL: f"{pages}/api", PREFECT_API_AUTH_STRING: credentials.prefect_auth(clone.root)}
        with temporary_settings(auth), get_client(sync_client=True) as client:

            def deployed() -> dict[str, UUID] | None:
                found = {each.name: each.id for each in client.read_deployments()}
                return found if len(found) == 3 else None

            run = client.create_flow_run_from_deployment(wait(deployed, 60)["nightly"])

            def ended() -> str | None:
                state = client.read_flow_run(run.id).state
                return state.name if state is not None and state.is_final() else None

            assert wait(ended, 400) == "Completed"
        assert addresses(family(process)) == {"127.0.0.1"}
    assert not any((clone.root / "inbox" / "preferences").iterdir())
    assert (clone.root / "runs/gate/artifacts/decision.html").is_file()


def as_admin(clone: Clone) -> dict[str, str]:
    """Return the header that signs in to MLflow; Prefect's page itself is served to everybody, its API is not."""
    password = credentials.secret(clone.root, "mlflow")
    return {"Authorization": "Basic " + base64.b64encode(f"admin:{password}".encode()).decode()}


def test_ui_is_heard_on_loopback_alone(clone: Clone, tmp_path: Path) -> None:
    with at_work(clone, tmp_path, "pipelines.commands.ui", "--port", "0", "--prefect-port", "0") as (process, said):
        for name in ("MLflow", "Prefect"):
            base = said(rf"{name} answers at (http://127\.0\.0\.1:\d+)", 120)
            if name == "MLflow":
                with pytest.raises(HTTPError, match="401"):
                    urlopen(base, timeout=30)
            with urlopen(Request(base, headers=as_admin(clone)), timeout=30) as page:
                assert b"<html" in page.read().lower()
        said("(Ctrl-C) stops them", 30)
        assert addresses(family(process)) == {"127.0.0.1"}
