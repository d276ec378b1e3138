"""One stage over two clones that share only a DVC remote and the network: recorded once, where rank 0 runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas
import pytest
from safetensors.torch import load_file

from pipelines.tracking.lockfile import read_lock
from posttrain.network import free_port
from tests.end_to_end.conftest import TINY, Clone
from tests.end_to_end.held import HELD, QUICK, SETTINGS
from tests.fleet import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
STAGE = "align@grpo-0"
NAMES_ITSELF = """
import os
from pathlib import Path

if "RANKS" in os.environ and "RANK" in os.environ:
    Path(os.environ["RANKS"], f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}").touch()
"""
"""A sitecustomize.py, which every Python process of a host reads at its start."""
MADE = (".dvc/cache", "models", "runs", "data/valid", ".posttrain")


@dataclass
class Hosts:
    """A clone that has run the stages before the tested one, its DVC remote, and copies of it without any result."""

    clone: Clone
    store: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    port: int = 0

    def add(self, name: str) -> Clone:
        """Return a host that has the clone's code, parameters and dvc.lock, but none of its files."""
        host = replace(self.clone, root=self.store.parent / name / "project", warm=None)
        shutil.copytree(self.clone.root, host.root, symlinks=True)
        for made in MADE:
            shutil.rmtree(host.root / made, ignore_errors=True)
        return host

    def start(
        self, stage: str, hosts: Sequence[Clone], processes: Sequence[int] = (1, 1), **extra: str
    ) -> list[subprocess.Popen[bytes]]:
        """Start the stage on the hosts, the first of which has rank 0, with so many processes each."""
        self.port = free_port()
        return [
            self.start_one(stage, host, rank, len(hosts), count, **extra)
            for rank, (host, count) in enumerate(zip(hosts, processes, strict=True))
        ]

    def start_one(
        self, stage: str, host: Clone, rank: int, hosts: int, processes: int = 1, **extra: str
    ) -> subprocess.Popen[bytes]:
        """Start one host's part of the stage."""
        text = (self.clone.root / "infra" / "accelerate" / "ddp_cpu.yaml").read_text()
        config = host.root.parent / "accelerate.yaml"
        config.write_text(text.replace("num_processes: 2", f"num_processes: {processes}"))
        command = ("flows.node", stage, "--hosts", str(hosts), "--rank", str(rank), "--address", "127.0.0.1",
                   "--port", str(self.port), "--config", str(config), "--restarts", "1")  # fmt: skip
        with log(host).open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=host.root, stdout=file, stderr=file, start_new_session=True,
                env=host.environment(POSTTRAIN_FOLLOWER="1", POSTTRAIN_SLOTS="1", **extra),
            )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, stage: str, hosts: Sequence[Clone], processes: Sequence[int] = (1, 1), **extra: str) -> None:
        running = self.start(stage, hosts, processes, **extra)
        assert [process.wait(900) for process in running] == [0, 0], "\n".join(
            log(host).read_text()[-3000:] for host in hosts
        )

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints in the remote."""
        return sorted((self.store / "posttrain" / "checkpoints").rglob("*.tar"))


def log(host: Clone) -> Path:
    return host.root.parent / "log.txt"


def kill(*hosts: subprocess.Popen[bytes]) -> None:
    """Kill the processes of hosts as a loss of power does."""
    for process in hosts:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def hosts(new_clone: Callable[[], Clone], tmp_path: Path) -> Hosts:
    clone, store = new_clone(), tmp_path / "store"
    clone.run("dvc", "remote", "add", "-q", "--force", "--default", "store", str(store))
    (clone.root / "held.py").write_text(HELD)
    path = clone.root / "infra" / "workers.yaml"
    path.write_text(path.read_text().replace(*QUICK))
    clone.configure(str(TINY), "project.algorithms=[dpo, grpo]", *SETTINGS)
    return Hosts(clone, store)


def test_a_stage_is_recorded_by_rank_0_and_goes_on_elsewhere_if_its_host_is_lost(hosts: Hosts) -> None:
    clone = hosts.clone
    clone.repro("reward_readers", POSTTRAIN_FOLLOWER="1")
    clone.run("dvc", "push", "-q")
    first, second = hosts.add("one"), hosts.add("two")
    hosts.run(STAGE, [first, second])

    assert "up to date" in first.run("dvc", "status", STAGE).stdout
    assert (second.root / "dvc.lock").read_text() == (clone.root / "dvc.lock").read_text()
    assert not (second.root / "models" / "align").exists()
    assert not (second.root / "runs" / "align").exists()
    (second.root / "dvc.lock").write_text((first.root / "dvc.lock").read_text())
    second.run("dvc", "pull", "-q", STAGE)
    for out in read_lock(first.root)[STAGE]["outs"]:
        assert (second.root / out["path"]).exists()
    assert hosts.checkpoints() == []

    third, fourth = hosts.add("three"), hosts.add("four")
    running = hosts.start(STAGE, [third, fourth], HELD_UNTIL=str(hosts.store.parent / "never"))

    def copied() -> object:
        assert running[0].poll() is None, log(third).read_text()[-3000:]
        return hosts.checkpoints()

    until(copied, f"no checkpoint in the remote\n{log(third).read_text()[-3000:]}", 900)
    before = hosts.checkpoints()
    kill(running[1])
    until(lambda: "starting it again" in log(third).read_text(), "rank 0 does not start again", 900)
    running[1] = hosts.start_one(STAGE, hosts.add("six"), 1, 2, HELD_UNTIL=str(hosts.store.parent / "never"))
    # it goes on with the host that took the lost one's rank: four more steps, until it is held again
    until(lambda: copied() and not set(hosts.checkpoints()) & set(before), "the run does not go on", 900)
    kill(*running)
    shutil.rmtree(third.root.parent)
    fifth = hosts.add("five")
    hosts.run(STAGE, [fifth, fourth])
    assert f"{STAGE} continues from checkpoint" in log(fifth).read_text()
    assert "continuing run" in log(fifth).read_text()
    assert read_lock(fifth.root)[STAGE] == read_lock(first.root)[STAGE]
    assert hosts.checkpoints() == []


def test_reward_model_and_evaluation_over_uneven_hosts_are_those_of_one_process(hosts: Hosts) -> None:
    clone = hosts.clone
    clone.repro("reward", "evaluate@sft", POSTTRAIN_FOLLOWER="1")
    clone.run("dvc", "push", "-q")
    (clone.root / "sitecustomize.py").write_text(NAMES_ITSELF)
    first, second = hosts.add("one"), hosts.add("two")
    ranks = hosts.store.parent / "ranks"
    ranks.mkdir()
    hosts.run("reward", [first, second], (1, 2), RANKS=str(ranks))
    assert sorted(path.name for path in ranks.iterdir()) == ["0 of 3", "1 of 3", "2 of 3"]
    name = "models/reward/model.safetensors"
    expected, found = load_file(clone.root / name), load_file(first.root / name)
    assert expected.keys() == found.keys()
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-5

    third, fourth = hosts.add("three"), hosts.add("four")
    hosts.run("evaluate@sft", [third, fourth], (2, 1))
    kept = Path("runs/evaluate/sft/artifacts/predictions.parquet")
    one, several = (pandas.read_parquet(each.root / kept) for each in (clone, third))
    numbers = ["entropy", "kl", "reward_rm", "reward_answer"]
    pandas.testing.assert_frame_equal(several.drop(columns=numbers), one.drop(columns=numbers))
    pandas.testing.assert_frame_equal(several[numbers], one[numbers], atol=1e-4)
    results = Path("runs/evaluate/sft/metrics.json")
    one_share, several_share = (json.loads((each.root / results).read_text())["preference"] for each in (clone, third))
    assert several_share == one_share
    assert not (fourth.root / kept).exists()
