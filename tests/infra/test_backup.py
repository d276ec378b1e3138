"""A back-up that is killed leaves the dumps of one back-up, never those of two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from infra import backup as module
from infra.backup import COMPLETE, backup, complete
from infra.postgres import DATABASES, Postgres


class Dumps:
    """Writes a word for each dump, and stops after some of them, as a killed back-up does."""

    def __init__(self, word: str, stop_after: int = 9) -> None:
        self.word, self.left = word, stop_after

    def client(self, name: str) -> list[str]:
        return [name]

    def run(self, command: Sequence[str], output: Path) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        output.write_text(self.word)


def write(word: str, folder: Path, stop_after: int = 9) -> None:
    backup(cast(Postgres, Dumps(word, stop_after)), folder)


def words(folder: Path) -> set[str]:
    return {(folder / f"{name}.dump").read_text() for name in DATABASES}


@pytest.mark.parametrize("dumps", range(len(DATABASES)))
def test_a_kill_while_dumps_are_written_leaves_the_earlier_ones(tmp_path: Path, dumps: int) -> None:
    write("monday", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write("tuesday", tmp_path, dumps)
    complete(tmp_path)
    assert words(tmp_path) == {"monday"}
    write("wednesday", tmp_path)
    assert words(tmp_path) == {"wednesday"}
    assert len(list(tmp_path.iterdir())) == len(DATABASES), "nothing else is left"


def test_a_kill_between_the_renames_is_completed_before_the_dumps_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("monday", tmp_path)
    renamed: list[Path] = []

    def killed(partial: Path, final: Path) -> None:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(partial.rename(final))

    with monkeypatch.context() as patched:
        patched.setattr(module, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write("tuesday", tmp_path)
    assert words(tmp_path) == {"monday", "tuesday"}
    assert (tmp_path / COMPLETE).is_file()
    complete(tmp_path)
    assert words(tmp_path) == {"tuesday"}
