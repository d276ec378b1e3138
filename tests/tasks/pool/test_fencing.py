"""When a worker loses its stage: by its silence, measured with the flow's own clock, and never while the server is away."""

import threading
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import Artifact, FlowRun
from prefect.states import Completed, Pending, Running, Scheduled

from posttrain.errors import ConfigError, Interrupted, OrchestrationError
from tasks.pool.order import checked
from tasks.pool.record import TYPE, Record, parse
from tasks.pool.requests import insist
from tasks.pool.settings import read_settings
from tasks.pool.watch import Sight, look
from tasks.pool.work import blame
from tasks.stage import StageFailed


def test_only_a_taken_stage_without_news_grows_silent() -> None:
    sight = Sight()
    sight.update(Scheduled(), None, 1.0)
    sight.update(Scheduled(), None, 100.0)
    assert sight.silent_seconds == 0.0  # it waits for a worker
    sight.update(Pending(), None, 1.0)
    sight.update(Pending(), None, 1.5)
    assert sight.silent_seconds == 1.5  # taken, and not begun
    running = Running()
    sight.update(running, Record("one", beat=1), 1.0)
    assert sight.silent_seconds == 0.0
    sight.update(running, Record("one", beat=1), 1.0)
    sight.update(running, Record("one", beat=1), 1.25)
    assert sight.silent_seconds == 2.25
    sight.update(running, Record("one", beat=2), 1.0)
    assert sight.silent_seconds == 0.0
    sight.update(running, Record("one", beat=2, phase="sending"), 1.0)
    assert sight.silent_seconds == 0.0


def test_a_record_survives_the_server_and_anything_else_is_no_record() -> None:
    record = Record("one", 3, "done", {"running": 1.5}, "10-ab.tar", "restored", "  join:\n", "")
    assert parse(vars(record)) == record
    damaged: list[Any] = [None, "text", {}, {"beat": "3", "phase": "done"}, {"beat": 3, "phase": "won"}]
    assert [parse(each) for each in damaged] == [None] * 5


def test_a_stage_that_fails_everywhere_is_not_tried_again_and_a_machines_fault_is() -> None:
    assert blame(StageFailed("stage sft failed: error: no rows")) == "failed"
    assert blame(StageFailed("stage sft failed: it was ended by SIGKILL", "SIGKILL")) == "lost"
    assert blame(StageFailed("stage sft failed: error: sft cannot continue: No space left on device: /x")) == "lost"
    assert blame(OSError(28, "No space left on device")) == "lost"


@pytest.mark.parametrize(
    ("name", "commit", "files"),
    [
        ("sft; rm -rf /", "a" * 40, {}),
        ("../sft", "a" * 40, {}),
        ("sft", "main", {}),
        ("sft", "--upload-pack=x", {}),
        ("sft", "a" * 40, {"posttrain/api.py": "x"}),
        ("sft", "a" * 40, {"../params.yaml": "x"}),
        ("sft", "a" * 40, {"/etc/x.dvc": "x"}),
        ("sft", "a" * 40, {"x/../../y.dvc": "x"}),
        ("sft", "a" * 40, {".git/hooks/x.dvc": "x"}),
        ("sft", "a" * 40, {".dvc/config": "x"}),
    ],
)
def test_an_order_names_a_stage_a_commit_and_parameters_only(name: str, commit: str, files: dict[str, str]) -> None:
    with pytest.raises(OrchestrationError):
        checked(name, commit, files, "")


def test_equal_orders_have_equal_keys_and_others_do_not() -> None:
    one = checked("align@dpo-0", "a" * 40, {"params.yaml": "x", "a.dvc": "y"}, "lock")
    assert one.key == checked("align@dpo-0", "a" * 40, {"a.dvc": "y", "params.yaml": "x"}, "lock").key
    keys = {one.key, checked("align@dpo-1", "a" * 40, one.files, "lock").key, checked(one.name, "b" * 40, one.files, "lock").key,
            checked(one.name, one.commit, {}, "lock").key, checked(one.name, one.commit, one.files, "other").key}  # fmt: skip
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("resources: {}", "resources: {aling: gpu}"), "no stage 'aling'; did you mean 'align'?"),
        (("resources: {}", "resources: {align: tpu}"), "align: 'tpu' must be cpu or gpu"),
        (("lease_seconds: 30", "lease_seconds: 5"), "at least three times beat_seconds"),
        (("attempts: 4", "attempts: 0"), "attempts = 0 must be a positive whole number"),
        (("attempts: 4", "atempts: 4"), "unknown field 'atempts'; did you mean 'attempts'?"),
        (("attempts: 4", ""), "attempts is missing"),
    ],
)
def test_the_file_of_workers_is_checked(root: Any, tmp_path: Any, change: tuple[str, str], words: str) -> None:
    text = (root / "infra" / "workers.yaml").read_text()
    (tmp_path / "infra").mkdir()
    path = tmp_path / "infra" / "workers.yaml"
    path.write_text(text)
    settings = read_settings(tmp_path, {"align@dpo-0": 0, "sft": 0})
    assert [settings.queue(name) for name in ("align@dpo-0", "sft")] == ["cpu", "cpu"]
    path.write_text(text.replace("resources: {}", "resources: {align: gpu}"))
    assert [read_settings(tmp_path, {"align@dpo-0": 0}).queue(name) for name in ("align@dpo-0", "sft")] == [
        "gpu",
        "cpu",
    ]
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(ConfigError) as error:
        read_settings(tmp_path, {"align@dpo-0": 0, "sft": 0})
    assert words in str(error.value)


def test_a_stopped_flow_does_not_wait_for_a_server_that_is_gone() -> None:
    stop, requests = threading.Event(), []

    def refused() -> None:
        requests.append(None)
        stop.set()
        raise httpx.ConnectError("connection refused")

    with pytest.raises(Interrupted, match="did not respond"):
        insist(refused, seconds=3600, stop=stop)
    assert len(requests) == 1


class Passing:
    """A server on which a worker makes its record and ends the stage between two requests of the flow."""

    def __init__(self, run: UUID) -> None:
        self.run, self.requests = run, 0

    def read_artifacts(self, **_: Any) -> list[Artifact]:
        self.requests += 1
        data = vars(Record("one", 1, "done"))
        return [Artifact(type=TYPE, flow_run_id=self.run, data=data)] if self.requests > 1 else []

    def read_flow_runs(self, **_: Any) -> list[FlowRun]:
        self.requests += 1
        return [FlowRun(id=self.run, flow_id=uuid4(), state=Completed())] if self.requests > 1 else []


def test_a_stage_that_ends_between_two_requests_is_not_lost() -> None:
    run = uuid4()
    sights = {run: Sight()}
    look(cast(SyncPrefectClient, Passing(run)), sights, 0.5)
    sight = sights[run]
    assert sight.record is not None or sight.state is None
