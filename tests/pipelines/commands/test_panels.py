"""One option adds the panel that trains on the reward model, and changes nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows.compare import _add_arguments
from pipelines.commands.configure import configure
from pipelines.commands.panels import add_panel
from pipelines.config.params import load_params
from pipelines.runtime.command_line import command_parser
from posttrain.errors import ConfigError


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Path:
    shutil.copy(root / "params.yaml", tmp_path / "params.yaml")
    return tmp_path


def test_ppo_and_grpo_get_a_twin_on_the_reward_model(project: Path) -> None:
    before = load_params(project / "params.yaml")
    (line,) = add_panel(project)
    assert line.startswith("panel: ppo_rm, grpo_rm are added to params.yaml, which train on the reward model rm")
    after = load_params(project / "params.yaml")
    assert after.project.algorithms == [*before.project.algorithms, "ppo_rm", "grpo_rm"]
    twin, own = after.algorithms["ppo_rm"], before.algorithms["ppo"]
    assert (twin.preset, twin.options, twin.rewards) == (own.preset, own.options, {"rm": 1.0, "answer": 0.0})
    assert after.algorithms["grpo_rm"].rewards == {"rm": 1.0, "answer": 0.0}
    assert after.watched_rewards("ppo_rm") == after.watched_rewards("grpo_rm") == ("answer", "rm")
    changed = {"project", "algorithms"}
    assert before.model_dump(exclude=changed) == after.model_dump(exclude=changed)
    assert {name: after.algorithms[name] for name in before.algorithms} == before.algorithms
    written = (project / "params.yaml").read_bytes()
    assert add_panel(project) == ["panel: ppo_rm, grpo_rm are in the comparison already"]
    assert (project / "params.yaml").read_bytes() == written


def test_own_names_and_budgets_are_kept_and_the_note_on_tuning_is_not(project: Path) -> None:
    section = "algorithms.mine={preset: grpo, rewards: {answer: 2.0}, budget: {steps: 7}, tuned: best of 4 trials}"
    configure(project / "params.yaml", [section, "project.algorithms=[dpo,mine]"])
    add_panel(project)
    twin = load_params(project / "params.yaml").algorithms["mine_rm"]
    assert (twin.rewards, twin.budget, twin.tuned) == ({"rm": 1.0, "answer": 0.0}, {"steps": 7}, None)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (["project.algorithms=[dpo,gspo]"], "no algorithm with the preset ppo or grpo that trains on a true reward"),
        (
            ["project.algorithms=[grpo]", "evaluation.rewards=[answer]", "reward.enabled=false", "algorithms.grpo.rewards.rm=null"],
            "there is no reward model to train on",
        ),
    ],
)  # fmt: skip
def test_a_comparison_without_a_twin_or_a_reward_model_is_refused(
    project: Path, changes: list[str], refusal: str
) -> None:
    configure(project / "params.yaml", changes)
    written = (project / "params.yaml").read_bytes()
    with pytest.raises(ConfigError, match=refusal):
        add_panel(project)
    assert (project / "params.yaml").read_bytes() == written


def test_the_make_target_passes_an_option_that_the_flow_has(root: Path) -> None:
    parser = command_parser("compare", "")
    _add_arguments(parser)
    assert parser.parse_args(["--panel", "reward_model"]).panel == "reward_model"
    assert "$(if $(PANEL),--panel $(PANEL))" in (root / "Makefile").read_text(encoding="utf-8")
