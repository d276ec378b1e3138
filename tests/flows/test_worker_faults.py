"""What goes wrong around workers: servers away, a full disk, two flows at once, wrong clocks, and a stage that needs a GPU."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra.topology import responds
from posttrain.network import free_port
from tasks.pool.record import TYPE, Record, parse
from tasks.process import child_environment, end, start
from tests.clock import NEEDED, shifted
from tests.fleet import Machine, small_fleet, until
from tests.s3 import CREDENTIALS, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
HELD = """
if name.startswith("side-") and "HELD_UNTIL" in os.environ:
    open(os.environ["HELD_UNTIL"] + ".held", "a").write(name + "\\n")
    while not os.path.exists(os.environ["HELD_UNTIL"]):
        time.sleep(0.05)
"""
STAGES = ["join", "side-left", "side-right", "start"]


class Server:
    """A server on a fixed port, which a test can stop and start again."""

    def __init__(self, command: list[str], folder: Path, url: str, **extra: str) -> None:
        self.command, self.folder, self.url, self.extra = command, folder, url, extra
        self.start()

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            command = [sys.executable, "-m", *self.command]
            self.process = start(command, self.folder, extra=self.extra, output=log, grace_seconds=1)
        until(lambda: responds(self.url), f"{self.command} does not start")

    def stop(self) -> None:
        end(self.process, 0)
        assert not responds(self.url)


@pytest.fixture
def store(root: Path, tmp_path: Path) -> Iterator[Server]:
    """Return an S3 store on disk, with an empty bucket."""
    (tmp_path / "s3").mkdir()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = Server(["infra.s3", str(port), str(tmp_path / "s3")], tmp_path, url, PYTHONPATH=str(root), **CREDENTIALS)
    made = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1",
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"], aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    made.create_bucket(Bucket="store")
    yield server
    server.stop()


def records(stage: str, *workers: str) -> list[Record]:
    """Return the records of a stage by these workers, in the order of attempts. Other tests may use the same Prefect server."""
    with get_client(sync_client=True) as client:
        names = {run.id: run.name for run in client.read_flow_runs() if run.name.split()[0] == stage}
        kept = [each for each in client.read_artifacts() if each.type == TYPE and each.flow_run_id in names]
    found = [(names[each.flow_run_id], parse(each.data)) for each in kept if each.flow_run_id]
    return [each for _, each in sorted(found, key=lambda pair: pair[0]) if each is not None and each.worker in workers]


def ran(*machines: Machine) -> dict[str, int]:
    """Return how often each stage's command ran on the machines."""
    lines = [
        line for each in machines for path in each.root.rglob("times.jsonl") for line in path.read_text().splitlines()
    ]
    return dict(sorted(Counter(json.loads(line)["name"] for line in lines).items()))


def held(gate: Path) -> Callable[[], bool]:
    return gate.with_name(f"{gate.name}.held").exists


def test_a_store_that_is_away_while_a_stage_ends_costs_only_time(
    store: Server, prefect_url: str, template: Path, root: Path, tmp_path: Path, finished_template: Path
) -> None:
    with small_fleet(
        tmp_path / "fleet", store.url, prefect_url, template, root, work=HELD, remote_seconds="900"
    ) as made:
        gate = tmp_path / "go"
        one = made.add("one", POSTTRAIN_WARM="none", HELD_UNTIL=str(gate))
        flow = made.parent.start("flows.compare", "--no-tracking")
        until(held(gate), "no side begins", 600)
        store.stop()
        gate.touch()

        def sending() -> list[Record]:
            found = [record for side in ("left", "right") for record in records(f"side@{side}", "one")]
            return [record for record in found if record.phase == "sending"]

        until(sending, f"no stage waits for the store\n{one.log()}", 600)
        began = sending()[0].beat
        until(lambda: sending()[0].beat > began + 5, "the worker does not report while it waits", 600)
        store.start()
        assert flow.wait(900) == 0, made.parent.log()
        assert ran(one) == dict.fromkeys(STAGES, 1)
        assert [len(records(f"side@{side}", "one")) for side in ("left", "right")] == [1, 1]
        same_results(made.parent, finished_template)


def same_results(parent: Machine, finished: Path) -> None:
    """Require the results of one machine; the stages' code differs from the template's, and so its hash in dvc.lock."""
    assert (parent.root / "join.txt").read_text() == (finished / "join.txt").read_text()
    assert "up to date" in parent.run("dvc", "status").stdout


@contextmanager
def prefect_server(folder: Path, database: Path) -> Iterator[Server]:
    """Run a Prefect server that keeps its database, a copy of an empty one, in the folder."""
    folder.mkdir()
    shutil.copy(database, folder)
    port = free_port()
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    server = Server(command, folder, f"http://127.0.0.1:{port}/api/health", PREFECT_HOME=str(folder))
    try:
        yield server
    finally:
        server.stop()


def test_prefects_server_restarts_while_a_stage_runs(
    prefect_database: Path, template: Path, root: Path, tmp_path: Path, finished_template: Path
) -> None:
    with serving("store") as s3, prefect_server(tmp_path / "prefect", prefect_database) as server:
        url = server.url.removesuffix("/health")
        gate = tmp_path / "go"
        with small_fleet(tmp_path / "fleet", s3, url, template, root, work=HELD, remote_seconds="900") as made:
            one = made.add("one", POSTTRAIN_WARM="none", HELD_UNTIL=str(gate))
            flow = made.parent.start("flows.compare", "--no-tracking")
            until(held(gate), f"no side begins\n{made.parent.log()}", 600)
            server.stop()
            gate.touch()
            until(lambda: sum(ran(one).values()) >= 2, "the stage waits for Prefect's server", 600)
            server.start()
            assert flow.wait(900) == 0, made.parent.log()
            assert ran(one) == dict.fromkeys(STAGES, 1)
            with temporary_settings({PREFECT_API_URL: url}):
                assert [len(records(f"side@{side}", "one")) for side in ("left", "right")] == [1, 1]
            same_results(made.parent, finished_template)


def test_a_stage_leaves_a_worker_whose_disk_is_full(
    prefect_url: str, template: Path, root: Path, tmp_path: Path, finished_template: Path
) -> None:
    """Let the worker write files of at most 2 MB; the stage's input has 4 MB."""
    large = 'str = (lambda value: f"{value:>4000000}") if name == "start" else str'
    with (
        serving("store") as s3,
        small_fleet(tmp_path / "fleet", s3, prefect_url, template, root, work=large) as made,
    ):
        made.parent.run("dvc", "repro", "-q", "start")
        limited = made.machine("full", POSTTRAIN_WARM="none", PYTHONPATH=str(root))
        made.clone(limited)
        made.workers["full"] = limited.start(
            "tests.reliability.limited", "FSIZE=2000000", "flows.workers", "add", "stages", "--name", "full"
        )
        flow = made.parent.start("flows.compare", "--no-tracking")
        until(lambda: "not done" in limited.log(), f"the full worker takes no stage\n{limited.log()}", 600)
        two = made.add("two", POSTTRAIN_WARM="none")
        assert flow.wait(900) == 0, made.parent.log()
        assert not {"side-left", "side-right"} & ran(limited).keys()
        assert ran(limited, two) == {"join": 1, "side-left": 1, "side-right": 1}
        lost = [each for side in ("left", "right") for each in records(f"side@{side}", "full")]
        assert lost
        assert all(each.phase == "lost" for each in lost), lost
        assert int((made.parent.root / "join.txt").read_text()) == int((finished_template / "join.txt").read_text())


def test_two_flows_in_two_clones_share_each_stage(
    prefect_url: str, template: Path, root: Path, tmp_path: Path, finished_template: Path
) -> None:
    with serving("store") as s3, small_fleet(tmp_path / "fleet", s3, prefect_url, template, root, work=HELD) as made:
        gate = tmp_path / "go"
        # three places: both sides are held, and the later flow may ask for the first stage after it is done
        one = made.add("one", POSTTRAIN_WARM="none", HELD_UNTIL=str(gate), POSTTRAIN_SLOTS="3")
        other = made.machine("other", POSTTRAIN_POOL="stages")
        shutil.copytree(made.parent.home, other.home, symlinks=True)
        flows = [each.start("flows.compare", "--no-tracking") for each in (made.parent, other)]
        until(held(gate), "no side begins", 600)
        for each in (made.parent, other):
            until(
                lambda log=each.log: "side@" in log() and "started on one" in log().partition("side@")[2],
                each.log(),
                600,
            )
        gate.touch()
        assert [flow.wait(900) for flow in flows] == [0, 0], made.parent.log() + other.log()
        assert ran(one) == dict.fromkeys(STAGES, 1)
        assert (made.parent.root / "dvc.lock").read_bytes() == (other.root / "dvc.lock").read_bytes()
        for each in (made.parent, other):
            same_results(each, finished_template)


@NEEDED
def test_clocks_that_are_an_hour_wrong_change_nothing(
    prefect_url: str, template: Path, root: Path, tmp_path: Path, finished_template: Path
) -> None:
    late, early, parents = (shifted(tmp_path / str(seconds), seconds) for seconds in (-3600, 3600, 1800))
    with serving("store") as s3, small_fleet(tmp_path / "fleet", s3, prefect_url, template, root) as made:
        machines = [
            made.add("late", POSTTRAIN_WARM="none", **late),
            made.add("early", POSTTRAIN_WARM="none", **early),
        ]
        made.parent.run("flows.compare", "--no-tracking", **parents)
        assert ran(*machines) == dict.fromkeys(STAGES, 1)
        same_results(made.parent, finished_template)
        assert all(
            each.phase == "done"
            for name in ("start", "side@left", "side@right", "join")
            for each in records(name, "late", "early")
        )


def test_a_worker_without_a_gpu_never_takes_a_stage_that_needs_one(
    prefect_url: str, template: Path, root: Path, tmp_path: Path
) -> None:
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'GPU 0: Imagined (UUID: GPU-00000000-0000-0000-0000-000000000000)'\n")
    fake.chmod(0o755)
    with (
        serving("store") as s3,
        small_fleet(tmp_path / "fleet", s3, prefect_url, template, root, resources="{side: gpu}") as made,
    ):
        one = made.add("one", POSTTRAIN_WARM="none")
        flow = made.parent.start("flows.compare", "--no-tracking")
        until(lambda: ran(one) == {"start": 1}, one.log(), 600)
        gpu = {"PATH": f"{fake.parent}:{child_environment()['PATH']}", "CUDA_VISIBLE_DEVICES": "0"}
        two = made.add("two", POSTTRAIN_WARM="none", **gpu)  # while it starts, the first worker has nothing else to do
        until(lambda: {"side-left", "side-right"} <= ran(two).keys(), f"{one.log()}\n{two.log()}", 600)
        assert flow.wait(600) == 0, made.parent.log()
        assert not {"side-left", "side-right"} & ran(one).keys()
        assert ran(one, two) == dict.fromkeys(STAGES, 1)
