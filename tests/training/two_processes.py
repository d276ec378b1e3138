"""Run by two processes at once: updates of a few presets and a step's sampling, written by the first one."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator

from posttrain.algorithms import PRESETS
from posttrain.errors import NumericalError
from tests.models import small
from tests.training.cases import case, probe
from tests.training.runs import sampler

NAMES = ["sft", "dpo", "ppo", "chord", "one_row"]


def results(accelerator: Accelerator) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in NAMES:
        made = case("sft" if name == "one_row" else name, double=True)
        rows = made.rows[:1] if name == "one_row" else made.rows
        trainer = probe(made.model(), 30, accelerator=accelerator)
        metrics = trainer.update(rows, made.objective)
        found[name] = (metrics, trainer.gradient)
    drawn = sampler(PRESETS["grpo"], small.language_model(), prompts=5, accelerator=accelerator)
    answers, _ = drawn.sample()
    found["answers"] = [(a.group, a.completion.tokens, a.reward) for a in answers]
    found["tokens_sampled"] = drawn.tokens_sampled
    return found


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
