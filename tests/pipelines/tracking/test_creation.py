"""MLflow's database is complete or absent, whoever creates it, and however that ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.tracking.store import open_client
from posttrain.errors import TrackingError

OPEN = """
import sys
from pathlib import Path
from mlflow import MlflowClient
from pipelines.tracking.store import open_client
print("ready", flush=True)
sys.stdin.readline()
print(open_client(Path(sys.argv[1])).get_experiment("0").name, flush=True)
"""


@pytest.mark.slow
def test_two_first_steps_at_once_create_one_database(tmp_path: Path, root: Path) -> None:
    (tmp_path / "mlflow.db.new").write_bytes(b"a creation that was killed")
    surroundings = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, str(tmp_path)],
            cwd=root,
            env=surroundings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for one in both:
        assert one.stdout
        assert one.stdout.readline() == "ready\n"
    for one in both:
        assert one.stdin
        one.stdin.write("\n")
        one.stdin.flush()
    assert [one.communicate()[0] for one in both] == ["Default\n", "Default\n"]
    assert not (tmp_path / "mlflow.db.new").exists()


def test_a_half_made_database_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        # the first migrations have made one table, and no version of the schema says so
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        database.execute("CREATE TABLE experiments (experiment_id INTEGER)")
        database.execute("CREATE TABLE entity_associations (association_id INTEGER)")
    with pytest.raises(TrackingError, match=r"is damaged \(.*already exists.*mv .*mlflow.db.* `posttrain sync`"):
        open_client(tmp_path)
