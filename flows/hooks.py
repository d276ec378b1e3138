"""Prefect hooks for flow runs that end badly: they notify the webhook, even if the flow's process was killed."""

from __future__ import annotations

from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_UI_URL

from tasks.notify import notify


def notify_failure(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Notify the webhook. This hook runs in the flow's process, `notify_crash` in the worker's if the flow's process is gone."""
    notify_end(flow.name, flow_run, state)


def notify_crash(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Notify the webhook with the run's present name: the worker read the run before the flow gave it its name."""
    try:
        with get_client(sync_client=True) as client:
            flow_run = client.read_flow_run(flow_run.id)
    except (httpx.HTTPError, ObjectNotFound):  # the message must not be lost; its link has the id
        pass
    notify_end(flow.name, flow_run, state)


def notify_end(flow: str, flow_run: FlowRun, state: State[Any]) -> None:
    """Send the flow run's name, final state and link to the webhook."""
    base = PREFECT_UI_URL.value()
    link = f"{base.rstrip('/')}/runs/flow-run/{flow_run.id}" if base else None
    text = f"{flow} ({flow_run.name}) ended {state.name}: {state.message or 'no message'}"
    notify("failed", text, {"flow run": link})


HOOKS: dict[str, Any] = {"on_failure": [notify_failure], "on_crashed": [notify_crash]}
