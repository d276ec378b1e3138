"""Steps under `accelerate launch`: two processes give the result of one, one records, and a stop or a death leaves none behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from pipelines.runtime.journal import ended, read
from tests.reliability.workspace import Workspace, environment

pytestmark = pytest.mark.timeout(900)
GRPO = ("pipelines.align", "--algorithm", "grpo", "--seed", "0")


class Together(Workspace):
    """A separate workspace whose steps run in as many processes as the environment sets."""

    def start(self, *command: str, **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", *command], cwd=self.folder, env=environment(self.warm.root, **extra), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def over(self, kind: str) -> dict[str, str]:
        return {"POSTTRAIN_ACCELERATE": str(self.warm.root / "infra" / "accelerate" / f"{kind}.yaml")}


@pytest.fixture
def alone(workspace: Workspace, tmp_path: Path) -> Workspace:
    """One process, in a copy of the workspace whose steps other tests do not touch."""
    return Workspace(shutil.copytree(workspace.folder, tmp_path / "alone"), workspace.warm)


@pytest.fixture
def together(alone: Workspace, tmp_path: Path) -> Together:
    return Together(shutil.copytree(alone.folder, tmp_path / "together"), alone.warm)


def anew(workspace: Workspace, *names: str) -> None:
    """As if no step of that name had ever run."""
    for name in names:
        folder = name.replace("align-", "align/")
        for state in (workspace.folder / ".posttrain" / "runs").glob(f"{name}-" + "?" * 16):
            shutil.rmtree(state)
        for output in (f"models/{folder}", f"runs/{folder}"):
            shutil.rmtree(workspace.folder / output, ignore_errors=True)


def agree(left: Workspace, right: Workspace, folder: str, tolerance: float = 2e-5) -> None:
    """Weights and every recorded number are the same up to rounding; all other records are equal."""
    one, two = (load_file(w.folder / "models" / folder / "model.safetensors") for w in (left, right))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < tolerance
    records = [read(w.folder / "runs" / folder / "journal.jsonl") for w in (left, right)]
    assert [_facts(record) for record in records[0]] == [_facts(record) for record in records[1]]
    for mine, others in zip(*([r["values"] for r in side if r["kind"] == "metrics"] for side in records), strict=True):
        assert mine == pytest.approx(others, abs=1e-3, rel=1e-3, nan_ok=True)


def as_alone(alone: Workspace, together: Workspace) -> None:
    """Several processes train GRPO to the result of one."""
    anew(alone, "align-grpo-0")
    alone.succeed(*GRPO)
    agree(alone, together, "align/grpo-0")


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a record that does not depend on rounding."""
    loose = {"metrics": ("values",), "summary": ("values",), "model": ("files", "sha256", "content")}
    return {key: value for key, value in record.items() if key not in loose.get(record["kind"], ())}


def test_sft_over_two_processes_is_that_of_one(alone: Workspace, together: Together) -> None:
    """Batches of 21 rows and, last in each epoch, of one: the other process has nothing then, and FSDP2 waits for all at every layer."""
    for workspace in (alone, together):
        anew(workspace, "sft")
        workspace.succeed("pipelines.commands.configure", "sft.batch_size=21")
    alone.succeed("pipelines.sft")
    said = together.succeed("pipelines.sft", **together.over("fsdp2_cpu"))
    assert said.count("sft: 8 optimiser steps over 64 rows") == 1
    agree(alone, together, "sft")


def test_a_configuration_or_an_input_that_is_not_there_is_named(together: Together) -> None:
    done = together.run("pipelines.sft", POSTTRAIN_ACCELERATE="nowhere.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: POSTTRAIN_ACCELERATE = 'nowhere.yaml': no such file")
    # a missing input is named once, before the processes start
    (together.folder / "data" / "valid" / "sft.parquet").unlink()
    done = together.run("pipelines.sft", **together.over("ddp_cpu"))
    assert done.returncode == 2
    assert done.stderr == (
        "error: sft: the input data/valid/sft.parquet does not exist. Run `dvc repro`, which makes the inputs of a stage first.\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp_cpu", "fsdp2_cpu"])
def test_every_kind_of_training_and_every_way_of_sharing_it(kind: str, alone: Workspace, together: Together) -> None:
    steps = {"reward": ("pipelines.reward",)} | {
        f"align-{name}-0": ("pipelines.align", "--algorithm", name, "--seed", "0")
        for name in ("dpo", "grpo", "ppo", "chord", "grpo_pairs")
    }
    for name, step in steps.items():
        for workspace, extra in ((alone, {}), (together, together.over(kind))):
            anew(workspace, name)
            workspace.succeed(*step, **extra)
        agree(alone, together, name.replace("align-", "align/"))
        if name == "reward":
            # what follows is to start from the same bytes
            shutil.copytree(alone.folder / "models" / name, together.folder / "models" / name, dirs_exist_ok=True)


@pytest.mark.slow
def test_layers_split_over_two_processes(alone: Workspace, together: Together) -> None:
    """Tensor parallelism of stages: every kind of training has the weights and records of one process."""
    for workspace in (alone, together):
        workspace.succeed("pipelines.commands.configure", "model.tiny.kv_heads=2")
        anew(workspace, "base")
        workspace.succeed("pipelines.base")
    extra = together.over("ddp_cpu") | {"POSTTRAIN_TENSOR_PARALLEL": "2"}
    steps = {"sft": ("pipelines.sft",), "reward": ("pipelines.reward",)} | {
        f"align-{name}-0": ("pipelines.align", "--algorithm", name, "--seed", "0") for name in ("dpo", "grpo", "ppo")
    }
    for name, step in steps.items():
        anew(alone, name)
        anew(together, name)
        alone.succeed(*step)
        together.succeed(*step, **extra)
        agree(alone, together, name.replace("align-", "align/"), 1e-5)
        if name in ("sft", "reward"):
            # what follows is to start from the same bytes
            shutil.copytree(alone.folder / "models" / name, together.folder / "models" / name, dirs_exist_ok=True)
        if name == "reward":
            for workspace in (alone, together):
                anew(workspace, "reward_readers")
                workspace.succeed("pipelines.reward_readers")
    refused = together.run("pipelines.sft", **extra | {"POSTTRAIN_TENSOR_PARALLEL": "3"})
    assert refused.returncode == 2
    words = "error: POSTTRAIN_TENSOR_PARALLEL = 3: all 2 processes of a stage split its layers, or none"
    assert refused.stderr.startswith(words)
    assert refused.stderr.count("error") == 1  # before processes start


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp_cpu", "fsdp2_cpu"])
def test_with_an_adapter(kind: str, alone: Workspace, together: Together) -> None:
    for workspace, extra in ((alone, {}), (together, together.over(kind))):
        workspace.succeed("pipelines.commands.configure", "align.lora={rank: 4, alpha: 8}")
        for name in ("ppo", "grpo"):
            anew(workspace, f"align-{name}-0")
            workspace.succeed("pipelines.align", "--algorithm", name, "--seed", "0", **extra)
    for name in ("ppo", "grpo"):
        agree(alone, together, f"align/{name}-0")
        adapters = [
            load_file(w.folder / f"models/align/{name}-0/adapter/adapter_model.safetensors") for w in (alone, together)
        ]
        assert adapters[0].keys() == adapters[1].keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp_cpu", "fsdp2_cpu"])
def test_a_request_to_stop_reaches_all_and_any_number_of_processes_goes_on(
    kind: str, alone: Workspace, together: Together
) -> None:
    anew(together, "align-grpo-0")
    process = together.start(*GRPO, **together.over(kind))
    family = _after_step(together, "align-grpo-0", 2, process)
    assert len(family) == 2
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, out + err
    assert "Traceback" not in err
    _all_gone(family)
    journal = together.state("align-grpo-0") / "journal.jsonl"
    assert ended(read(journal)) == "KILLED"
    assert sorted(together.state("align-grpo-0").glob("checkpoints/*/step-*"))
    # one process goes on from what two have left
    said = together.succeed(*GRPO)
    assert "resuming from the checkpoint after step" in said
    as_alone(alone, together)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp_cpu", "fsdp2_cpu"])
def test_the_death_of_one_process_ends_the_other_and_the_next_run_goes_on(
    kind: str, alone: Workspace, together: Together
) -> None:
    anew(together, "align-grpo-0")
    process = together.start(*GRPO, **together.over(kind))
    family = _after_step(together, "align-grpo-0", 3, process)
    victim = next(p for p in family if p.environ()["RANK"] == "1")
    victim.kill()
    process.communicate(timeout=90)
    assert process.returncode not in (0, None)
    _all_gone(family)
    assert "resuming from the checkpoint after step" in together.succeed(*GRPO, **together.over(kind))
    as_alone(alone, together)


DVC = """
import os, subprocess, sys
subprocess.run(["/bin/sh", "-c", " ".join(sys.argv[1:]) + "; true"], env=os.environ | {"DVC_STAGE": "align"})
"""


@pytest.mark.slow
def test_a_killed_dvc_takes_all_along(alone: Workspace, together: Together) -> None:
    """A stand-in for dvc starts the step as dvc does, by a shell that keeps running."""
    anew(together, "align-grpo-0")
    dvc = subprocess.Popen(
        [sys.executable, "-c", DVC, sys.executable, "-m", *GRPO], cwd=together.folder,
        env=environment(together.warm.root, **together.over("ddp_cpu")),
    )  # fmt: skip
    _after_step(together, "align-grpo-0", 2, dvc)
    family = psutil.Process(dvc.pid).children(recursive=True)
    assert len(family) >= 4  # the shell, the launcher, two that train and what helps them
    dvc.kill()
    dvc.wait()
    _all_gone(family)
    assert ended(read(together.state("align-grpo-0") / "journal.jsonl")) == "KILLED"
    assert "resuming from the checkpoint after step" in together.succeed(*GRPO)
    as_alone(alone, together)


@pytest.mark.slow
def test_accelerate_launch_by_hand(alone: Workspace, together: Together) -> None:
    anew(alone, "sft")
    anew(together, "sft")
    alone.succeed("pipelines.sft")
    file = together.over("ddp_cpu")["POSTTRAIN_ACCELERATE"]
    said = together.succeed("accelerate.commands.launch", "--config_file", file, "-m", "pipelines.sft")
    # processes that do not know of each other would find each other's checkpoints
    assert "resuming from" not in said
    steps = read(together.folder / "runs" / "sft" / "journal.jsonl")
    assert steps != read(alone.folder / "runs" / "sft" / "journal.jsonl"), "two processes round in another way than one"
    agree(alone, together, "sft")


def _after_step(workspace: Workspace, name: str, step: int, process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the processes that train, once `step` steps are recorded."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        found = list((workspace.folder / ".posttrain" / "runs").glob(f"{name}-" + "?" * 16 + "/journal.jsonl"))
        if found and sum(record["kind"] == "metrics" for record in read(found[0])) >= step:
            return psutil.Process(process.pid).children()
        time.sleep(0.02)
    raise AssertionError("no step was recorded in time")


def _all_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    for process in alive:
        os.kill(process.pid, signal.SIGKILL)
    assert alive == []
