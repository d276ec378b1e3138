"""Work that benchmarks/gpu.py times: updates of each kind of training, sampling, and whole steps of GRPO.

A model has the shape of a published one and random weights. FLOP are counted as the work that one process must do: a shared prompt once,
the head only for tokens that are trained, and causal attention by its keys.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from posttrain.algorithms import DPO, GRPO
from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.models.checkpointing import recompute_layers
from posttrain.models.inference import token_logprobs
from posttrain.models.packed import attention_name
from posttrain.models.policy import Policy, Scorer
from posttrain.models.tiny import byte_tokenizer
from posttrain.planning import Memory, Sizes, sampling, training
from posttrain.rewards.sources import FunctionReward
from posttrain.rollouts.engine import SamplingSettings
from posttrain.rollouts.groups import GroupSampler, GroupSettings, Problem
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import OptimizerSettings
from posttrain.training.experience import ExperienceSource
from posttrain.training.onpolicy import Experience, OnPolicyObjective
from posttrain.training.preference import Answer, PreferenceObjective, PreferencePair
from posttrain.training.supervised import Example, RewardObjective, RewardPair, SupervisedObjective
from posttrain.training.trainer import Trainer

NO_EOS = -1
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Sizes of a model like Qwen3."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int = 128
    vocabulary: int = 151_936

    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocabulary, hidden_size=self.hidden, num_hidden_layers=self.layers, intermediate_size=self.intermediate,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=self.head, max_position_embeddings=40_960,
            tie_word_embeddings=True, num_labels=1,
        )  # fmt: skip


SHAPES = {
    "0.6B": Shape(1024, 28, 3072, 16, 8),
    "4B": Shape(2560, 36, 9728, 32, 8),
    "tiny": Shape(64, 2, 128, 4, 2, 16, 500),
}


@dataclass(frozen=True)
class Case:
    """Timed work.

    Attributes:
        kind: an update of `sft`, `reward`, `dpo`, or `grpo` on given answers; `rollouts` samples; `step` samples, scores and updates.
        prompts: prompts of an update.
        prompt: tokens of a prompt.
        answer: tokens of an answer.
        answers: answers to a prompt.
        uneven: lengths fall from the given ones to an eighth. Kernels that prepare for a shape, or need a mask, lose time only here.
    """

    kind: str
    prompts: int
    prompt: int
    answer: int
    answers: int = 1
    uneven: bool = False


CASES = {
    "sft-2k": Case("sft", 8, 256, 1792),
    "sft-8k": Case("sft", 2, 1024, 7168),
    "sft-uneven": Case("sft", 24, 256, 1792, uneven=True),
    "reward-2k": Case("reward", 4, 1024, 1024, 2),
    "reward-8k": Case("reward", 1, 4096, 4096, 2),
    "dpo-2k": Case("dpo", 4, 1024, 1024, 2),
    "dpo-8k": Case("dpo", 1, 4096, 4096, 2),
    "grpo-2k": Case("grpo", 2, 1024, 1024, 8),
    "grpo-8k": Case("grpo", 1, 4096, 4096, 8),
    "grpo-shared-2k-prompt": Case("grpo", 4, 2048, 256, 8),
    "rollouts": Case("rollouts", 32, 256, 256, 8),
    "step": Case("step", 32, 256, 256, 8),
}
BUDGET = 16_384
"""Tokens of a micro-batch."""
FILLED = 0.9
"""Largest share of a GPU's memory that a plan without recomputed layers may take."""
TINY = 32
"""Divisor of lengths and budget in a tiny run."""


def tiny(case: Case) -> Case:
    """Return a case that a CPU computes in a second."""
    return replace(case, prompts=min(case.prompts, 4), prompt=case.prompt // TINY, answer=case.answer // TINY)


Group = tuple[tuple[int, ...], list[tuple[int, ...]]]
"""A prompt and its answers, as token ids."""


def groups_of(case: Case, vocabulary: int) -> list[Group]:
    """Return random prompts with their answers; the same ones in every run."""
    generator, last = torch.Generator().manual_seed(0), max(1, case.prompts - 1)
    found = []
    for i in range(case.prompts):
        share = 2.0 ** (-3 * i / last) if case.uneven else 1.0
        lengths = [max(2, round(share * length)) for length in (case.prompt, *[case.answer] * case.answers)]
        prompt, *answers = (tuple(torch.randint(3, vocabulary, (n,), generator=generator).tolist()) for n in lengths)
        found.append((prompt, answers))
    return found


def laid_out(groups: Sequence[Group]) -> int:
    """Return the tokens that are computed if a prompt is computed once for its answers."""
    return sum(len(prompt) + sum(map(len, answers)) for prompt, answers in groups)


def flop(model: Sizes, groups: Sequence[Group], scores: bool = False) -> float:
    """Return the FLOP of forward and backward: three times two for each weight and token, and for each query and key (2204.02311).

    Args:
        scores: the head is a single row, as in a reward model.
    """
    head = 0 if scores else model.vocabulary * model.hidden
    trained = sum(len(answer) for _, answers in groups for answer in answers)
    keys = sum(len(p) ** 2 / 2 + sum(len(p) * len(a) + len(a) ** 2 / 2 for a in answers) for p, answers in groups)
    weights = (model.parameters - model.outside) * laid_out(groups) + head * trained
    return 6 * weights + 12 * model.layers * model.query_width * keys


def predicted(
    case: Case, model: Sizes, device: str, budget: int, recomputes: bool = False, device_bytes: int | None = None
) -> Memory:
    """Return the memory that `posttrain.planning` expects, as the stages' plan computes it."""
    answers = case.prompts * case.answers
    tokens = min(budget, laid_out(groups_of(case, 4)))
    frozen = int(case.kind == "step")
    trained = model.with_scalar_head() if case.kind == "reward" else model
    learns = training(trained, tokens, frozen=frozen, bf16=True, recomputes=recomputes, device=device)
    if case.kind not in ("rollouts", "step"):
        return learns
    samples = sampling(
        model, answers, case.prompt, case.answer, samples=case.answers, trained=frozen, frozen=1, bf16=True,
        device=device, device_bytes=device_bytes,
    )  # fmt: skip
    return samples if case.kind == "rollouts" else max(samples, learns, key=lambda memory: memory.total)


def must_recompute(case: Case, model: Sizes, device: str, budget: int, device_bytes: int | None) -> bool:
    """Return True if the plan exceeds the device's memory unless the backward pass computes layers a second time."""
    if device_bytes is None or case.kind == "rollouts":
        return False
    return predicted(case, model, device, budget, device_bytes=device_bytes).total > FILLED * device_bytes


def measured(case: Case, shape: Shape, model: Sizes, device: torch.device, budget: int, repeats: int) -> dict[str, Any]:
    """Time a case on a new model. Return tokens per second, TFLOP/s, and peak memory in GiB next to the predicted one."""
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process otherwise
    accelerator = Accelerator(mixed_precision="bf16", cpu=device.type == "cpu")
    torch.manual_seed(0)
    groups = groups_of(case, 250 if case.kind == "step" else shape.vocabulary)
    kind = Qwen3ForSequenceClassification if case.kind == "reward" else Qwen3ForCausalLM
    with torch.device(device):
        made: Any = kind(shape.config()).eval()
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    recomputes = must_recompute(case, model, device.type, budget, room)
    if recomputes:
        recompute_layers(made)
    module = Scorer(made) if case.kind == "reward" else Policy(made)
    run, tokens = prepared(case, module, groups, accelerator, budget)
    seconds, peak = timed(run, device, repeats)
    with accelerator.autocast():
        kernel = attention_name(module, device)
    work = None if case.kind in ("rollouts", "step") else flop(model, groups, case.kind == "reward") / seconds / 1e12
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tflops": work,
        "attention": kernel,
        "peak_gib": None if peak is None else peak / GIB,
        "predicted_gib": predicted(case, model, device.type, budget, recomputes, room).total / GIB,
        "recomputed": recomputes,
    }


def prepared(
    case: Case, module: nn.Module, groups: Sequence[Group], accelerator: Accelerator, budget: int
) -> tuple[Callable[[], object], int]:
    """Return the work to time, and the tokens that it counts: those of prompts and answers, or the sampled ones."""
    sampled = sum(len(answer) for _, answers in groups for answer in answers)
    if case.kind in ("rollouts", "step"):
        return sampled_step(case, module, groups, accelerator, budget), sampled
    rows, objective = given(case, module, groups, budget)
    trainer: Trainer[Any] = Trainer(
        module.to(accelerator.device),
        OptimizerSettings(1e-6),
        total_steps=1000,
        micro_batch_tokens=budget,
        accelerator=accelerator,
    )
    return lambda: trainer.update(rows, objective), sum(
        len(p) * len(answers) + sum(map(len, answers)) for p, answers in groups
    )


def given(case: Case, module: nn.Module, groups: Sequence[Group], budget: int) -> tuple[list[Any], Any]:
    """Return the rows of an update, and its objective."""
    tokens = [[Tokens(prompt, answer) for answer in answers] for prompt, answers in groups]
    if case.kind == "sft":
        return [Example(row) for rows in tokens for row in rows], SupervisedObjective()
    if case.kind == "reward":
        return [RewardPair(*rows) for rows in tokens], RewardObjective()
    assert isinstance(module, Policy)
    flat = [row for rows in tokens for row in rows]
    logged = [found.logprobs for found in token_logprobs(module, flat, budget, bf16=True)]
    if case.kind == "dpo":
        answers = [Answer(row, values) for row, values in zip(flat, logged, strict=True)]
        pairs = [PreferencePair(answers[i], answers[i + 1]) for i in range(0, len(answers), 2)]
        return pairs, PreferenceObjective(DPO)
    signs = [1.0 if i % 2 else -1.0 for i in range(len(flat))]
    rows = [
        Experience(row, np.full(len(row.response), sign, np.float32), values, values)
        for row, values, sign in zip(flat, logged, signs, strict=True)
    ]
    return rows, OnPolicyObjective(GRPO, case.answer, 1.0)


def sampled_step(
    case: Case, policy: nn.Module, groups: Sequence[Group], accelerator: Accelerator, budget: int
) -> Callable[[], object]:
    """Return sampling, or a whole step of GRPO: sampling, reference and update."""
    assert isinstance(policy, Policy)
    engine = NativeEngine(policy.lm, NO_EOS, bf16=True)
    encoder = TextEncoder(byte_tokenizer(4096), 4096)
    problems = [Problem(str(i), prompt, {}) for i, (prompt, _) in enumerate(groups)]
    sampler = GroupSampler(
        problems, engine, encoder, [FunctionReward("bytes", bytes_of)], {"bytes": 1.0}, GRPO,
        GroupSettings(case.prompts, case.answers, SamplingSettings(case.answer, 1.0)), 0, accelerator,
    )  # fmt: skip
    if case.kind == "rollouts":
        return sampler.sample
    objective = OnPolicyObjective(GRPO, case.answer, 1.0)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    source = ExperienceSource(GRPO, policy, reference, sampler, objective, micro_batch_tokens=budget, bf16=True)
    learner: Trainer[Any] = Trainer(
        policy, OptimizerSettings(1e-6), total_steps=1000, micro_batch_tokens=budget, accelerator=accelerator
    )

    def step() -> None:
        for batch in source.next(0).batches:
            learner.update(batch, objective)

    return step


def bytes_of(prompts: Any, completions: Any, **_: Any) -> list[float | None]:
    return [float(sum(text.encode()) % 7) for text in completions]


def timed(run: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, int | None]:
    """Return the median seconds of a call after one warm-up call, and the peak bytes of a GPU."""
    run()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[len(seconds) // 2], torch.cuda.max_memory_allocated() if on_gpu else None
