"""Accepted files that a checkout has not brought, and that DVC has left out of accepted.dvc before ingest runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipelines.data.lost_files import POINTER, refuse_lost_files
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
    stage("outs: 3\n")
    refuse_lost_files(project)
