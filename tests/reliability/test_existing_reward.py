"""A reward model that exists already is measured and used as it is, also one with other tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipelines.runtime.journal import read
from posttrain.models.folders import save_model
from posttrain.models.tiny import byte_tokenizer
from tests.models import small
from tests.reliability.workspace import Workspace

GRPO = ("pipelines.align", "--algorithm", "grpo", "--seed", "0")


@pytest.fixture
def other(workspace: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the workspace, with a trained reward model in `trained` and one with other ids for two tokens in `foreign`."""
    folder = tmp_path / "project"
    for name in ("params.yaml", "dvc.yaml", "data", "models/sft", "models/base"):
        source = workspace.folder / name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    shutil.copytree(workspace.folder / "models" / "reward", folder / "trained")
    save_model(small.trunk_with_score(seed=8), byte_tokenizer(96), folder / "foreign", "", {"pad_token_id": 0})
    file = folder / "foreign" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words["1"], words["2"] = words["2"], words["1"]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    return Workspace(folder, workspace.warm)


def configured(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "models" / "reward" / "config.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("source", "reads_text"), [("foreign", True), pytest.param("trained", False, marks=pytest.mark.slow)]
)
def test_an_existing_reward_model_is_kept_and_rewards(other: Workspace, source: str, reads_text: bool) -> None:
    other.succeed("pipelines.commands.configure", f"reward.source={source}", "algorithms.grpo.rewards.rm=1.0")
    said = other.succeed("pipelines.reward")
    assert f"{source} is used as it is; it prefers the chosen answer in" in said
    assert ("through its own tokenizer" in said) == reads_text
    before, after = (load_file(other.folder / name / "model.safetensors") for name in (source, "models/reward"))
    assert set(before) == set(after)
    assert all(bool((weight == after[name]).all()) for name, weight in before.items())
    assert configured(other.folder)["reads_text"] is reads_text
    other.succeed("pipelines.reward_readers")
    other.succeed(*GRPO)
    steps = [
        r["values"]
        for r in read(other.folder / "runs" / "align" / "grpo-0" / "journal.jsonl")
        if r["kind"] == "metrics"
    ]
    assert len({values["reward/rm/mean"] for values in steps}) > 1


@pytest.mark.slow
def test_a_critic_cannot_start_from_other_tokens(other: Workspace) -> None:
    other.succeed("pipelines.commands.configure", "reward.source=foreign")
    for step in ("reward", "reward_readers"):
        other.succeed(f"pipelines.{step}")
    done = other.run("pipelines.align", "--algorithm", "ppo", "--seed", "0")
    assert done.returncode == 2
    assert "critic_start: reward, the reward model's tokenizer: 2 of its" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("models/sft", "holds a language model (Qwen3ForCausalLM) without a score head"),
        ("models/none", "no model folder at models/none"),
        ("nobody/nothing", "HF_HUB_OFFLINE=0"),
    ],
)
def test_what_is_no_reward_model_is_refused(other: Workspace, source: str, words: str) -> None:
    other.succeed("pipelines.commands.configure", "--absent", f"reward.source={source}")
    done = other.run("pipelines.reward")
    assert (done.returncode, words in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
