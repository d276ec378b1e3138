"""Prefect hooks for flow runs that end badly: they notify the webhook, even if the flow's process was killed."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas import FlowRun, State
from prefect.settings import PREFECT_UI_URL

from tasks.notify import notify


def notify_failure(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Notify the webhook. `on_failure` runs in the flow's process, `on_crashed` in the worker's if the flow's process is gone."""
    notify_end(flow.name, flow_run, state)


def notify_end(flow: str, flow_run: FlowRun, state: State[Any]) -> None:
    """Send the flow run's name, final state and link to the webhook."""
    base = PREFECT_UI_URL.value()
    link = f"{base.rstrip('/')}/runs/flow-run/{flow_run.id}" if base else None
    text = f"{flow} ({flow_run.name}) ended {state.name}: {state.message or 'no message'}"
    notify("failed", text, {"flow run": link})


HOOKS: dict[str, Any] = {"on_failure": [notify_failure], "on_crashed": [notify_failure]}
