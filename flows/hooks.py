"""What Prefect calls when a flow run ends badly: whoever listens at the webhook is told, also when the process was killed."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas import FlowRun, State
from prefect.settings import PREFECT_UI_URL

from tasks.notify import notify


def tell_failure(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """`on_failure` runs in the flow's own process, `on_crashed` in the worker's when the flow's process is gone."""
    tell_end(flow.name, flow_run, state)


def tell_end(flow: str, flow_run: FlowRun, state: State[Any]) -> None:
    base = PREFECT_UI_URL.value()
    link = f"{base.rstrip('/')}/runs/flow-run/{flow_run.id}" if base else None
    text = f"{flow} ({flow_run.name}) ended {state.name}: {state.message or 'no message'}"
    notify("failed", text, {"flow run": link})


HOOKS: dict[str, Any] = {"on_failure": [tell_failure], "on_crashed": [tell_failure]}
