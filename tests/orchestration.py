"""Fixtures of the tests of tasks and flows: a Prefect server and a fork server for the session, and a workspace for each test."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")

import flows  # noqa: F401  (sets the quiet environment before Prefect is imported)
from tests.reliability.workspace import Warm, locked
from tests.workspace import build, copy, dvc


@pytest.fixture(scope="session")
def prefect_url(prefect_database: Path) -> Iterator[str]:
    """URL of a Prefect server over an empty database."""
    from prefect.events.worker import EventsWorker
    from prefect.settings import PREFECT_API_URL
    from prefect.testing import utilities

    def with_tables() -> str:
        folder = tempfile.mkdtemp()
        shutil.copy(prefect_database, Path(folder) / "prefect-test.db")
        return folder

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            utilities, "mkdtemp", with_tables
        )  # the harness makes its database there, if it is not there yet
        with utilities.prefect_test_harness(server_startup_timeout=120):
            yield str(PREFECT_API_URL.value())
            # the harness itself would wait without end for an event that is meant for a server that is gone
            EventsWorker.drain_all(timeout=30)


@pytest.fixture(scope="session")
def prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the empty database of a Prefect server. Prefect's hundred migrations take seconds, so they run once for all servers."""
    folder = shared_by_workers(tmp_path_factory, "migrated")
    with locked(folder):
        if not (folder / "prefect.db").is_file():
            _migrate(folder / "part.db")
            (folder / "part.db").rename(folder / "prefect.db")
    return folder / "prefect.db"


def _migrate(database: Path) -> None:
    from prefect.server.database.dependencies import provide_database_interface, temporary_database_interface
    from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL, temporary_settings

    async def create() -> None:
        interface = provide_database_interface()
        await interface.create_db()
        await (await interface.engine()).dispose()

    url = {PREFECT_SERVER_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{database}"}
    with temporary_database_interface(), temporary_settings(url):
        asyncio.run(create())


def shared_by_workers(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """Return a folder that pytest's parallel workers share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def warm(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A fork server, so that the steps and flows of all tests import torch once; pytest's parallel workers share it."""
    shared = Warm.shared(root, shared_by_workers(tmp_path_factory, "warm"))
    yield shared
    shared.leave()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("template") / "workspace")


@pytest.fixture(scope="session")
def finished_template(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same workspace after a plain `dvc repro`."""
    finished = copy(template, tmp_path_factory.mktemp("finished") / "workspace")
    dvc(finished, "repro", "-q")
    return finished


@pytest.fixture
def finished(finished_template: Path, workspace: Path, tmp_path: Path) -> Path:
    """A fresh copy of the workspace in which everything is up to date."""
    return copy(finished_template, tmp_path / "finished")


@pytest.fixture
def workspace(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh workspace with a blank in its path, two CPU slots and no device."""
    monkeypatch.setenv("POSTTRAIN_LEASES", str(tmp_path / "leases"))
    monkeypatch.setenv("POSTTRAIN_SLOTS", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("POSTTRAIN_FLOW_RUN", raising=False)
    assert "PREFECT_API_URL" not in os.environ or os.environ["PREFECT_API_URL"].startswith("http://")
    return copy(template, tmp_path / "work space")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store of MLflow whose tables have been made: doing it anew takes seconds."""
    from pipelines.tracking.store import open_client

    folder = tmp_path_factory.mktemp("store")
    open_client(folder).search_experiments()
    return folder / "mlflow.db"
