"""Limits of the machine in a flow: the words name the remedy, and the next flow arrives."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.run_dag import _raise_failures
from flows.schedule import DagOutcome
from flows.server import _reason
from flows.workspace import FORK_SERVER, fork_server
from posttrain.errors import OrchestrationError


def test_a_limit_that_a_stage_meets_is_named_with_its_remedy(tmp_path: Path) -> None:
    outcome = DagOutcome(failures={"left": OSError(errno.EMFILE, "Too many open files")}, not_started=["join"])
    with pytest.raises(OrchestrationError, match="ulimit -n 4096`, then run again") as caught:
        _raise_failures(outcome)
    assert str(caught.value).splitlines()[1] == "not started, because they depend on a failed stage: join"
    log = tmp_path / "prefect.log"
    assert _reason(log) == ""
    log.write_text("Traceback\nsqlite3.OperationalError: database or disk is full\nServer stopped!\n")
    assert _reason(log) == ": sqlite3.OperationalError: database or disk is full"


def test_a_folder_of_temporary_files_with_a_long_path_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Start no fork server whose socket could not be made: each step would wait for it in vain."""
    monkeypatch.delenv(FORK_SERVER, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
    with fork_server(tmp_path):
        assert FORK_SERVER not in os.environ
    assert "is too long a path for a socket. Set TMPDIR" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("limit", "words"), [("FSIZE=3000", "free space"), ("NOFILE=24", "ulimit -n")])
def test_a_flow_under_a_limit_says_what_to_do_and_the_next_one_arrives(
    limit: str, words: str, workspace: Path, root: Path, tmp_path: Path
) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment = inherited | {"PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(root)}

    def flow(*prefix: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *prefix, "flows.compare", "--root", str(workspace), "--no-tracking"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    limited = flow("tests.reliability.limited", limit)
    assert (limited.returncode, "Traceback" in limited.stderr) == (2, False), limited.stderr
    assert words in limited.stderr
    shutil.rmtree(tmp_path / "prefect")
    again = flow()
    assert again.returncode == 0, again.stderr
    assert (workspace / "join.txt").read_text() == "7"
