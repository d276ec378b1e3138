"""prefect.yaml is checked before anything starts, and a schedule that a person paused stays paused."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.deploy import deploy
from flows.deployments import (
    Pauses,
    PlannedRun,
    apply_schedules,
    container_tag,
    mark_owner,
    project_tag,
    read_entries,
    read_pauses,
    refuse_foreign,
    remove_old_schedules,
)
from flows.serve import AGAIN, deployments, describe, forget_missed, main, start_again
from flows.server import announced, only_serving, prefect_api
from flows.workspace import SERVING_PROCESS
from pipelines.config.params import load_params
from pipelines.runtime.credentials import running_prefect
from posttrain.errors import ConfigError, OrchestrationError

NIGHTLY = """
deployments:
  - name: nightly
    entrypoint: flows/retrain.py:retrain
    description: at night
    schedules:
      - cron: "0 2 * * *"
        timezone: UTC
    parameters: {tracking: true, approval: false}
"""


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Path:
    (tmp_path / "flows").symlink_to(root / "flows")
    (tmp_path / "params.yaml").write_text((root / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def write(project: Path, old: str = "", new: str = "") -> Path:
    assert old in NIGHTLY
    path = project / "prefect.yaml"
    path.write_text(NIGHTLY.replace(old, new) if old else NIGHTLY, encoding="utf-8")
    return path


def test_serve_runs_what_prefect_yaml_deploys(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    made = deployments(read_entries(root / "prefect.yaml"), {})
    found = {f"{each.flow_name}/{each.name}": each for each in made}
    hours = {name: [s.schedule.cron for s in each.schedules or ()] for name, each in found.items()}  # type: ignore[union-attr]
    assert hours == {"retrain/nightly": ["0 2 * * *"], "compare/weekly": ["0 6 * * 0"], "promote/promote": []}
    nightly = found["retrain/nightly"]
    assert nightly.parameters == {"tracking": True, "approval": False}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("0 2 * * *", "0 25 * * *", r"cron '0 25 \* \* \*' in time zone 'UTC' is not valid"),
        ("timezone: UTC", "timezone: Europe/Berlim", "time zone 'Europe/Berlim' is not valid"),
        ('cron: "0 2 * * *"', "interval: 3600", "schedules are given as cron"),
        ("timezone", "timezon", "unknown name 'timezon'; did you mean 'timezone'"),
        ("retrain.py", "retrian.py", r"there is no file 'flows/retrian\.py'; did you mean 'flows/retrain\.py'"),
        (":retrain", ":retrian", "has no flow 'retrian'; did you mean 'retrain'"),
        ("approval: false", "aproval: false", "unknown name 'aproval'; did you mean 'approval'"),
        ("approval: false", "approval: 17", "retrain does not accept .*Every run would crash"),
        ("schedules:", "schedule:", "unknown name 'schedule'; did you mean 'schedules'"),
        ("timezone: UTC", "active: maybe", "active: 'maybe' must be true or false"),
        ("name: nightly", "tags: []", "a deployment has no name"),
    ],
)
def test_a_slip_in_prefect_yaml_is_refused_in_one_paragraph(
    project: Path, old: str, new: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project, old, new)
    with pytest.raises(ConfigError, match=words):
        read_entries(project / "prefect.yaml")
    monkeypatch.chdir(project)
    assert main(["--port", "0"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: prefect.yaml")
    assert printed.count("\n") == 1


def test_no_description_no_schedule_and_active_false_are_allowed(project: Path) -> None:
    (entry,) = read_entries(write(project, "    description: at night\n", ""))
    assert entry.description == ""
    (entry,) = read_entries(write(project, "timezone: UTC", "active: false"))
    assert entry.schedules == (PlannedRun("0 2 * * *", "UTC", False),)
    (made,) = deployments([entry], {})
    assert [each.active for each in made.schedules or ()] == [False]
    assert "PAUSED" in describe(entry, Pauses())
    text = NIGHTLY.replace('schedules:\n      - cron: "0 2 * * *"\n        timezone: UTC', "schedules: []")
    (project / "prefect.yaml").write_text(text)
    (entry,) = read_entries(project / "prefect.yaml")
    assert describe(entry, Pauses()) == "retrain/nightly: by hand"


def test_a_pause_outlives_a_restart_and_an_emptied_list_removes_the_old_times(
    project: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    entries = read_entries(write(project))
    (made,) = deployments(entries, read_pauses(entries))
    identity = made.apply()
    with get_client(sync_client=True) as client:
        (schedule,) = client.read_deployment(identity).schedules
        assert schedule.active
        client.update_deployment_schedule(identity, schedule.id, active=False)  # a person's click in the UI
        client.pause_deployment(identity)

        before = read_pauses(entries)  # the restart
        (made,) = deployments(entries, before)
        assert made.apply() == identity
        after = client.read_deployment(identity)
        assert (after.paused, [each.active for each in after.schedules]) == (True, [False])
        assert describe(entries[0], before["retrain/nightly"]).endswith("PAUSED: resume it in Prefect's UI")

        # `prefect deploy`, which `make up` uses, sets both again
        client.resume_deployment(identity)
        client.update_deployment_schedule(identity, after.schedules[0].id, active=True)
        apply_schedules(entries, before)
        after = client.read_deployment(identity)
        assert (after.paused, [each.active for each in after.schedules]) == (True, [False])
        client.resume_deployment(identity)

        empty = NIGHTLY.replace('schedules:\n      - cron: "0 2 * * *"\n        timezone: UTC', "schedules: []")
        (project / "prefect.yaml").write_text(empty)
        emptied = read_entries(project / "prefect.yaml")
        remove_old_schedules(emptied, read_pauses(emptied))
        assert client.read_deployment(identity).schedules == []


def test_nights_that_passed_while_nothing_served_are_dropped(
    project: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    entries = read_entries(write(project))
    (made,) = deployments(entries, {})
    identity = made.apply()
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        asked = {"start_time": str(now - timedelta(days=3)), "end_time": str(now + timedelta(days=2)), "min_runs": 5}
        client.request("POST", "/deployments/{id}/schedule", path_params={"id": identity}, json=asked)
        by_hand = client.create_flow_run_from_deployment(identity)
        mine = DeploymentFilter(id=DeploymentFilterId(any_=[identity]))
        times = {run.id: run.expected_start_time for run in client.read_flow_runs(deployment_filter=mine)}
        assert times.pop(by_hand.id) is not None
        passed = {identity for identity, time in times.items() if time is not None and time < now}
        assert len(passed) == 3
        assert forget_missed(entries) == 3
        left = {run.id for run in client.read_flow_runs(deployment_filter=mine)}
        client.delete_flow_run(by_hand.id)  # the next tests deploy under the same name
    assert left == {by_hand.id, *(times.keys() - passed)}


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        temporary_settings({PREFECT_HOME: tmp_path / "file" / ".prefect"}, restore_defaults={PREFECT_API_URL}),
        pytest.raises(OrchestrationError, match=r"file/\.prefect cannot be written: Not a directory.*PREFECT_HOME="),
        prefect_api(tmp_path),
    ):
        pytest.fail("a server was started")


def test_a_second_project_is_not_served_from_the_same_database(tmp_path: Path) -> None:
    with temporary_settings({PREFECT_HOME: tmp_path}, restore_defaults={PREFECT_API_URL}):
        words = rf"already running \(process {os.getpid()} in {tmp_path}/a\)"
        with only_serving(tmp_path / "a"), pytest.raises(OrchestrationError, match=words):
            only_serving(tmp_path / "b").__enter__()
        with (
            only_serving(tmp_path / "a"),
            pytest.raises(OrchestrationError, match=r"already running here .*Stop it first"),
        ):
            only_serving(tmp_path / "a").__enter__()
        with only_serving(tmp_path / "b"):
            assert (tmp_path / "posttrain-serve.lock").read_text() == f"process {os.getpid()} in {tmp_path}/b"


def test_the_same_project_is_not_served_twice(tmp_path: Path) -> None:
    """Refuse it in words, also with a second database: before, it waited for ever without a word."""
    (tmp_path / ".posttrain").mkdir()
    with announced(tmp_path, "http://127.0.0.1:4200"):
        second = announced(tmp_path, "http://127.0.0.1:4300")
        with pytest.raises(OrchestrationError, match=r"already running in .* at http://127\.0\.0\.1:4200"):
            second.__enter__()
        assert running_prefect(tmp_path) == "http://127.0.0.1:4200"


def test_a_second_project_is_not_served_from_the_same_server(
    project: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    entries = read_entries(write(project))
    (made,) = deployments(entries, {})
    identity = made.apply()
    own, other = project_tag(project), project / "other"
    refuse_foreign(entries, other, project_tag(other))  # nothing polls it: it is taken over
    with get_client(sync_client=True) as client:
        client.get_scheduled_flow_runs_for_deployments([identity])  # what a running `make serve` does
    refuse_foreign(entries, project, own)
    words = rf"retrain/nightly on this Prefect server is served from .*:{project}\. A second"
    with pytest.raises(OrchestrationError, match=words):
        refuse_foreign(entries, other, project_tag(other))
    # `make up` of the other folder, and the same project in containers, whose host names change
    shutil.copytree(project, other, symlinks=True)
    with pytest.raises(OrchestrationError, match=words):
        deploy(other, "process")
    experiment = load_params(project / "params.yaml").project.experiment
    mark_owner(entries, container_tag(experiment, "/app"))
    with get_client(sync_client=True) as client:
        assert client.read_deployment(identity).tags == [f"project:{experiment}:/app"]
        assert client.read_work_pools() == [], "deploying was refused before anything changed"
    with pytest.raises(OrchestrationError, match=rf"is served from {experiment}:/app\. A second"):
        deploy(project, "process")
    refuse_foreign(entries, other, container_tag(experiment, "/app"))


def test_a_killed_run_is_started_again_once(project: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    (made,) = deployments(read_entries(write(project)), {})
    identity = made.apply()
    with get_client(sync_client=True) as client:
        killed = client.create_flow_run_from_deployment(identity, parameters={"tracking": False})
        assert "is started again as" in start_again(killed)
        start_again(killed)  # a second restart of serve
        runs = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[identity])))
        (second,) = [run for run in runs if run.id != killed.id and not run.auto_scheduled]
        assert (AGAIN in second.tags, second.parameters["tracking"]) == (True, False)
        assert "is not started again" in start_again(second)
        assert (
            len(client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[identity])))) == 2
        )


def test_a_flow_ends_with_the_command_that_serves_it(tmp_path: Path) -> None:
    program = "import sys, time\nfrom pathlib import Path\nfrom flows.workspace import exclusive\n"
    program += "with exclusive(Path(sys.argv[1])):\n    print('works', flush=True)\n    time.sleep(600)\n"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as serving:
        environment = os.environ | {SERVING_PROCESS: str(serving.pid)}
        command = [sys.executable, "-c", program, str(tmp_path)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as flow:
            assert flow.stdout is not None
            assert flow.stdout.readline() == "works\n"
            serving.kill()
            assert flow.wait(60) in (-signal.SIGTERM, -signal.SIGKILL)


def test_the_pages_of_a_running_serve_are_found(tmp_path: Path) -> None:
    (tmp_path / ".posttrain").mkdir()
    assert running_prefect(tmp_path) is None
    with announced(tmp_path, "http://127.0.0.1:4200"):
        assert running_prefect(tmp_path) == "http://127.0.0.1:4200"
    assert running_prefect(tmp_path) is None, "the address of a server that has ended"


def test_a_misspelt_inbox_is_refused_by_serve(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project)
    monkeypatch.chdir(project)
    monkeypatch.setenv("POSTTRAIN_INBOX", "~/no-such-inbox")
    assert main(["--port", "0"]) == 2
    assert "no-such-inbox is not a folder, so no new data would ever arrive" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["flows.serve", "flows.worker", "infra.servers status", "pipelines.commands.intake", "pipelines.commands.sync",
     "pipelines.commands.ui"],
)  # fmt: skip
def test_a_project_that_cannot_be_written_is_one_paragraph(
    project: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / ".posttrain").write_text("")  # nothing can be made below a file, whoever runs this
    monkeypatch.chdir(project)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    module, *arguments = command.split()
    try:
        assert importlib.import_module(module).main(arguments) == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {project}/.posttrain cannot be written: ")
    assert (printed.out, printed.err.count("\n")) == ("", 1)
