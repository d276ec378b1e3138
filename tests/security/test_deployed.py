"""Who has the server's password changes a deployment: its runs, and the hooks of runs that crash, stay those of prefect.yaml."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import prefect.runner.runner
import prefect.workers.process
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner
from prefect.settings import PREFECT_API_URL
from prefect.states import Crashed
from prefect.workers.process import ProcessJobConfiguration

from flows import deployed
from flows.deployments import find_flow, read_entries
from flows.worker import only_own_code
from posttrain.errors import ConfigError

YAML = """
deployments:
  - {name: mine, entrypoint: "nightwork/mine.py:mine", schedules: []}
"""
FLOW = """
from pathlib import Path
from prefect import flow

def hook(flow, flow_run, state):
    Path("hooked").touch()

@flow(on_crashed=[hook])
def mine():
    Path("ran").touch()
"""
SHELL = "prefect.deployments.steps.run_shell_script"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nightwork").mkdir()
    (tmp_path / "nightwork" / "mine.py").write_text(FLOW, encoding="utf-8")
    (tmp_path / "prefect.yaml").write_text(YAML, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def changed_deployment(project: Path) -> FlowRun:
    """Return a run of a deployment whose record names a shell command."""
    (entry,) = read_entries(project / "prefect.yaml")
    made = RunnerDeployment(name=entry.name, flow_name="mine", entrypoint=entry.entrypoint, path=str(project))
    identity = made.apply()
    with get_client(sync_client=True) as client:
        changes = {"pull_steps": [{SHELL: {"script": f"touch {project}/pwned"}}]}
        client.request("PATCH", "/deployments/{id}", path_params={"id": identity}, json=changes).raise_for_status()
        return client.create_flow_run_from_deployment(identity)


def engine(project: Path, root: Path, run: FlowRun, **extra: str) -> None:
    """Run the process of a flow run as the worker starts it."""
    environment = os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value() or "", "PYTHONPATH": str(root), **extra}
    command = [sys.executable, "-m", "prefect.engine", str(run.id)]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_loads_its_flow_from_prefect_yaml_and_skips_the_records_steps(
    project: Path, root: Path, prefect_url: str
) -> None:
    run = changed_deployment(project)
    engine(project, root, run, **deployed.ENVIRONMENT, **{deployed.NAME: "mine"})
    assert (project / "ran").is_file()
    assert not (project / "pwned").exists()
    engine(project, root, changed_deployment(project))
    assert (project / "pwned").is_file(), "the attack works on Prefect's own way"


def test_a_hook_comes_from_prefect_yaml_too(project: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prefect.runner.runner, prefect.workers.process):
        monkeypatch.setattr(module, "load_flow_from_flow_run", vars(module)["load_flow_from_flow_run"])
    deployed.keep_own_code()
    run = changed_deployment(project)

    async def crash() -> None:
        async with Runner() as runner:
            assert runner._hook_runner is not None
            await runner._hook_runner.run_crashed_hooks(run, Crashed())

    asyncio.run(crash())
    assert (project / "hooked").is_file()
    assert not (project / "pwned").exists()


def test_a_pools_template_sets_neither_variables_nor_command_nor_folder(tmp_path: Path) -> None:
    configuration = ProcessJobConfiguration(
        command="touch pwned",
        env={"LD_PRELOAD": "/tmp/x.so", "PREFECT__FLOW_ENTRYPOINT": "/tmp/x.py:x", "POSTTRAIN_SLOTS": "2"},
        working_dir=Path("/tmp"),
    )
    only_own_code(configuration, "nightly", tmp_path)
    assert configuration.env == {"POSTTRAIN_SLOTS": "2", deployed.NAME: "nightly", **deployed.ENVIRONMENT}
    assert configuration.working_dir == tmp_path
    assert configuration.command is not None
    assert configuration.command.split()[-2:] == ["-m", "prefect.engine"]


def test_a_deployment_that_prefect_yaml_does_not_have_is_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match="deploys no 'theirs'"):
        find_flow(project / "prefect.yaml", "theirs")
