"""A worker runs the flows that this project's prefect.yaml deploys, and refuses all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.workers.process import ProcessJobConfiguration

from flows.worker import PULL, foreign

SHELL = "prefect.deployments.steps.run_shell_script"


def asked(root: Path, *, job: dict[str, Any] | None = None, command: str | None = None, **changes: Any) -> str | None:
    """Return the foreign settings of a flow run whose deployment was changed so."""
    ours = {
        "name": "nightly",
        "flow_id": uuid4(),
        "entrypoint": "flows/retrain.py:retrain",
        "pull_steps": [{PULL: {"directory": str(root)}}],
        "storage_document_id": None,
        "job_variables": {"env": {"POSTTRAIN_SLOTS": "2"}},
    }
    deployment = DeploymentResponse.model_construct(**(ours | changes))
    run = FlowRun.model_construct(job_variables=job)
    configuration = ProcessJobConfiguration(command=command)
    configuration._command_configured = command is not None
    return foreign(deployment, run, configuration, root)


def test_the_projects_own_deployment_is_run(root: Path) -> None:
    assert asked(root) is None


@pytest.mark.parametrize(
    ("wrong", "changes"),
    [
        ("pull step", {"pull_steps": [{SHELL: {"script": "touch pwned"}}]}),
        ("pull step", {"pull_steps": [{PULL: {"directory": "/tmp"}}]}),
        ("pull step", {"pull_steps": None}),
        ("entry point", {"entrypoint": "/tmp/attack.py:flow"}),
        ("entry point", {"name": "attack"}),
        ("storage", {"storage_document_id": uuid4()}),
        ("command", {"command": "touch pwned"}),
        ("job variables", {"job": {"env": {"LD_PRELOAD": "/tmp/attack.so"}}}),
        ("job variables", {"job": {"command": "touch pwned"}}),
    ],
)
def test_anything_else_is_refused_and_named(root: Path, wrong: str, changes: dict[str, Any]) -> None:
    assert asked(root, **changes) == wrong
