"""Compare the memory that `posttrain plan` expects of a CPU with the peak of processes that sample, evaluate and train.

    python benchmarks/plan_memory.py [--cases sample-64x128,step-64x16] [--write]        # --write makes benchmarks/plan_memory.md

A case is a process that loads its models from files and keeps freed memory, as stages do. Its peak is the resident memory that a stage
records as `memory/peak_mib`. Models have SmolLM2-135M's shape and random weights; those of the cases -small have 6 of its 30 layers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

import torch
from accelerate import Accelerator
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_cases import NO_EOS, bytes_of
from pipelines.runtime.environment import quiet
from pipelines.runtime.machine import peak_resident_mib
from posttrain.algorithms import DPO, GRPO, PPO, OnPolicy
from posttrain.data.batches import collate, micro_batches
from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.evaluation.answers import EvaluationSettings, evaluate
from posttrain.models.allocator import keep_heap
from posttrain.models.checkpointing import recompute_layers
from posttrain.models.folders import load_policy
from posttrain.models.inference import token_logprobs
from posttrain.models.lora import Adapter, BasePolicy, adapter_parameters
from posttrain.models.policy import Policy, Scorer
from posttrain.models.scorers import load_new_scorer
from posttrain.models.tiny import byte_tokenizer
from posttrain.planning import RUNTIME_BYTES, Memory, sampling, sizes, training
from posttrain.rewards.sources import FunctionReward
from posttrain.rollouts.engine import SamplingSettings
from posttrain.rollouts.groups import GroupSampler, GroupSettings, Problem
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import LoraSettings, OptimizerSettings
from posttrain.training.experience import ExperienceSource
from posttrain.training.onpolicy import OnPolicyObjective
from posttrain.training.preference import Answer, PreferenceObjective, PreferencePair
from posttrain.training.supervised import Example, RewardObjective, RewardPair, SupervisedObjective
from posttrain.training.trainer import Trainer

MIB, WANTED = 2**20, 0.1
BUDGET = 1024
"""Tokens of a micro-batch."""
ON_POLICY = {"step": GRPO, "ppo": replace(PPO, critic_start="sft")}
HEAD = """# Memory that `posttrain plan` expects of a CPU, and measured peaks

Made by `python benchmarks/plan_memory.py --write --cases {cases}`:
{machine}.
Models have SmolLM2-135M's shape and random weights; -small has 6 of its 30 layers. `sample-512x128`: prompts of 512 tokens and 128 answers,
8 a prompt. step: GRPO with a reference, two steps of sampling, log-probabilities and an update; ppo: the same with a critic.
evaluate: two models. sft, dpo, reward: two updates. Micro-batches have at most {budget:,} tokens, and the plan is that of the largest one.
Wanted: at most 10 % apart.

| case | planned, MiB | peak, MiB | peak / planned | wanted | reached |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Case:
    """`prompts` of `length` tokens with `answers` of `new_tokens` each; `rank` of an adapter, 0 for none."""

    kind: str
    length: int
    prompts: int
    answers: int
    new_tokens: int = 12
    layers: int = 30
    bf16: bool = False
    rank: int = 0
    recomputes: bool = False

    @property
    def lora(self) -> LoraSettings | None:
        return LoraSettings(rank=self.rank, alpha=2 * self.rank) if self.rank else None

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=self.layers, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
        )  # fmt: skip


LARGE = {
    "sample-512x128": Case("sample", 512, 16, 8),
    "sample-64x128": Case("sample", 64, 16, 8, 64),
    "sample-64x16": Case("sample", 64, 2, 8, 64),
    "evaluate-512x16": Case("evaluate", 512, 8, 2),
    "step-64x16": Case("step", 64, 2, 8),
    "step-512x16": Case("step", 512, 2, 8),
    "step-512x16-lora": Case("step", 512, 2, 8, rank=8),
    "step-512x16-checkpointing": Case("step", 512, 2, 8, recomputes=True),
    "sft": Case("sft", 64, 16, 1, 64),
    "sft-checkpointing": Case("sft", 64, 16, 1, 64, recomputes=True),
    "sft-lora": Case("sft", 64, 16, 1, 64, rank=8),
    "ppo-64x16": Case("ppo", 64, 2, 8),
    "dpo": Case("dpo", 64, 8, 2, 64),
    "reward": Case("reward", 64, 8, 2, 64),
}
SMALL = {
    **LARGE,
    "sample-512x24-own": Case("sample", 512, 24, 1),
    "step-512x128": Case("step", 512, 16, 8),
}
CASES = LARGE | {f"{name}-small": replace(case, layers=6) for name, case in SMALL.items()}
CASES |= {
    f"{name}-bf16": replace(CASES[name], bf16=True)
    for name in ("sample-512x128", "step-64x16", "sft", *(f"{n}-small" for n in SMALL))
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/plan_memory.md")
    args = parser.parse_args()
    if args.one:
        name, folder = args.one
        print(json.dumps(measured(CASES[name], Path(folder))))
        return
    quiet()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.cases.split(","):
            case = CASES[name]
            source = Path(folder) / str(case.layers)
            if not source.exists():
                torch.manual_seed(0)
                LlamaForCausalLM(case.config()).save_pretrained(source)
            command = [sys.executable, __file__, "--one", name, str(source)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(row(name, planned(case).total, json.loads(done.stdout)))
            print(rows[-1], file=sys.stderr, flush=True)
    machine = f"torch {torch.__version__}, one thread, float32 unless the case says bf16"
    text = HEAD.format(cases=args.cases, machine=machine, budget=BUDGET) + "\n".join(rows) + "\n"
    print(text)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


def row(name: str, planned_bytes: int, peak: float) -> str:
    """Return a row of the table."""
    expected = (planned_bytes + RUNTIME_BYTES) / MIB
    reached = "yes" if abs(peak / expected - 1) <= WANTED else "NO"
    return f"| {name} | {expected:,.0f} | {peak:,.0f} | {peak / expected:.2f} | 0.90 to 1.10 | {reached} |"


def planned(case: Case) -> Memory:
    """Return the larger memory of the case's phases, as `posttrain plan` computes it."""
    model, answers, tokens = sizes(case.config()), case.prompts * case.answers, largest_micro_batch(case)
    adapter, _ = adapter_parameters(case.config(), case.lora) if case.lora else (None, 0)
    options: dict[str, Any] = {"bf16": case.bf16, "adapter": adapter}
    if case.kind in ("sft", "dpo", "reward"):
        trained = model.with_scalar_head() if case.kind == "reward" else model
        return training(trained, tokens, recomputes=case.recomputes, **options)
    if case.kind in ON_POLICY:
        held = {"trained": 2 if case.kind == "ppo" else 1, "frozen": int(not case.rank)} | options
        sampled = sampling(model, answers, case.length, case.new_tokens, samples=case.answers, **held)
        learns = training(model, tokens, recomputes=case.recomputes, **held)
        return max(sampled, learns, key=lambda memory: memory.total)
    frozen = 2 if case.kind == "evaluate" else 1
    return sampling(model, answers, case.length, case.new_tokens, samples=case.answers, frozen=frozen, bf16=case.bf16)


def largest_micro_batch(case: Case) -> int:
    """Return the tokens of the largest micro-batch, to which the plan's micro_batch_tokens is an upper limit."""
    rows = given_rows(case, prompts_of(case))
    return max(len(collate([t for i in group for t in rows[i]]).input_ids) for group in micro_batches(rows, BUDGET))


def prompts_of(case: Case) -> list[tuple[int, ...]]:
    """Return prompts of random bytes."""
    generator = torch.Generator().manual_seed(0)
    return [tuple(row) for row in torch.randint(3, 250, (case.prompts, case.length), generator=generator).tolist()]


def given_rows(case: Case, prompts: list[tuple[int, ...]]) -> list[list[Tokens]]:
    """Return the sequences of each row: the answers to a prompt of pairs, else single answers."""
    answers = [tuple((7 * i + n) % 250 + 3 for n in range(case.new_tokens)) for i in range(case.answers)]
    groups = [[Tokens(prompt, answer) for answer in answers] for prompt in prompts]
    return groups if case.kind in ("dpo", "reward") else [[row] for group in groups for row in group]


def measured(case: Case, source: Path) -> float:
    """Return the peak of this process after the case, in MiB."""
    keep_heap()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16" if case.bf16 else "no", cpu=True)
    prompts = prompts_of(case)
    if case.kind in ("sft", "dpo", "reward"):
        _learn(case, source, prompts, accelerator)
    elif case.kind == "evaluate":
        policy, reference = (Policy(load_policy(source)).eval().requires_grad_(False) for _ in range(2))
        engine, encoder = NativeEngine(policy.lm, NO_EOS, bf16=case.bf16), TextEncoder(byte_tokenizer(4096), 4096)
        settings = EvaluationSettings(case.new_tokens, case.answers, 1.0, 0, BUDGET, case.bf16)
        asked, rewards = _problems(prompts), [FunctionReward("bytes", bytes_of)]
        evaluate(policy, reference, engine, encoder, asked, rewards, settings)
    else:
        _sample(case, source, prompts, accelerator)
    return peak_resident_mib()


def _problems(prompts: list[tuple[int, ...]]) -> list[Problem]:
    return [Problem(str(i), prompt, {}) for i, prompt in enumerate(prompts)]


def _learn(case: Case, source: Path, prompts: list[tuple[int, ...]], accelerator: Accelerator) -> None:
    """Make two updates on given answers."""
    model = load_new_scorer(source) if case.kind == "reward" else load_policy(source)
    if case.lora is not None:
        Adapter(model, case.lora)
    if case.recomputes:
        recompute_layers(model)
    module: nn.Module = Scorer(model) if case.kind == "reward" else Policy(model)
    groups = given_rows(case, prompts)
    rows: list[Any]
    objective: Any
    if case.kind == "sft":
        rows, objective = [Example(answer) for answers in groups for answer in answers], SupervisedObjective()
    elif case.kind == "reward":
        rows, objective = [RewardPair(*answers) for answers in groups], RewardObjective()
    else:
        assert isinstance(module, Policy)
        flat = [answer for answers in groups for answer in answers]
        logged = [found.logprobs for found in token_logprobs(module, flat, BUDGET, bf16=case.bf16)]
        answers = [Answer(row, values) for row, values in zip(flat, logged, strict=True)]
        rows = [PreferencePair(answers[i], answers[i + 1]) for i in range(0, len(answers), 2)]
        objective = PreferenceObjective(DPO)
    trainer = _trainer(module, accelerator)
    for _ in range(2):
        trainer.update(rows, objective)


def _sample(case: Case, source: Path, prompts: list[tuple[int, ...]], accelerator: Accelerator) -> None:
    """Sample, and in a step also train on the answers."""
    spec: OnPolicy = ON_POLICY.get(case.kind, GRPO)
    critic = load_new_scorer(source) if case.kind == "ppo" else None
    policy = Policy(load_policy(source), critic=critic)
    adapter = None if case.lora is None else Adapter(policy.lm, case.lora)
    if case.recomputes:
        recompute_layers(policy.lm)
    engine, encoder = NativeEngine(policy.lm, NO_EOS, bf16=case.bf16), TextEncoder(byte_tokenizer(4096), 4096)
    sampler = GroupSampler(
        _problems(prompts), engine, encoder, [FunctionReward("bytes", bytes_of)], {"bytes": 1.0}, spec,
        GroupSettings(case.prompts, case.answers, SamplingSettings(case.new_tokens, 1.0)), 0, accelerator,
    )  # fmt: skip
    if case.kind == "sample":
        policy.requires_grad_(False)
        sampler.sample()
        return
    objective = OnPolicyObjective(spec, case.new_tokens, 1.0)
    reference = Policy(load_policy(source)).eval() if adapter is None else BasePolicy(policy.lm, adapter)
    if adapter is None:
        reference.requires_grad_(False)
    experience = ExperienceSource(
        spec, policy, reference, sampler, objective, micro_batch_tokens=BUDGET, bf16=case.bf16
    )
    trainer = _trainer(policy, accelerator)
    for step in range(2):
        for batch in experience.next(step).batches:
            trainer.update(batch, objective)


def _trainer(module: nn.Module, accelerator: Accelerator) -> Trainer[Any]:
    return Trainer(
        module, OptimizerSettings(1e-6), total_steps=1000, micro_batch_tokens=BUDGET, accelerator=accelerator
    )


if __name__ == "__main__":
    main()
