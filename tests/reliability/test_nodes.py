"""One step over two hosts that share only the network: the result of one process, written once, and resumed after a host is gone."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.runtime.identity import file_digest
from posttrain.network import free_port
from tests.reliability.test_processes import GRPO, agree, anew
from tests.reliability.workspace import Workspace, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = {
    "sft": ("pipelines.sft",),
    "align-dpo-0": ("pipelines.align", "--algorithm", "dpo", "--seed", "0"),
    "align-grpo-0": GRPO,
}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


class Hosts:
    """Two hosts with their own workspace, home and temporary folder. Each starts one process of a step with torchrun."""

    def __init__(self, origin: Workspace, folder: Path) -> None:
        self.folders = [folder / name for name in ("one", "two")]
        for host in self.folders:
            shutil.copytree(origin.folder, host / "project")
            (host / "tmp").mkdir()
        self.spaces = [Workspace(host / "project", origin.warm) for host in self.folders]

    def start(self, step: tuple[str, ...], **extra: str) -> list[subprocess.Popen[str]]:
        port = free_port()
        return [self._start(rank, port, step, extra) for rank in range(2)]

    def _start(self, rank: int, port: int, step: tuple[str, ...], extra: dict[str, str]) -> subprocess.Popen[str]:
        host, space = self.folders[rank], self.spaces[rank]
        launcher = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}",
                    "--master-addr=127.0.0.1", f"--master-port={port}"]  # fmt: skip
        own = {"HOME": str(host), "TMPDIR": str(host / "tmp"), "OMP_NUM_THREADS": "1"}
        with (host / "log.txt").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *launcher, "-m", *step], cwd=space.folder, start_new_session=True, text=True,
                env=environment(space.warm.root, **own, **extra), stdout=log, stderr=log,
            )  # fmt: skip

    def succeed(self, step: tuple[str, ...], **extra: str) -> None:
        running = self.start(step, **extra)
        try:
            assert [process.wait(400) for process in running] == [0, 0], self.logs()
        finally:
            kill(*running)

    def logs(self) -> str:
        return "\n---\n".join((host / "log.txt").read_text()[-3000:] for host in self.folders)


def kill(*launchers: subprocess.Popen[str]) -> None:
    """Kill launchers with all their processes at once, as a host that loses its power."""
    for launcher in launchers:
        if launcher.poll() is None:
            for process in (psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            launcher.wait()


@pytest.fixture
def alone(workspace: Workspace, tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(workspace.folder, tmp_path / "alone"), workspace.warm)


@pytest.fixture
def hosts(alone: Workspace, tmp_path: Path) -> Hosts:
    return Hosts(alone, tmp_path)


def test_two_hosts_train_to_the_result_of_one_process_and_write_it_once(alone: Workspace, hosts: Hosts) -> None:
    first, second = hosts.spaces
    for name, step in STEPS.items():
        for space in (alone, first, second):
            anew(space, name)
        alone.succeed(*step)
        hosts.succeed(step)
        folder = name.replace("align-", "align/")
        agree(alone, first, folder)
        assert not (second.folder / "models" / folder).exists()
        assert not (second.folder / "runs" / folder).exists()
        if name == "sft":
            for space in (first, second):  # the alignments are to start from the same bytes
                shutil.copytree(alone.folder / "models" / name, space.folder / "models" / name, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("name", "longer"),
    [("align-grpo-0", "align.on_policy.steps=60"), ("align-dpo-0", "algorithms.dpo.options.epochs=60")],
)
def test_a_run_continues_after_one_host_is_lost_and_replaced_by_an_empty_one(
    alone: Workspace, hosts: Hosts, name: str, longer: str
) -> None:
    alone.succeed("pipelines.commands.configure", longer)
    anew(alone, name)
    lose_and_replace(hosts, name, longer, **FSDP2)
    alone.succeed(*STEPS[name])
    agree(alone, hosts.spaces[0], name.replace("align-", "align/"))


def test_supervised_training_after_the_loss_of_a_host_has_the_bits_of_an_undisturbed_run(hosts: Hosts) -> None:
    """Over 240 steps rounding grows, so the result is compared with that of the same hosts, not with that of one process."""
    lose_and_replace(hosts, "sft", "sft.epochs=60")
    weights = hosts.spaces[0].folder / "models" / "sft" / "model.safetensors"
    resumed = file_digest(weights)
    for space in hosts.spaces:
        anew(space, "sft")
    hosts.succeed(STEPS["sft"])
    assert file_digest(weights) == resumed


def lose_and_replace(hosts: Hosts, name: str, longer: str, **shared: str) -> None:
    """Run a step, with a parameter that makes it longer, kill the second host after a checkpoint, and run it again with an empty one."""
    first, second = hosts.spaces
    for space in hosts.spaces:
        space.succeed("pipelines.commands.configure", longer)
        anew(space, name)
    running = hosts.start(STEPS[name], **shared)
    try:
        after_checkpoint(first, name, running[0], hosts)
        kill(running[1])
        assert running[0].wait(300) != 0, hosts.logs()
    finally:
        kill(*running)
    shutil.rmtree(second.folder / ".posttrain")
    hosts.succeed(STEPS[name], **shared)
    assert "resuming from the checkpoint after step" in (hosts.folders[0] / "log.txt").read_text()


def test_hosts_with_other_parameters_are_refused(hosts: Hosts) -> None:
    hosts.spaces[1].succeed("pipelines.commands.configure", "sft.batch_size=8")
    running = hosts.start(("pipelines.sft",))
    try:
        assert all(process.wait(300) != 0 for process in running)
    finally:
        kill(*running)
    assert "rank 1 has other parameters, inputs or arguments than rank 0" in hosts.logs()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_host_that_fails_at_its_start_ends_the_other_with_its_reason(hosts: Hosts, failing: int) -> None:
    (hosts.spaces[failing].folder / "data" / "valid" / "sft.parquet").unlink()
    running = hosts.start(("pipelines.sft",))
    try:
        assert all(process.wait(100) != 0 for process in running)
    finally:
        kill(*running)
    other = (hosts.folders[1 - failing] / "log.txt").read_text()
    assert f"failed at its start, so this one cannot go on. process {failing} on " in other, other
    assert "the input data/valid/sft.parquet does not exist" in other


def after_checkpoint(space: Workspace, name: str, process: subprocess.Popen[str], hosts: Hosts) -> None:
    """Wait until the run has a checkpoint."""
    deadline = time.monotonic() + 300
    while not any((space.folder / ".posttrain" / "runs").glob(f"{name}-*/checkpoints/*/step-*")):
        assert process.poll() is None, hosts.logs()
        assert time.monotonic() < deadline, hosts.logs()
        time.sleep(0.01)
