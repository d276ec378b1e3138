"""Four nights of one model on real servers. The tests are one story and run in this order, each on the state that the one before left."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import time
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.states import Cancelled

from flows.promote import promote
from infra.postgres import program
from infra.topology import ORDER
from pipelines.commands.models import line
from tests.security.test_servers import EVIL, basic, status
from tests.servers.conftest import Scene, signed_in, wait
from tests.sockets import addresses, command_line, family

pytestmark = [pytest.mark.servers, pytest.mark.timeout(3600)]

GOOD = [{"prompt": f"n{i}?", "chosen": "1", "rejected": "0"} for i in range(8)]
POISON = [{"prompt": f"x{i}?", "chosen": "0", "rejected": "1"} for i in range(240)]


def objects(scene: Scene, prefix: str) -> list[str]:
    import boto3

    keys = scene.topology.client_environment()
    client = boto3.client(  # the default session would keep the keys of an earlier test of this process
        "s3", endpoint_url=scene.topology.url("s3"), region_name=keys["AWS_DEFAULT_REGION"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"], aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    return [entry["Key"] for entry in client.list_objects_v2(Bucket="posttrain", Prefix=prefix).get("Contents", ())]


def test_the_schedule_fires_by_itself_and_a_better_model_becomes_champion(scene: Scene) -> None:
    scene.put("preferences/good.jsonl", *GOOD)
    scene.put("preferences/bad.jsonl", '{"prompt": "x?", "chosen": ')
    run = scene.fire()
    log = scene.completed(run, "why: runs/gate/artifacts/decision.html")
    assert "inbox: accepted preferences/good.jsonl: 8 rows for preferences" in log
    assert "inbox: quarantined preferences/bad.jsonl: bad.jsonl, line 1" in log
    assert "why: runs/gate/artifacts/decision.html" in scene.worker_log(run)
    assert (scene.root / "inbox/quarantined/preferences/bad.jsonl.reason.txt").is_file()
    assert (scene.root / "data/raw/accepted.dvc").is_file()

    champion = scene.registry().holding("champion")
    assert (champion.number, champion.tags["model"], champion.tags["decision"]) == (1, "dpo-0", "passed")
    weights = champion.md5
    assert f"dvc/files/md5/{weights[:2]}/{weights[2:]}" in objects(scene, "dvc/")
    assert any(key.endswith("/artifacts/decision.json") for key in objects(scene, "mlflow/"))
    assert (scene.root / "models/champion/model.safetensors").read_bytes() == (
        scene.root / "models/align/dpo-0/model.safetensors"
    ).read_bytes()

    assert [message["event"] for message in scene.told] == ["promoted"]
    assert "version 1 (dpo-0) is champion, in place of the supervised model" in scene.told[0]["text"]
    assert scene.told[0]["links"]["model"].endswith("/#/models/posttrain/versions/1")
    assert str(run.id) in scene.told[0]["links"]["flow run"]
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        )
    assert {artifact.key for artifact in found} >= {"intake", "comparison", "report", "decision", "decision-page"}


def test_strangers_are_refused_by_every_server(scene: Scene) -> None:
    """No password, a page of a different origin, a rebound host name, and a signed-in browser without the page's token."""
    prefect, mlflow, s3 = (scene.topology.url(name) for name in ("prefect", "mlflow", "s3"))
    keys = scene.topology.client_environment()
    operator = basic(keys["PREFECT_API_AUTH_STRING"])
    admin = basic(f"{keys['MLFLOW_TRACKING_USERNAME']}:{keys['MLFLOW_TRACKING_PASSWORD']}")
    models = f"{mlflow}/api/2.0/mlflow/registered-models/search"
    for headers in ({}, {"Origin": EVIL}, {"Host": "evil.example"}, operator):
        assert status(f"{prefect}/api/flows/", {"name": "attack"}, **headers) == 403, headers
        assert status(s3, **headers) == 403, headers
    for headers in ({"Host": "evil.example"}, {"Origin": EVIL}):
        assert status(f"{mlflow}/api/2.0/mlflow/experiments/search", {"max_results": 5}, **admin, **headers) == 403
    assert (status(models), status(models, **basic("admin:password1234")), status(models, **admin)) == (401, 401, 200)
    postgres = scene.topology.postgres
    for password in ("", "guessed"):
        environment = postgres.environment() | {"PGPASSWORD": password}
        command = [program("psql"), *postgres.client("psql")[1:], "--no-password", "-d", "prefect", "-c", "SELECT 1"]
        assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 2


def test_secrets_are_in_private_files_and_in_no_process_list(scene: Scene) -> None:
    found = json.loads((scene.topology.home / "secrets.json").read_text(encoding="utf-8"))
    assert {stat.S_IMODE((scene.topology.home / name).stat().st_mode) for name in ("secrets.json", "env")} == {0o600}
    assert stat.S_IMODE(scene.topology.home.stat().st_mode) == 0o700
    lines = []
    for name in ORDER:
        pid = scene.topology.processes.pid(name)
        assert pid is not None
        lines += map(command_line, family(psutil.Process(pid)))
    assert len(lines) >= len(ORDER)
    assert not [line for line in lines for value in found.values() if value in line]


def test_a_night_without_new_data_runs_no_stage_and_says_so(scene: Scene) -> None:
    lock = (scene.root / "dvc.lock").read_bytes()
    flow = (scene.root / ".posttrain/flow.json").read_bytes()
    run = scene.fire()
    log = scene.completed(run, "nothing new to decide: version 1 (dpo-0) is champion")
    assert "nothing to do: all" in log
    assert (scene.root / "dvc.lock").read_bytes() == lock
    assert (scene.root / ".posttrain/flow.json").read_bytes() == flow
    assert scene.aliases() == {"champion": 1}
    assert not scene.told[1:]


def test_a_killed_worker_is_found_and_poisoned_data_is_refused_after_the_resume(scene: Scene) -> None:
    scene.put("preferences/poison.jsonl", *POISON)
    killed = scene.fire()
    with get_client(sync_client=True) as client:
        nightly = client.read_deployment_by_name("retrain/nightly")
        second = client.create_flow_run_from_deployment(nightly.id)
        time.sleep(6)  # three polls of the worker
        state = scene.read(second).state
        assert state is not None
        assert state.is_scheduled(), "a second run waits in the queue, never beside the first"
        client.set_flow_run_state(second.id, Cancelled(), force=True)

    wait(lambda: next(iter((scene.root / ".posttrain/runs").glob("reward-*/checkpoints/*")), None), 400)
    scene.kill_worker()
    scene.topology.start("worker")
    crashed = scene.ended(killed, 200)
    assert crashed.state is not None
    assert crashed.state.is_crashed()

    scene.completed(scene.fire(), "why: runs/gate/artifacts/decision.html")
    assert "reward: continuing run reward-" in (scene.root / ".posttrain/logs/reward.log").read_text(encoding="utf-8")
    decision = json.loads((scene.root / "runs/gate/artifacts/decision.json").read_text(encoding="utf-8"))
    assert not decision["promote"]
    failed = {check["name"] for check in decision["candidates"][0]["checks"] if not check["passed"]}
    assert failed >= {"loss"}
    assert decision["reference"] == "the champion, version 1 (dpo-0)"
    assert scene.aliases() == {"champion": 1, "challenger": 2}
    assert [message["event"] for message in scene.told] == ["promoted", "failed", "refused"]
    assert "ended Crashed: The process of this run is gone" in scene.told[1]["text"]
    assert "true reward against the champion, version 1 (dpo-0) -" in scene.told[2]["text"]


def test_a_model_promoted_by_hand_is_rolled_back_and_barred(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scene.root)
    promote(reason="to see it fail")
    assert scene.aliases() == {"champion": 2, "previous": 1}
    printed = scene.command("flows.promote", "--roll-back", "--reason", "it answers 0")
    assert "version 1 (dpo-0) is champion again, in place of version 2 (dpo-0): it answers 0" in printed
    assert scene.aliases() == {"champion": 1, "previous": 2}
    assert "rolled back: it answers 0" in line(scene.registry().version(2))
    assert [message["event"] for message in scene.told[3:]] == ["promoted", "rolled back"]
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] not in json.dumps(scene.told)


def test_no_server_listens_to_the_network(scene: Scene) -> None:
    listening: dict[str, set[Any]] = {}
    for name in ("postgres", "s3", "mlflow", "prefect"):
        pid = scene.topology.processes.pid(name)
        assert pid is not None
        listening[name] = addresses(family(psutil.Process(pid)))
    assert listening == {name: {"127.0.0.1"} for name in ("postgres", "s3", "mlflow", "prefect")}


def test_a_promotion_waits_for_a_person_in_prefects_pages_and_may_be_declined(scene: Scene) -> None:
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("promote/promote")
        asked = client.create_flow_run_from_deployment(deployment.id, parameters={"version": 2, "approval": True})

        def paused() -> bool | None:
            state = scene.read(asked).state
            return True if state is not None and state.is_paused() else None

        wait(paused, 400)
        client.resume_flow_run(asked.id, run_input={"approve": False, "comment": "not on a Friday"})
    ended = scene.ended(asked, 300)
    assert ended.state is not None
    assert ended.state.is_cancelled()
    assert scene.aliases() == {"champion": 1, "previous": 2}
    assert [message["event"] for message in scene.told[5:]] == ["waiting", "refused"]
    assert "version 2 (dpo-0) was not approved: not on a Friday" in scene.told[6]["text"]


def test_the_pages_show_the_night_and_its_model(scene: Scene) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    first = scene.told[0]["links"]
    artifacts = ("intake", "comparison", "report", "decision", "decision-page")
    prefect, auth = scene.topology.url("prefect"), os.environ["PREFECT_API_AUTH_STRING"]
    with signed_in(prefect, *auth.split(":", 1)) as proxy:
        shows(browser, scene, f"{proxy}/artifacts", *artifacts)
        shows(browser, scene, first["flow run"].replace(prefect, proxy), "Completed", "Task Runs")
    base = scene.topology.url("mlflow")
    with signed_in(base, "admin", os.environ["MLFLOW_TRACKING_PASSWORD"]) as proxy:
        version = first["model"].replace(base, proxy) + "?workflowType=machine_learning"
        shows(browser, scene, version, "every check was passed", "dvc.md5")


def shows(browser: str, scene: Scene, url: str, *wanted: str) -> None:
    """Its scripts put all of this on the page; on a slow machine at the second look."""

    def look() -> bool | None:
        shown = page(browser, scene, url)
        return True if all(text in shown for text in wanted) else None

    wait(look, 180)


def page(browser: str, scene: Scene, url: str) -> str:
    """Return the page's elements after its scripts have run."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=120000", "--dump-dom"]
    profile = scene.root / ".posttrain" / "chromium"
    done = subprocess.run(
        [*command, f"--user-data-dir={profile}", url], capture_output=True, text=True, timeout=240, check=False
    )
    return done.stdout
