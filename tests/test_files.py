"""Atomic writes and replacements, a free port, and waiting for a server."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.files import replace, write_atomic
from posttrain.network import HOST, answers, free_port, wait_until


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "note.txt"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomic(path, b"new")
    assert (path.read_bytes(), os.listdir(path.parent)) == (b"new", ["note.txt"])


def test_a_folder_takes_the_place_of_a_full_one(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    replace(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "new"]


def test_a_taken_port_is_refused_and_a_free_one_is_free() -> None:
    with socket.create_server((HOST, 0)) as taken:
        with pytest.raises(OSError, match="in use"):
            free_port(taken.getsockname()[1])
        assert free_port() != taken.getsockname()[1]
    assert not answers(f"http://{HOST}:{free_port()}/")


def test_waiting_ends_with_the_condition_the_process_or_the_time() -> None:
    tries: Iterator[bool] = iter([False, False, True])
    assert wait_until(lambda: next(tries), lambda: True, 60, poll_seconds=0)
    assert not wait_until(lambda: False, lambda: False, 60, poll_seconds=0)
    assert not wait_until(lambda: False, lambda: True, -1, poll_seconds=0)
