"""Accepted files that a checkout has not brought, and that DVC has left out of accepted.dvc before ingest runs."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from pipelines.commands.forget import stage_pointer
from pipelines.data.lost_files import POINTER, lost_or_cut, refuse_lost_files
from posttrain.errors import DataError

TEXT = "outs:\n- md5: 0123456789abcdef0123456789abcdef.dir\n  size: 8\n  nfiles: {}\n  hash: md5\n  path: accepted\n"


def test_files_that_gits_pointer_names_and_the_folder_lacks_stop_plain_dvc(tmp_path: Path) -> None:
    project, pointer = tmp_path / "a repository" / "project", tmp_path / "a repository" / "project" / POINTER
    (project / "data/raw/accepted/sft").mkdir(parents=True)
    (project / "data/raw/accepted/sft/0001-a.jsonl").write_text("{}")
    subprocess.run(["git", "init", "-q"], cwd=project.parent, check=True)

    def stage(text: str) -> None:
        pointer.write_text(text)
        subprocess.run(["git", "add", POINTER], cwd=project, check=True)

    refuse_lost_files(project)  # git knows no pointer
    stage(TEXT.format(2))
    pointer.write_text(TEXT.format(1))  # as dvc repro does, before ingest
    with pytest.raises(
        DataError, match=r"has 1 files, and the data/raw/accepted\.dvc of git's index names 2.*git checkout"
    ):
        refuse_lost_files(project)
    stage(TEXT.format(1))  # on purpose
    refuse_lost_files(project)
    pointer.write_text(TEXT.format(0))
    stage_pointer(project)  # as `posttrain forget` does
    pointer.write_text(TEXT.format(1))
    (project / "data/raw/accepted/sft/0001-a.jsonl").unlink()
    refuse_lost_files(project)
    stage("outs: 3\n")
    refuse_lost_files(project)


def test_a_file_that_was_cut_short_or_replaced_by_a_different_one_stops_plain_dvc(tmp_path: Path) -> None:
    """Compare by the list of files in DVC's cache: their number is the same."""
    folder, cache = tmp_path / "data/raw/accepted/sft", tmp_path / ".dvc/cache"
    folder.mkdir(parents=True)

    def store(content: bytes, ending: str = "") -> str:
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        (cache / "files/md5" / md5[:2]).mkdir(parents=True, exist_ok=True)
        (cache / "files/md5" / md5[:2] / (md5[2:] + ending)).write_bytes(content)
        return md5 + ending

    whole = {"sft/0001-a.jsonl": b"one\ntwo\n", "sft/0002-b.jsonl": b"three\n"}
    listing = [{"md5": store(content), "relpath": name} for name, content in whole.items()]
    first = f"outs:\n- md5: {store(json.dumps(listing).encode(), '.dir')}\n  nfiles: 2\n  path: accepted\n"
    (tmp_path / POINTER).write_text(first)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", POINTER], cwd=tmp_path, check=True)
    (tmp_path / POINTER).write_text(TEXT.format(2))  # as dvc repro does, before ingest
    lost = lambda: lost_or_cut(tmp_path / "data/raw/accepted", next(cache.rglob("*.dir")), cache)  # noqa: E731
    (folder / "0001-a.jsonl").write_bytes(b"one\r\ntwo\r\n")  # an edit
    (folder / "0002-b.jsonl").write_bytes(b"three\nfour\n")
    assert lost() == []
    (folder / "0002-b.jsonl").rename(folder / "0003-new.jsonl")
    assert lost() == ["sft/0002-b.jsonl"]
    (folder / "0001-a.jsonl").write_bytes(b"one\n")
    with pytest.raises(
        DataError, match=r"2 files that .* are missing or cut short .*first: sft/0001-a\.jsonl.*dvc pull"
    ):
        refuse_lost_files(tmp_path)
