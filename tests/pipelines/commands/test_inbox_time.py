"""A file of the inbox that takes too long to check stops nothing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.files import READERS
from posttrain.errors import ConfigError
from tests.pipelines.commands.test_intake import folder, left, put, taken

__all__ = ["folder"]
GOOD = {"prompt": "one: 17+34?", "answer": "51"}


def endless(path: Path) -> Any:
    """Read for ever, whatever is raised."""
    for _ in itertools.count():
        try:
            sum(range(1000))
        except Exception:
            continue


def test_a_file_that_takes_too_long_is_set_aside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "problems/a.ndjson", GOOD)
    monkeypatch.setitem(READERS, ".ndjson", endless)
    monkeypatch.setenv("POSTTRAIN_INBOX_SECONDS", "1")
    (bad,) = taken(folder)
    assert bad.outcome == "quarantined"
    assert bad.reason == (
        "a.ndjson: reading and checking it was stopped: it ran for more than 1 s. Split it, or raise POSTTRAIN_INBOX_SECONDS."
    )
    assert left(folder) == ["quarantined/problems/a.ndjson", "quarantined/problems/a.ndjson.reason.txt"]
    monkeypatch.delenv("POSTTRAIN_INBOX_SECONDS")
    put(folder, "problems/b.jsonl", GOOD)
    assert [entry.outcome for entry in taken(folder)] == ["accepted"], "no alarm is left"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "long", "", "99999999999"])
def test_a_time_that_is_no_number_is_refused(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_INBOX_SECONDS", text)
    with pytest.raises(ConfigError, match="POSTTRAIN_INBOX_SECONDS"):
        taken(folder)
