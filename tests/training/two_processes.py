"""Run by two processes at once: updates of a few presets and a step's sampling, written by the first one."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from posttrain import choices
from posttrain.algorithms import PRESETS
from posttrain.data.tokens import Tokens
from posttrain.distributed import agree_on_choices, broadcast_state, gather_texts
from posttrain.errors import NumericalError
from posttrain.rewards.sources import FunctionReward
from posttrain.rollouts.ahead import Ahead, Background
from posttrain.settings import OptimizerSettings
from posttrain.training.onpolicy import Demonstration
from posttrain.training.source import settled
from posttrain.training.trainer import Trainer
from tests.models import small
from tests.models.moe import moe
from tests.rewards.behaving import process_ids
from tests.rollouts.test_ahead import Copies
from tests.training.cases import Case, case, experiences, probe, with_record
from tests.training.runs import sampler

NAMES = [*PRESETS, "sft", "sft_all", "reward", "one_row", "ppo_experts", "nothing_trained", "moe"]


def results(accelerator: Accelerator) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in NAMES:
        made = made_case(name)
        # the last micro-batch of each process, the one that is synchronised, is the longest row alone
        budget = 1 if name == "ppo_experts" else 30
        trainer = probe(made.model(), budget, accelerator=accelerator)
        metrics = trainer.update(made.rows, made.objective)
        found[name] = (metrics, trainer.gradient)
    drawn = sampler(PRESETS["grpo"], small.language_model(), prompts=5, accelerator=accelerator)
    answers, _ = drawn.sample()
    found["answers"] = [(a.group, a.completion.tokens, a.reward) for a in answers]
    found["tokens_sampled"] = drawn.tokens_sampled
    found["ahead"] = ahead(accelerator)
    found["resumed"] = resumed(accelerator)
    found["state"] = gather_object(
        [broadcast_state(accelerator, {"rank": accelerator.process_index, "x": torch.arange(3)})]
    )
    found["texts"] = gather_texts(accelerator, f"key {accelerator.process_index}")
    choices.follow({"both": 10 + accelerator.process_index, f"of {accelerator.process_index}": 1})
    agree_on_choices(accelerator)
    found["choices"] = gather_object([choices.made()])
    # every process has its own id, and all must learn from what one of them was told
    drawn.rewards = [FunctionReward("varied", process_ids)]
    found["judged"] = gather_object([[a.reward for a in drawn.sample()[0]]])
    return found


def ahead(accelerator: Accelerator) -> list[Any]:
    """Sample two steps before they are due; return their answers, and the state with those of a third one."""
    lm = small.language_model()
    early = Ahead(Background(Copies(lm)), 1, 5)
    drawn = sampler(PRESETS["grpo"], lm, prompts=5, accelerator=accelerator, ahead=early)
    # as text: a missing reward is NaN, which equals nothing
    answers = [[(a.group, a.completion.tokens, str(a.reward)) for a in drawn.sample()[0]] for _ in range(2)]
    (waiting,) = settled(drawn.state_dict())["rounds"]
    found = [answers, waiting["positions"], waiting["version"], waiting["answers"]["tokens"].tolist()]
    cut = sampler(
        PRESETS["grpo"], lm, prompts=5, accelerator=accelerator, ahead=Ahead(Background(Copies(lm)), 2, 5, interrupt=2)
    )
    parts = [[(a.completion.tokens, a.completion.parts) for a in cut.sample()[0]] for _ in range(2)]
    again = sampler(
        PRESETS["grpo"], lm, prompts=5, accelerator=accelerator, ahead=Ahead(Background(Copies(lm)), 2, 5, interrupt=2)
    )
    again.load_state_dict(settled(cut.state_dict()))
    last = [[(a.completion.tokens, a.completion.parts) for a in each.sample()[0]] for each in (cut, again)]
    assert last[0] == last[1]
    return [*found, parts, last]


def resumed(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Weights after two updates, the second by a trainer that began with the first one's state."""
    made, state = case("ppo", double=True), None
    for _ in range(2):
        trainer: Trainer[Any] = Trainer(
            made.model(), OptimizerSettings(1e-2), total_steps=2, micro_batch_tokens=30, accelerator=accelerator
        )
        if state is not None:
            trainer.load_state_dict(state)
        trainer.update(made.rows, made.objective)
        state = trainer.state_dict()
    return trainer.weights()


def made_case(name: str) -> Case:
    if name == "ppo_experts":
        return ppo_with_experts()
    if name == "moe":
        with moe("eager"):
            made = case("gspo", double=True)
            model = made.model()
        return replace(made, model=lambda: model)
    if name == "one_row":
        made = case("sft", double=True)
        # the other process has no row at all, only an empty micro-batch
        return replace(made, rows=made.rows[:1])
    if name == "nothing_trained":
        made = case("dapo", double=True)
        return replace(made, rows=[replace(row, trained=i < 2) for i, row in enumerate(made.rows)])
    return case(name, double=True)


def ppo_with_experts() -> Case:
    """PPO with an expert stream, whose longest rows are experts: they give the critic nothing to learn from."""
    spec = replace(PRESETS["ppo"], mu_peak=0.3)
    made = with_record(case("ppo", double=True), mu_peak=0.3)
    longest = [Tokens((5, 6, 7), (*range(10, 20), small.EOS)) for _ in range(2)]
    return replace(made, rows=[*experiences(spec), *(Demonstration(tokens, 0.3) for tokens in longest)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    found = results(accelerator)
    if accelerator.is_main_process:
        torch.save(found, sys.argv[1])
    made = case("sft")
    trainer = probe(made.model(), 30, accelerator=accelerator)
    broken = trainer.unwrapped
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    try:
        trainer.update(made.rows, made.objective)
    except NumericalError:
        print("refused")
    accelerator.wait_for_everyone()
    accelerator.end_training()
