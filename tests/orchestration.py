"""Fixtures of the tests of tasks and flows: a Prefect server and a fork server for the session, and a workspace for each test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")

import flows  # noqa: F401  (sets the quiet environment before Prefect is imported)
from tests.reliability.workspace import Warm
from tests.workspace import build, copy, dvc


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Prefect server over an empty database."""
    from prefect.events.worker import EventsWorker
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield str(PREFECT_API_URL.value())
        # the harness itself would wait without end for an event that is meant for a server that is gone
        EventsWorker.drain_all(timeout=30)


@pytest.fixture(scope="session")
def warm(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A fork server, so that the steps and flows of all tests import torch once; pytest's parallel workers share it."""
    base = tmp_path_factory.getbasetemp()
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    shared = Warm.shared(root, (base.parent if parallel else base) / "warm")
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
