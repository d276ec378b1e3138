"""Run by two processes that share each row's tokens: updates of a few presets, written by the first one."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from posttrain.data.tokens import Tokens
from posttrain.errors import ConfigError
from posttrain.models.checkpointing import recompute_layers
from posttrain.models.policy import Policy
from tests.models.moe import moe
from tests.training.cases import Case, case, probe

NAMES = ["reward", "ppo", "one_row", "recomputed", "windows"]


def made_case(name: str) -> Case:
    if name == "one_row":
        made = case("sft", double=True)
        return replace(made, rows=made.rows[:1])
    if name == "recomputed":
        made = case("sft", double=True)
        model: Any = made.model()
        recompute_layers(model.lm)
        return replace(made, model=lambda: model)
    if name == "windows":
        return replace(case("sft", double=True), model=lambda: Policy(with_windows()).double())
    return case(name, double=True)


def with_windows() -> Any:
    """Return a model with windows of 4 tokens and one key head for two processes."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(5)
    config = MistralConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, sliding_window=4, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def results(accelerator: Accelerator) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in NAMES:
        made = made_case(name)
        model: Any = made.model()
        assert model.packs, name
        trainer = probe(model, 30, accelerator=accelerator)
        found[name] = (trainer.update(made.rows, made.objective), trainer.gradient)
    return found


def lengths(accelerator: Accelerator) -> list[int]:
    """Return how many tokens a layer computed of a batch of 2 rows with 5 own tokens each and a shared prompt of 6."""
    seen: list[int] = []
    made = case("sft", double=True)
    model: Any = made.model()
    model.lm.model.layers[0].register_forward_hook(lambda layer, args, output: seen.append(args[0].shape[1]))
    prompt = (5, 6, 7, 8, 9, 10)
    rows = [replace(made.rows[0], tokens=Tokens(prompt, (*range(11, 15), end))) for end in (15, 16)]
    probe(model, 30, accelerator=accelerator).update(rows, made.objective)
    return seen


def refusal(accelerator: Accelerator) -> str:
    with moe("eager"):
        made = case("gspo", double=True)
        trainer = probe(made.model(), 30, accelerator=accelerator)
    try:
        trainer.update(made.rows, made.objective)
    except ConfigError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    found = results(accelerator) | {"lengths": lengths(accelerator), "refusal": refusal(accelerator)}
    if accelerator.is_main_process:
        torch.save(found, sys.argv[1])
    accelerator.wait_for_everyone()
    accelerator.end_training()
