"""Run by two processes that share each row's tokens: updates of a few presets, written by the first one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor

from posttrain.data.batches import collate
from posttrain.data.offsets import OFFSETS
from posttrain.data.tokens import Tokens
from posttrain.errors import ConfigError
from posttrain.models.checkpointing import recompute_layers
from posttrain.models.context import Split, joined_slices, own_slice, trainer_group
from posttrain.models.packed import PROBE, packed_attention
from posttrain.models.policy import Policy
from posttrain.models.varlen import KERNELS, Kernel
from tests.models.moe import moe
from tests.models.varlen_reference import REFERENCE
from tests.training.cases import Case, case, probe

NAMES = ["reward", "ppo", "one_row", "recomputed", "windows", "offsets", "windows_by_offsets"]


def made_case(name: str) -> Case:
    if name == "one_row":
        made = case("sft", double=True)
        return replace(made, rows=made.rows[:1])
    if name == "recomputed":
        made = case("sft", double=True)
        model: Any = made.model()
        recompute_layers(model.lm)
        return replace(made, model=lambda: model)
    if name.startswith("windows"):
        return replace(case("sft", double=True), model=lambda: Policy(with_windows()).double())
    return case("grpo" if name == "offsets" else name, double=True)


@contextmanager
def by_offsets() -> Iterator[None]:
    """Compute attention by offsets inside the block, with the tests' own kernel, which must be called."""
    calls = []
    kernel = Kernel(lambda *given: (calls.append(1), REFERENCE.forward(*given))[1], REFERENCE.backward)
    with (
        patch.dict(KERNELS, {"cpu": lambda: kernel}),
        patch.dict(OFFSETS, {"cpu": frozenset({torch.float32})}),
    ):
        yield
    assert calls


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
        with by_offsets() if name.endswith("offsets") else nullcontext():
            made = made_case(name)
            model: Any = made.model()
            assert model.packs, name
            trainer = probe(model, 30, accelerator=accelerator)
            found[name] = (trainer.update(made.rows, made.objective), trainer.gradient)
    found["sinks"] = with_sinks(accelerator)
    return found


def with_sinks(accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Return attention of 4 heads with sinks and 2 key heads over a batch of 15 tokens, and the gradient of the sinks."""
    batch, group = collate(PROBE + PROBE[2:]), trainer_group(accelerator)
    generator, count = torch.Generator().manual_seed(0), len(batch.input_ids)
    states = [torch.randn(count, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    weights = torch.randn(count, 4, 8, generator=generator, dtype=torch.float64)
    own = states if group is None else [own_slice(each, group) for each in states]
    parts: Any = batch.parts if group is None else Split(batch.parts, count, group)
    given = [each.transpose(0, 1)[None] for each in own]
    attended, _ = packed_attention(torch.nn.Identity(), given[0], given[1], given[2], None, parts=parts, s_aux=sinks)
    whole = attended[0] if group is None else joined_slices(attended[0], group, count)
    (whole * weights).sum().div(1 if group is None else group.size).backward()
    assert sinks.grad is not None
    if group is not None:
        torch.distributed.all_reduce(sinks.grad)
    return whole.detach(), sinks.grad


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
