"""Catching up, following and sweeping, with real processes that are really killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.commands.sync import catch_up, synchronise
from pipelines.commands.ui import links
from pipelines.commands.ui import main as ui
from pipelines.runtime.process import Lock
from pipelines.tracking.projection import Projector
from posttrain.errors import TrackingError
from posttrain.network import free_port
from tests.pipelines.conftest import Project, wait_for


def all_runs(client: Any) -> list[Any]:
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def test_sync_takes_live_and_restored_journals_once(project: Project, store: Any, history: Any) -> None:
    project.run()
    project.run("--seed", "1")
    shutil.rmtree(project.folder / ".posttrain")
    project.run("--seed", "2", DIE_AT="7")
    runs = synchronise(project.folder, 0.0)
    assert sorted(name[:12] for name in runs) == ["count-grpo-0", "count-grpo-1", "count-grpo-2"]
    found = {run.info.run_name: run for run in all_runs(store)}
    assert {name: run.info.status for name, run in found.items()} == {
        "count grpo seed 0": "FINISHED",
        "count grpo seed 1": "FINISHED",
        "count grpo seed 2": "KILLED",
    }
    killed = found["count grpo seed 2"].info.run_id
    assert [step for step, _ in history(store, killed)["loss"]] == list(range(8))
    assert synchronise(project.folder, 0.0) == runs
    assert len(all_runs(store)) == 3


def test_a_killed_step_is_swept_then_resumed_in_the_same_run(project: Project, store: Any, history: Any) -> None:
    project.run(DIE_AT="7")
    projector = Projector(store, project.folder)
    catch_up(projector)
    (run,) = all_runs(store)
    assert run.info.status == "KILLED"
    done = project.run(POSTTRAIN_FOLLOWER="0", POSTTRAIN_FOLLOWER_SECONDS="60")
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "continuing run" in done.stderr
    (same,) = all_runs(store)
    assert (same.info.run_id, same.info.status) == (run.info.run_id, "FINISHED")
    assert history(store, run.info.run_id)["loss"] == [(step, 2e-3 / (step + 1)) for step in range(12)]


def test_the_follower_of_a_killed_step_ends_its_run_as_killed(project: Project, store: Any) -> None:
    project.run(DIE_AT="7", STEP_SECONDS="0.1", POSTTRAIN_FOLLOWER="0")
    wait_for(lambda: [r for r in all_runs(store) if r.info.status == "KILLED"])


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_a_follower_stays_behind_the_training_but_not_while_it_is_waited_for(project: Project, store: Any) -> None:
    follower = project.start("--follow", module="pipelines.commands.sync")
    own = os.getpriority(os.PRIO_PROCESS, 0)

    def priorities() -> set[int]:
        return {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in psutil.Process(follower.pid).threads()}

    wait_for(lambda: own + 10 in priorities())
    assert os.getpriority(os.PRIO_PROCESS, follower.pid) == own  # of the thread that makes the last pass
    follower.terminate()
    assert follower.wait(60) == 0


def test_a_running_run_whose_journal_is_gone_is_swept(project: Project, store: Any) -> None:
    project.run(DIE_AT="3")
    lock = Lock(project.state / "lock")
    assert lock.acquire()
    projector = Projector(store, project.folder)
    catch_up(projector)
    assert [run.info.status for run in all_runs(store)] == ["RUNNING"]
    catch_up(projector)
    assert [run.info.status for run in all_runs(store)] == ["RUNNING"]
    lock.release()
    shutil.rmtree(project.state)
    catch_up(projector)
    assert [run.info.status for run in all_runs(store)] == ["KILLED"]


def test_a_damaged_journal_is_told_and_does_not_stop_the_others(project: Project, store: Any) -> None:
    project.run()
    broken = project.folder / ".posttrain" / "runs" / "broken"
    broken.mkdir()
    (broken / "journal.jsonl").write_text("not json\n")
    with pytest.raises(TrackingError, match=r"broken/journal\.jsonl, line 1"):
        catch_up(Projector(store, project.folder))
    assert [run.info.status for run in all_runs(store)] == ["FINISHED"]


def test_a_step_neither_fails_nor_waits_for_a_server_that_is_down(project: Project, store: Any) -> None:
    url = f"http://anna:hunter2@127.0.0.1:{free_port()}"
    done = project.run(MLFLOW_TRACKING_URI=url, POSTTRAIN_FOLLOWER="0", POSTTRAIN_FOLLOWER_SECONDS="86400")
    assert done.returncode == 0
    assert done.stderr.count("did not accept the values") == 1
    assert "posttrain sync" in done.stderr
    assert "hunter2" not in done.stderr
    assert project.run(module="pipelines.commands.sync", MLFLOW_TRACKING_URI=url).returncode == 2
    late = project.run(module="pipelines.commands.sync")
    assert (late.returncode, late.stdout[:19]) == (0, "1 runs are up to da")
    assert [run.info.status for run in all_runs(store)] == ["FINISHED"]


def test_the_links_open_the_saved_view_of_the_algorithms(store: Any) -> None:
    experiment = store.create_experiment("posttrain")
    store.create_registered_model("posttrain")
    page = f"http://127.0.0.1:5000/#/experiments/{experiment}/runs?workflowType=machine_learning"
    without = {
        "every run": page,
        "versions of the model posttrain": "http://127.0.0.1:5000/#/models/posttrain?workflowType=machine_learning",
    }
    assert links(store, "http://127.0.0.1:5000", experiment) == without
    store.create_run(experiment, run_name="a", tags={"stage": "align"})
    assert links(store, "http://127.0.0.1:5000", experiment) == without | {
        "curves of the algorithms": f"{page}&viewStateShareKey=algorithms&compareRunsMode=CHART",
        "results of the algorithms side by side": f"{page}&viewStateShareKey=algorithms&compareRunsMode=TABLE",
    }


def test_a_port_in_use_is_refused_with_a_way_out_for_the_command_and_for_make(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for wanted, advice in (
            (["--port", port], "`posttrain ui --port 0`, with make `make ui PORT=0`"),
            (
                ["--port", "0", "--prefect-port", port],
                "`posttrain ui --prefect-port 0`, with make `make ui PREFECT_PORT=0`",
            ),
        ):
            with monkeypatch.context() as unchanged:
                unchanged.setattr(signal, "signal", lambda *_: None)  # the handlers of this process stay
                assert ui(wanted) == 2
            assert f"port {port} on 127.0.0.1: Address already in use. Stop what listens" in (
                said := capsys.readouterr().err
            )
            assert advice in said
