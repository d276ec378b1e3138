"""Training with an adapter: the same mathematics over fewer parameters, a small checkpoint, and a base that nothing touches."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.models.inference import token_logprobs
from posttrain.models.lora import Adapter, BasePolicy
from posttrain.models.policy import Policy
from posttrain.settings import OptimizerSettings
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.preference import Answer, PreferencePair
from posttrain.training.trainer import Trainer
from tests.models import small
from tests.models.test_lora import SETTINGS, shaken
from tests.training.cases import Case, case
from tests.training.runs import Killed, Memory, start
from tests.training.test_invariance import outcome, same, unpacked
from tests.training.test_resume import disturb, same_weights


def with_adapters(made: Case) -> Case:
    def model() -> torch.nn.Module:
        module: Any = made.model()
        torch.manual_seed(3)
        for part in (getattr(module, name, None) for name in ("lm", "critic", "model")):
            if part is not None:
                Adapter(part, SETTINGS)
        shaken(module)
        return module.double()

    return replace(made, model=model)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "grpo_pairs", "grpo", "ppo", "dapo", "chord"])
def test_micro_batches_order_and_padding_change_nothing(name: str) -> None:
    made = with_adapters(case(name, double=True))
    whole = outcome(made)
    moved = {parameter for parameter, gradient in whole[1].items() if float(gradient.abs().max()) > 0}
    assert moved
    assert all("lora_" in parameter or "score" in parameter for parameter in moved)
    for budget in (1, 25):
        same(whole, outcome(made, budget), 1e-10)
    same(whole, outcome(unpacked(made), 70, made.rows[::-1]), 1e-10)


def test_dpo_starts_at_ln_2_against_the_policy_without_its_adapter() -> None:
    lm = small.language_model()
    adapter = Adapter(lm, SETTINGS)
    reference = BasePolicy(lm, adapter)
    chosen = small.rows(5, seed=11)
    sides = [
        [Answer(t, n.logprobs) for t, n in zip(tokens, token_logprobs(reference, tokens, 1000), strict=True)]
        for tokens in (chosen, small.answers(chosen, seed=12))
    ]
    pairs = [PreferencePair(*answers) for answers in zip(*sides, strict=True)]
    made = replace(case("dpo"), model=lambda: Policy(lm), rows=pairs)
    metrics, gradient = outcome(made)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    # with B = 0 nothing reaches A, and everything reaches B
    sides_moved = {name.split("lora_")[1][0] for name, value in gradient.items() if float(value.abs().max()) > 0}
    assert sides_moved == {"B"}


def test_a_checkpoint_holds_the_adapter_and_its_moments_alone(tmp_path: Path) -> None:
    made, sizes = case("sft"), {}
    for name, apply_training_options in (("whole", made), ("adapter", with_adapters(made))):
        trainer: Trainer[Any] = Trainer(
            apply_training_options.model().float(), OptimizerSettings(1e-3), total_steps=1, micro_batch_tokens=100
        )
        trainer.update(made.rows, made.objective)
        state = trainer.state_dict()
        path = Checkpoints(tmp_path / name).save(1, {"trainer": state})
        sizes[name] = (sum(value.numel() for value in state["model"].values()), (path / "state.pt").stat().st_size)
        moments = [m for per in state["optimizer"]["state"].values() for key, m in per.items() if key != "step"]
        assert sum(m.numel() for m in moments) == 2 * sizes[name][0]
    assert sizes["adapter"][0] == 2048
    assert sizes["adapter"][1] - 3 * 4 * 2048 < 50_000
    assert sizes["whole"][1] > 3 * 4 * sizes["whole"][0]


@pytest.mark.parametrize("name", ["reward", "dpo", "grpo", "ppo"])
def test_resumed_is_bit_identical_and_the_base_is_as_it_was(name: str, tmp_path: Path) -> None:
    straight, recorder = Memory(), Memory(kill_at=5)
    trained = start(name, tmp_path / "straight", straight, lora=SETTINGS)
    with pytest.raises(Killed):
        start(name, tmp_path / "killed", recorder, lora=SETTINGS)
    disturb(1)
    recorder.kill_at = None
    resumed = start(name, tmp_path / "killed", recorder, lora=SETTINGS)
    assert recorder.truncated == [0, 4]
    same_weights(trained, resumed)
    assert recorder.steps == straight.steps

    untrained = (small.scorer() if name == "reward" else small.policy(critic=name == "ppo")).state_dict()
    kept = {key.replace(".base_layer", ""): value for key, value in trained.state_dict().items()}
    same_names = [key for key in untrained if key in kept and "score" not in key]
    assert len(same_names) > 20
    assert all(torch.equal(untrained[key], kept[key]) for key in same_names)


def test_the_policy_moves_away_from_a_reference_that_stays(tmp_path: Path) -> None:
    recorder = Memory()
    start("dr_grpo", tmp_path, recorder, lora=SETTINGS)
    assert recorder.steps[1]["kl/ref_k3"] == pytest.approx(0.0, abs=1e-7)
    assert recorder.steps[6]["kl/ref_k3"] > 1e-4
