"""Show the stages that a flow sends as nodes of its graph in Prefect: the server keeps each node's state equal to its flow run's."""

from __future__ import annotations

from uuid import UUID

from prefect import Task
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, TaskRunResult
from prefect.states import Completed

from tasks.dag import Node


class Graph:
    """The nodes of one flow run, one for each stage that it sends."""

    def __init__(self, client: SyncPrefectClient, flow_run: str) -> None:
        self._client, self._flow_run = client, UUID(flow_run) if flow_run else None
        self._task = Task(fn=lambda: None, name="stage on a worker")
        self._nodes: dict[str, UUID] = {}

    def add(self, node: Node) -> UUID | None:
        """Return the id of the stage's node, which is made at the first call; None outside a flow run."""
        if self._flow_run is not None and node.name not in self._nodes:
            above = [TaskRunResult(id=self._nodes[name]) for name in node.after if name in self._nodes]
            made = self._client.create_task_run(
                self._task, self._flow_run, node.name, name=node.name, task_inputs={"wait_for": [*above]}
            )
            self._nodes[node.name] = made.id
        return self._nodes.get(node.name)

    def ended(self, node: Node, run: FlowRun) -> None:
        """Complete the node of a stage whose flow run belongs to a different flow, whose graph the server keeps."""
        own = self._nodes.get(node.name)
        if own is not None and run.parent_task_run_id != own:
            self._client.set_task_run_state(own, Completed(), force=True)
