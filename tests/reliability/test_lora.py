"""A run that trains an adapter is killed in the middle of it, and ends as if it had not been."""

from __future__ import annotations

import shutil

import torch
from safetensors.torch import load_file

from tests.reliability.test_kills import choose
from tests.reliability.workspace import Workspace

RESULT = ("models/align/ppo-7", "runs/align/ppo-7")


def test_kills_change_nothing_and_checkpoints_are_small(workspace: Workspace) -> None:
    shutil.copy(workspace.folder / "params.yaml", workspace.folder / "lora.yaml")
    lora = "align.lora={rank: 2, alpha: 4, target_modules: [q_proj, v_proj]}"
    workspace.succeed("pipelines.commands.configure", "--params", "lora.yaml", lora)
    step = ("pipelines.align", "--algorithm", "ppo", "--seed", "7", "--params", "lora.yaml")
    points = workspace.points(*step)
    undisturbed = workspace.results(*RESULT)
    folder = workspace.folder / RESULT[0]
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    # rank (in + out) of q and v: 32 -> 32 and, with one head of keys and values of the two, 32 -> 16
    assert sum(weight.numel() for weight in adapter.values()) == 2 * (32 + 32) + 2 * (32 + 16)
    before, after = (load_file(path / "model.safetensors") for path in (workspace.folder / "models" / "sft", folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qv"}

    workspace.forget("align-ppo-7", *RESULT)
    for point in choose(points, "lora"):
        workspace.killed_at(point, *step)
        states = sorted(workspace.state("align-ppo-7").glob("checkpoints/*/step-*/state.pt"))
        weights = (folder.parents[1] / "sft" / "model.safetensors").stat().st_size
        assert all(state.stat().st_size < weights for state in states)
    assert "resuming from the checkpoint after step" in workspace.succeed(*step)
    assert workspace.results(*RESULT) == undisturbed
