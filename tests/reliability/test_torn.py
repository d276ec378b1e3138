"""Every file that a run keeps, cut, emptied, filled with zeros or with a flipped bit: named, recovered or refused, and never used."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from flows.workspace import end_dead_run
from pipelines.config.params import load_params
from pipelines.data.tables import read_rows, write_rows
from pipelines.runtime.journal import Journal, read
from pipelines.tracking.lockfile import locked_output, read_lock
from pipelines.tracking.store import open_client, refuse_damaged, tracking_uri
from posttrain.errors import CheckpointError, ConfigError, DataError, PosttrainError, TrackingError
from posttrain.training.checkpoint import Checkpoints
from tasks.dag import mend_rwlock
from tasks.gate import SETTLED, settled


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda _: b"",
    "zeros": lambda data: bytes(len(data)),
    "flipped": lambda data: flip(data, len(data) // 2),
}
damaged = pytest.mark.parametrize("damage", DAMAGES)
LOCK = "schema: '2.0'\nstages:\n  sft:\n    cmd: x\n    outs:\n    - path: models/sft\n      md5: 0123456789abcdef\n"


def harm(path: Path, damage: str) -> None:
    path.write_bytes(DAMAGES[damage](path.read_bytes()))


def one_paragraph(error: PosttrainError) -> str:
    text = str(error)
    assert error.exit_code == 2
    assert "\n\n" not in text
    return text


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "conflict"])
def test_dvc_lock(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "dvc.lock"
    path.write_text(LOCK)
    assert locked_output(tmp_path, "models/sft") == {"path": "models/sft", "md5": "0123456789abcdef"}
    if damage == "conflict":
        path.write_text(LOCK.replace("    cmd: x\n", "<<<<<<< HEAD\n    cmd: x\n=======\n    cmd: y\n>>>>>>> other\n"))
    elif damage == "cut":
        path.write_text(LOCK[: LOCK.index("sft:") + 3])
    else:
        harm(path, damage)
    with pytest.raises(TrackingError) as caught:
        read_lock(tmp_path)
    words = one_paragraph(caught.value)
    assert ("--ours dvc.lock" if damage == "conflict" else "`git checkout dvc.lock`") in words
    assert "`dvc repro`" in words


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros"])
def test_params(damage: str, root: Path, tmp_path: Path) -> None:
    """A flipped bit may be a valid value: git shows it, and it is a different run."""
    path = tmp_path / "params.yaml"
    path.write_bytes((root / "params.yaml").read_bytes())
    harm(path, damage)
    with pytest.raises(ConfigError) as caught:
        load_params(path)
    assert str(path) in str(caught.value)


@damaged
def test_the_lock_file_of_dvc(damage: str, tmp_path: Path) -> None:
    path = tmp_path / ".dvc" / "tmp" / "rwlock"
    path.parent.mkdir(parents=True)
    whole = json.dumps({"write": {}, "read": {}})
    path.write_text(whole)
    mend_rwlock(tmp_path)
    assert path.read_text() == whole
    path.write_bytes(flip(whole.encode(), 0) if damage == "flipped" else DAMAGES[damage](whole.encode()))
    mend_rwlock(tmp_path)
    assert not path.exists()


@damaged
def test_tables(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "sft.parquet"
    rows = [{"id": number, "prompt": f"{number}+1", "completion": str(number + 1)} for number in range(50)]
    write_rows("sft", rows, path)
    whole = path.read_bytes()
    harm(path, damage)
    if damage != "flipped":
        with pytest.raises(DataError) as caught:
            read_rows(path)
        assert "dvc repro" in one_paragraph(caught.value)
        return
    refused = 0
    for place in range(4, len(whole) - 700, 29):
        path.write_bytes(flip(whole, place))
        try:
            assert read_rows(path) == rows  # a bit of a header that no reader needs
        except DataError:
            refused += 1
    assert refused > 5


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
@damaged
def test_checkpoints(name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"value": step})
    harm(tmp_path / "step-00000002" / name, damage)
    assert checkpoints.latest() == (1, {"value": 1})
    assert "checkpoint step-00000002 is damaged" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        Checkpoints.read(tmp_path / "step-00000002")


@pytest.mark.parametrize(
    "text",
    [
        '{"step": 3, "sha256": "%s", "check": "%s"}',
        "[]",
        "2",
        '{"step": 2}',
        '{"shards": 2}',
        '{"shards": ["state.pt"]}',
    ],
)
def test_a_manifest_with_other_values(text: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, {"value": 2})
    path = tmp_path / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(text % (manifest["sha256"], manifest["check"]) if "%s" in text else text)
    assert checkpoints.latest() is None


def journal(path: Path) -> list[bytes]:
    log = Journal(path)
    log.append({"kind": "start"})
    for step in range(6):
        log.append({"kind": "metrics", "step": step, "values": {"loss": step / 2}})
    log.close()
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("damage", ["flipped", "zeros", "lost", "twice", "moved"])
def test_a_line_of_the_journal(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ".posttrain" / "journal.jsonl"
    lines = journal(path)
    assert [record.get("step") for record in read(path)] == [None, 0, 1, 2, 3, 4, 5]
    changed = {
        "flipped": [*lines[:3], lines[3].replace(b"1.0", b"3.0"), *lines[4:]],
        "zeros": [*lines[:3], bytes(len(lines[3])) + b"\n", *lines[4:]],
        "lost": [*lines[:3], *lines[4:]],
        "twice": [*lines[:3], lines[2], *lines[3:]],
        "moved": [*lines[:3], lines[4], lines[3], *lines[5:]],
    }[damage]
    path.write_bytes(b"".join(changed))
    with pytest.raises(
        TrackingError, match=r"journal\.jsonl, line 4: .* Run its step again: it keeps the records"
    ) as caught:
        read(path)
    one_paragraph(caught.value)
    log = Journal(path)
    assert log.recover() == 4
    assert "line 4 is damaged; the 3 records before it are kept" in capsys.readouterr().err
    assert path.with_name("journal.jsonl.damaged").read_bytes() == b"".join(changed)
    log.append({"kind": "metrics", "step": 2, "values": {}})
    assert [record.get("step") for record in read(path)] == [None, 0, 1, 2]
    assert log.recover() is None


@pytest.mark.parametrize("damage", ["empty", "zeros", "cut"])
def test_a_whole_journal(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole = b"".join(journal(path))
    harm(path, damage)
    log = Journal(path)
    log.append({"kind": "resume"})
    kept = [record.get("step") for record in read(path)][:-1]
    assert kept == [None, 0, 1, 2, 3, 4, 5][: len(kept)]
    assert len(kept) == (DAMAGES[damage](whole).count(b"\n"))


def test_a_journal_of_an_older_version_is_read_and_continued_without_checksums(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"kind": "start"}\n{"kind": "metrics", "step": 0, "values": {}}\n')
    Journal(path).append({"kind": "metrics", "step": 1, "values": {}})
    assert [record.get("step") for record in read(path)] == [None, 0, 1]
    assert "check" not in path.read_text()


def test_a_published_journal_comes_back_from_the_cache_of_dvc(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "journal.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"kind": "start"}\n\0\0\0\n')
    with pytest.raises(TrackingError, match=r"line 2.*`dvc checkout "):
        read(path)


@pytest.mark.parametrize("damage", ["cut", "zeros", "header", "page"])
def test_mlflows_database(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("create table metrics (value text)")
        database.executemany("insert into metrics values (?)", [("x" * 100,)] * 500)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    refuse_damaged(tracking_uri(tmp_path))
    whole = path.read_bytes()
    other = {"header": flip(whole, 3), "page": whole[:8192] + bytes(4096) + whole[12288:]}
    path.write_bytes(other.get(damage) or DAMAGES[damage](whole))
    with pytest.raises(TrackingError, match=r"mlflow\.db is damaged \(.*`mv .*`posttrain sync`.*--adopt") as caught:
        open_client(tmp_path)
    one_paragraph(caught.value)


@damaged
def test_the_gates_note(damage: str, tmp_path: Path) -> None:
    path = tmp_path / SETTLED
    path.parent.mkdir()
    path.write_text('{"key": "k", "words": "version 1 stays"}')
    path.write_bytes(flip(path.read_bytes(), 2) if damage == "flipped" else DAMAGES[damage](path.read_bytes()))
    assert settled(tmp_path, {}) is None


@damaged
def test_the_note_of_a_running_flow(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "flow.run"
    path.write_text("0b5c4f9a-6a0c-4f0e-9d53-0d6a6f1f7d11")
    path.write_bytes(b"x" + path.read_bytes() if damage == "flipped" else DAMAGES[damage](path.read_bytes()))
    assert end_dead_run(path) is None
    assert damage == "empty" or not path.exists()
