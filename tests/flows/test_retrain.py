import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Completed, Crashed, Pending, Running
from prefect.task_runners import ThreadPoolTaskRunner

from flows.lock import WorkspaceBusy, only_flow
from flows.run_dag import bring_all_up_to_date
from flows.workspace import RUN, end_dead_run, exclusive
from pipelines.commands.configure import configure
from posttrain.errors import OrchestrationError
from tasks.champion import KEPT
from tasks.intake import take_in
from tests.workspace import dvc

pytestmark = pytest.mark.usefixtures("prefect_url")


@flow(task_runner=ThreadPoolTaskRunner(max_workers=8), persist_result=False)  # type: ignore[arg-type]
def refresh(root: str) -> None:
    """Run the steps of flows.retrain between the inbox and the gate."""
    with exclusive(Path(root)):
        bring_all_up_to_date(Path(root), [], tracking=False, refresh=True)


@flow(persist_result=False)
def identity(root: str, fail: bool = False) -> str:
    with exclusive(Path(root)):
        assert (Path(root) / RUN).read_text() == flow_run.get_id()
        if fail:
            raise OrchestrationError("no")
        return str(flow_run.get_id())


@task
def at_work() -> None:
    """Stand for a stage in Prefect's list of task runs."""


@flow(persist_result=False)
def patient(root: str) -> None:
    with only_flow(Path(root), wait=True):
        pass


def test_new_data_runs_the_chain_and_no_new_data_stops_at_once(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (finished / "join.txt").read_text() == "7"
    (finished / "times.jsonl").unlink()
    before = (finished / "inbox.dvc").read_text()
    left = finished / f"{KEPT}-9.dvc"  # of a clean_cache that was killed: its data is missing
    left.write_text(before.replace("path: inbox", "path: models/.kept-by-alias-9"))
    refresh(str(finished))
    assert "nothing to do" in capsys.readouterr().out
    assert not left.exists()

    (finished / "inbox" / "number.txt").write_text("10")
    refresh(str(finished))
    assert (finished / "join.txt").read_text() == str((10 + 1 + 1) * 2 + 1)
    assert (finished / "inbox.dvc").read_text() != before
    assert dvc(finished, "status", "--json").strip() == "{}"


def test_an_import_is_updated_from_its_source(workspace: Path, tmp_path: Path) -> None:
    source = tmp_path / "number.txt"
    source.write_text("3")
    dvc(workspace, "import-url", "-q", str(source), "number.txt")
    (workspace / "dvc.yaml").write_text(
        "stages:\n  start:\n    cmd: python work.py start number.txt\n"
        "    deps: [work.py, number.txt]\n    outs: [start.txt]\n"
    )
    source.write_text("41")
    refresh(str(workspace))
    assert (workspace / "start.txt").read_text() == "42"


def test_a_run_that_was_killed_is_marked_crashed_by_the_next_one(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = workspace / RUN
    ended = identity(str(workspace))
    assert not path.exists()
    with get_client(sync_client=True) as client:
        killed = client.create_flow_run(identity, state=Running())
        tasks = [
            client.create_task_run(at_work, killed.id, dynamic_key=str(number), state=each)
            for number, each in enumerate((Running(), Pending(), Completed()))
        ]
        path.write_text(str(killed.id))
        identity(str(workspace))
        states = [client.read_task_run(each.id).state_name for each in tasks]
        assert states == ["Crashed", "Crashed", "Completed"]
        state = client.read_flow_run(killed.id).state
        assert state is not None
        assert state.is_crashed()
        assert state.message == "The process of this run is gone; the next run continues from its checkpoints."
        assert f"flow run {killed.name} was killed, and is now marked Crashed" in capsys.readouterr().out

        by_worker = client.create_flow_run(identity, state=Crashed(message="Its process exited with status -9."))
        left = client.create_task_run(at_work, by_worker.id, dynamic_key="0", state=Running())
        path.write_text(str(by_worker.id))
        end_dead_run(path)
        assert client.read_task_run(left.id).state_name == "Crashed"

        path.write_text(ended)
        identity(str(workspace))
        assert client.read_flow_run(ended).state.is_completed()  # type: ignore[arg-type,union-attr]
    path.write_text("00000000-0000-0000-0000-000000000000")
    with pytest.raises(OrchestrationError):
        identity(str(workspace), fail=True)
    identity(str(workspace))
    assert "killed" not in capsys.readouterr().out


def test_who_may_wait_gets_his_turn_and_who_may_not_is_refused(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "import sys; from pathlib import Path; from flows.lock import only_flow\n"
    program += "with only_flow(Path(sys.argv[1])): print('held', flush=True); sys.stdin.readline()"
    command = [sys.executable, "-c", program, str(workspace)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(WorkspaceBusy, match=rf"\(process {holder.pid}\)"), only_flow(workspace):
            pass
        assert holder.stdin is not None
        threading.Timer(3, holder.stdin.close).start()
        began = time.monotonic()
        patient(str(workspace))
        assert time.monotonic() - began > 2
    assert f"waiting: a flow is already running in {workspace} (process {holder.pid})" in capsys.readouterr().out


def test_a_new_clone_takes_new_files_in_next_to_the_earlier_ones(
    workspace: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the accepted files, which are not in the clone's folder yet: `dvc add` would record the new file as the only one."""
    (workspace / "params.yaml").write_text((root / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    configure(workspace / "params.yaml", [str(root / "tests" / "end_to_end" / "tiny.yaml")])
    accepted = workspace / "data" / "raw" / "accepted"
    (accepted / "problems").mkdir(parents=True)
    (accepted / "problems" / "0001-first.jsonl").write_text('{"prompt": "first: 1+1?", "answer": "2"}\n')
    dvc(workspace, "add", "-q", "data/raw/accepted")
    shutil.rmtree(accepted)
    inbox = tmp_path / "arrivals"
    (inbox / "problems").mkdir(parents=True)
    (inbox / "problems" / "second.jsonl").write_text('{"prompt": "second: 2+2?", "answer": "4"}\n')
    monkeypatch.setenv("POSTTRAIN_INBOX", str(inbox))
    monkeypatch.setenv("POSTTRAIN_SETTLE_SECONDS", "0")

    @flow(persist_result=False)
    def night() -> list[str]:
        return [entry.outcome for entry in take_in(str(workspace))]

    assert night() == ["accepted"]
    assert sorted(path.name for path in accepted.rglob("*.jsonl")) == ["0001-first.jsonl", "0002-second.jsonl"]
    pointer = workspace / "data" / "raw" / "accepted.dvc"
    recorded = pointer.read_text()
    assert "nfiles: 2" in recorded
    # half of a checkout, or of a copy: `dvc add` would record the rest as the whole
    first = accepted / "problems" / "0001-first.jsonl"
    whole = first.read_bytes()
    for left in (None, whole[:9], b""):
        first.unlink()
        if left is not None:
            first.write_bytes(left)
        with pytest.raises(
            OrchestrationError, match=r"1 files that data/raw/accepted\.dvc lists are missing or cut short.*dvc pull"
        ):
            night()
        first.write_bytes(whole)
    assert pointer.read_text() == recorded
