"""The small files beside a run, cut, emptied, zeroed or with a flipped bit: words with a remedy, or written anew; never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.answer import answer
from flows.deployments import read_entries
from flows.remaining import last_seconds
from infra.topology import Topology
from pipelines.data.tables import read_changes
from pipelines.lineage.records import Artifact, open_cache
from pipelines.report.load import _metrics
from pipelines.runtime.credentials import secret
from pipelines.tracking.lockfile import default_remote
from posttrain.errors import PosttrainError
from tasks.challenger import register_best
from tasks.publish import publish_report
from tasks.remote import restore_missing

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "zeros": lambda data: bytes(len(data)),
    "flipped": lambda data: data[:20] + bytes([data[20] ^ 0x84]) + data[21:],
}
FLOW = {"started": 1.0, "ended": 3.0, "stages": {"sft": {"started": 1.0, "ended": 3.0, "ran": True}}}
COMPARISON = {"title": "t", "findings": ["a"], "solved": False, "best": None, "models": {}}
CONFIG = "[core]\n    remote = store\n['remote \"store\"']\n    url = /tmp/store\n"
POINTER = "outs:\n- md5: 0123456789abcdef0123456789abcdef\n  size: 1\n  path: accepted\n"
OBJECT = Artifact("models/sft", "ab" + "0" * 30 + ".dir")


def passwords(folder: Path) -> dict[str, str]:
    return Topology(folder, folder / "servers")._secrets()


READERS: dict[str, tuple[str, str, Callable[[Path], Any], str]] = {
    "the report's numbers, printed": ("report/comparison.json", json.dumps(COMPARISON), answer, "dvc checkout --force report"),
    "the report's numbers, registered": ("report/comparison.json", json.dumps(COMPARISON), register_best, "dvc checkout"),
    "the report's numbers, published": ("report/comparison.json", json.dumps(COMPARISON), publish_report, "dvc checkout"),
    "metrics": ("metrics.json", '{"accuracy": {"mean": 0.5}}', lambda folder: _metrics(folder / "metrics.json"), "dvc repro"),
    "changes of ingest": ("changes.json", '{"sft": {"left out": 12}}', read_changes, "dvc repro ingest"),
    "DVC's configuration": (".dvc/config", CONFIG, default_remote, "git checkout .dvc/config"),
    "DVC's configuration, for lineage": (".dvc/config", CONFIG, open_cache, "git checkout .dvc/config"),
    "a listing of DVC's cache": (
        f".dvc/cache/files/md5/ab/{'0' * 30}.dir", '[{"relpath": "weights", "md5": "0"}]',
        lambda folder: open_cache(folder).listing(OBJECT), "dvc pull",
    ),
    "the pointer of accepted files": (
        "data/raw/accepted.dvc", POINTER, lambda folder: restore_missing(folder, "data/raw/accepted.dvc"), "git checkout data/raw",
    ),
    "a password": (".posttrain/secrets/prefect", "correct-horse-battery-staple", lambda folder: secret(folder, "prefect"), "Remove it"),
    "the servers' passwords": ("servers/secrets.json", '{"postgres": "p", "mlflow": "m"}', passwords, "restore it from a back-up"),
    "deployments": ("prefect.yaml", "deployments:\n- name: nightly\n", lambda folder: read_entries(folder / "prefect.yaml"), ""),
}  # fmt: skip
FREE = {("a password", "cut"), ("DVC's configuration", "empty"), ("DVC's configuration, for lineage", "empty")}
"""Still valid: half a password is one, which the servers then ask for, and an empty configuration names no remote."""


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named_with_a_remedy(name: str, damage: str, root: Path, tmp_path: Path) -> None:
    where, text, read, remedy = READERS[name]
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / "params.yaml", tmp_path)
    path.write_bytes(DAMAGES[damage](text.encode()))
    path.chmod(0o600)
    if (name, damage) in FREE:
        read(tmp_path)
        return
    with pytest.raises(PosttrainError) as caught:
        read(tmp_path)
    assert caught.value.exit_code == 2
    assert path.name in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_of_the_last_flow_only_loses_the_estimate(damage: str, tmp_path: Path) -> None:
    path = tmp_path / ".posttrain" / "flow.json"
    path.parent.mkdir()
    path.write_text(json.dumps(FLOW))
    assert last_seconds(tmp_path) == {"sft": 2.0}
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert last_seconds(tmp_path) == {}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_note_of_the_registered_comparison_is_ignored(damage: str, root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "params.yaml", tmp_path)
    for path, text in (("report/comparison.json", json.dumps(COMPARISON)), (".posttrain/challenger", "0" * 64)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    note = tmp_path / ".posttrain" / "challenger"
    note.write_bytes(DAMAGES[damage](note.read_bytes()))
    register_best(tmp_path)  # no model solves the task, so nothing is registered
