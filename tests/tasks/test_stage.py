import json
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest

from pipelines.runtime.journal import read
from tasks.stage import StageFailed, bring_up_to_date, dvc_command, log_path
from tests.pipelines.conftest import STEP

pytestmark = pytest.mark.usefixtures("prefect_url")


def test_a_stage_runs_then_is_up_to_date_then_comes_back_from_the_cache(workspace: Path) -> None:
    first = bring_up_to_date(str(workspace), "start")
    assert (first.stage, first.outcome, first.ran) == ("start", "ran", True)
    assert (workspace / "start.txt").read_text() == "2"
    assert 0 < first.seconds <= first.ended - first.started + 0.01
    assert "Running stage 'start'" in log_path(workspace, "start").read_text()
    assert bring_up_to_date(str(workspace), "start").outcome == "up-to-date"
    (workspace / "start.txt").unlink()
    (workspace / "dvc.lock").unlink()
    assert bring_up_to_date(str(workspace), "start").outcome == "restored"
    assert (workspace / "start.txt").read_text() == "2"
    # a flipped bit in the cache, which DVC copies and calls up to date
    (kept,) = [
        path for path in (workspace / ".dvc/cache/files").rglob("*") if path.is_file() and path.read_bytes() == b"2"
    ]
    kept.chmod(0o644)
    kept.write_text("3")
    kept.chmod(0o444)
    (workspace / "start.txt").unlink()
    (workspace / "dvc.lock").unlink()
    assert bring_up_to_date(str(workspace), "start").outcome == "ran"
    assert (workspace / "start.txt").read_text() == kept.read_text() == "2"


def test_a_failed_step_is_not_tried_again_and_its_last_line_is_the_message(workspace: Path) -> None:
    (workspace / "inbox" / "number.txt").write_text("-5")
    with pytest.raises(StageFailed, match="stage start failed: error: start: -5 is negative"):
        bring_up_to_date(str(workspace), "start")
    assert log_path(workspace, "start").read_text().count("Running stage") == 1


def test_a_stage_that_another_dvc_holds_is_tried_again_until_it_is_free(workspace: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    lock = workspace / ".dvc" / "tmp" / "rwlock"
    lock.parent.mkdir(exist_ok=True)
    held = {str(workspace / "start.txt"): {"pid": holder.pid, "cmd": "dvc repro start"}}
    lock.write_text(json.dumps({"write": held, "read": {}}))

    def release() -> None:
        holder.kill()
        holder.wait()

    timer = Timer(2.5, release)
    timer.start()
    result = bring_up_to_date(str(workspace), "start")
    timer.join()
    assert result.ran
    assert (workspace / "start.txt").read_text() == "2"


def test_only_a_refresh_asks_for_new_versions_of_imports() -> None:
    assert dvc_command("data.dvc", "import", refresh=True)[-2:] == ["update", "data.dvc"]
    assert dvc_command("data.dvc", "import", refresh=False)[-3:] == ["repro", "--single-item", "data.dvc"]
    assert dvc_command("inbox.dvc", "data", refresh=True)[-3:] == ["repro", "--single-item", "inbox.dvc"]


COUNT = """
  count:
    cmd: python count.py && (test -e once || (touch once && echo 13 > steps.txt))
    deps: [steps.txt]
    params: [sft, algorithms.grpo]
    outs: [runs/count/grpo-0/journal.jsonl, runs/count/grpo-0/artifacts]
"""


def test_a_change_between_the_steps_end_and_dvcs_record_of_it_makes_the_stage_run_again(
    workspace: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell edits steps.txt after the step has checked it and before dvc hashes it."""
    monkeypatch.setenv("PYTHONPATH", str(root))
    (workspace / "count.py").write_text(STEP)
    (workspace / "steps.txt").write_text("12")
    shutil.copy(root / "params.yaml", workspace)
    with (workspace / "dvc.yaml").open("a") as graph:
        graph.write(COUNT)
    result = bring_up_to_date(str(workspace), "count")
    assert result.ran
    journal = read(workspace / "runs" / "count" / "grpo-0" / "journal.jsonl")
    assert max(record["step"] for record in journal if record["kind"] == "metrics") == 12
    assert bring_up_to_date(str(workspace), "count").outcome == "up-to-date"
