"""Secrets, databases with accounts, and sockets belong to one user; variables come from the environment only."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.processes import Processes, Service
from pipelines.runtime import credentials
from posttrain.errors import ConfigError


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """Every new file may be read and written by anybody, unless its maker sets its mode."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_secrets_and_what_lies_next_to_them_belong_to_their_owner(tmp_path: Path) -> None:
    word = credentials.secret(tmp_path, "prefect")
    folder = tmp_path / credentials.FOLDER
    assert (mode(folder), mode(folder / "prefect")) == (0o700, 0o600)
    assert [path.name for path in folder.iterdir()] == ["prefect"]

    config = folder / "mlflow.ini"  # MLflow's accounts are a database in this folder
    config.write_text("left by an older version")
    assert mode(config) == 0o666
    credentials.mlflow_server(config, f"sqlite:///{folder / 'accounts.db'}", word, "key")
    assert mode(config) == 0o600
    assert "accounts.db" in config.read_text()

    (folder / "prefect").chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by other users"):
        credentials.secret(tmp_path, "prefect")


def test_logs_and_process_ids_of_servers_are_in_a_private_folder(tmp_path: Path) -> None:
    processes = Processes(tmp_path / "servers", tmp_path)
    processes.start(Service("true", ["true"], {}, lambda: True))
    assert mode(tmp_path / "servers") == 0o700


def test_a_dotenv_file_sets_no_variable_of_this_project(tmp_path: Path, root: Path) -> None:
    names = ("POSTTRAIN_INBOX", "POSTTRAIN_WEBHOOK", "POSTTRAIN_SLOTS", "MLFLOW_TRACKING_URI")
    (tmp_path / ".env").write_text("".join(f"{name}=http://foreign.example\n" for name in names))
    program = (
        "import flows.retrain, json, os, mlflow; from pathlib import Path; from pipelines.data.inbox import location;"
        "from pipelines.tracking.store import tracking_uri;"
        "print(json.dumps([location(Path.cwd()), tracking_uri(Path.cwd()), [n for n in os.environ if n.startswith('POSTTRAIN_')]]))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("POSTTRAIN_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=clean | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(tmp_path / "inbox"), f"sqlite:///{tmp_path}/mlflow.db", []]
