"""Run this project's side of benchmarks/training.py, with the library as the steps use it. Jobs and results are as in trl_side.py."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from benchmarks.silent import Silent
from posttrain.algorithms import DAPO, DPO, GRPO, GSPO
from posttrain.algorithms.specs import OnPolicy
from posttrain.data.tokens import Tokens
from posttrain.models.allocator import keep_heap
from posttrain.models.folders import load_encoder, load_policy
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy, Scorer
from posttrain.models.scorers import load_scorer
from posttrain.rewards.sources import RewardBatch
from posttrain.rollouts.engine import Completion, Engine, Request, SamplingSettings
from posttrain.rollouts.groups import GroupSampler, GroupSettings, Problem
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import OptimizerSettings
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.experience import ExperienceSource
from posttrain.training.loop import LoopSettings, fit
from posttrain.training.onpolicy import OnPolicyObjective
from posttrain.training.preference import Answer, PreferenceObjective, PreferencePair
from posttrain.training.source import StepData
from posttrain.training.sums import Terms
from posttrain.training.supervised import Example, RewardObjective, RewardPair, SupervisedObjective
from posttrain.training.trainer import Trainer

Job = dict[str, Any]
ONE_UPDATE: dict[str, Any] = {"advantage": "group_mean", "minibatches": 1}
RECORDS: dict[str, OnPolicy] = {
    "grpo": GRPO,
    "gspo": replace(GSPO, **ONE_UPDATE),
    "dapo": replace(DAPO, **ONE_UPDATE, filter="none", overlong_share=0.0, mask_truncated=False),
}
RECORDS["async"] = replace(RECORDS["dapo"], anchor="rollout")
"""Specs that equal TRL's settings of these names: one update per rollout, all groups, A = R - mean. async is AsyncGRPOTrainer."""


class InOrder:
    """Batches of consecutive rows, as from TRL's sequential sampler."""

    def __init__(self, rows: Sequence[Any], batch: int) -> None:
        self.rows, self.batch = rows, batch

    def next(self, step: int) -> StepData[Any]:
        return StepData([self.rows[step * self.batch : (step + 1) * self.batch]])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: the order is the table's."""


class Numbers(Silent):
    """A recorder that keeps loss and gradient norm of every step."""

    def __init__(self) -> None:
        self.kept: list[dict[str, float]] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.kept.append(dict(values))


class GivenAnswers:
    """Answers from the job instead of samples, so that both sides train on the same tokens."""

    def __init__(self, answers: Mapping[str, Sequence[Completion]]) -> None:
        self.answers = answers

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        return [list(self.answers[_key(request.prompt)]) for request in requests]


def given_completions(job: Job, text: str, eos_id: int) -> list[Completion]:
    """Return the job's answers to a prompt, with their log-probabilities if the job has them, and 0 else."""
    answers = job["answers"][text]
    logprobs = job["logprobs"][text] if job.get("logprobs") else [[0.0] * len(ids) for ids in answers]
    return [Completion(tuple(ids), tuple(row), ids[-1] == eos_id) for ids, row in zip(answers, logprobs, strict=True)]


class GivenObjective(OnPolicyObjective):
    """Ignore the sampler's log-probabilities, which given answers do not have."""

    def terms(self, model: torch.nn.Module, rows: Sequence[Any]) -> Terms:
        terms = super().terms(model, rows)
        terms.limits.clear()
        return terms


class Sevens:
    """A reward that depends only on the token ids: their sum modulo 7."""

    name = "sevens"

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()

    def score(self, answers: RewardBatch) -> list[float | None]:
        return [float(sum(tokens.response) % 7) for tokens in answers.tokens]

    def used(self) -> dict[str, float]:
        return {}


def _key(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def _trainer(job: Job, model: torch.nn.Module, device: Accelerator) -> Trainer[Any]:
    return Trainer(
        model,
        OptimizerSettings(job["learning_rate"]),
        total_steps=job["steps"],
        micro_batch_tokens=job["budget"],
        accelerator=device,
    )


def sft(job: Job, device: Accelerator) -> tuple[Any, ...]:
    rows = [Example(Tokens(tuple(p), tuple(c))) for p, c in job["rows"]]
    return _trainer(job, Policy(load_policy(job["model"])), device), InOrder(rows, job["batch"]), SupervisedObjective()


def rm(job: Job, device: Accelerator) -> tuple[Any, ...]:
    rows = [RewardPair(Tokens(tuple(p), tuple(c)), Tokens(tuple(p), tuple(r))) for p, c, r in job["rows"]]
    return (
        _trainer(job, Scorer(load_scorer(job["model"])), device),
        InOrder(rows, job["batch"]),
        RewardObjective(0.01),
    )


def dpo(job: Job, device: Accelerator, policy: Policy | None = None) -> tuple[Any, ...]:
    """Prepare DPO; the reference's log-probabilities are computed once, inside the timed run, with the policy that has been loaded."""
    policy = policy or Policy(load_policy(job["model"]))
    tokens = [Tokens(tuple(p), tuple(answer)) for p, *pair in job["rows"] for answer in pair]
    numbers = token_logprobs(policy.eval(), tokens, job["budget"], bf16=job["bf16"])
    answers = [Answer(t, n.logprobs) for t, n in zip(tokens, numbers, strict=True)]
    rows = [PreferencePair(answers[i], answers[i + 1]) for i in range(0, len(answers), 2)]
    return _trainer(job, policy, device), InOrder(rows, job["batch"]), PreferenceObjective(DPO)


def on_policy(job: Job, device: Accelerator) -> tuple[Any, ...]:
    spec, encoder = RECORDS[job["kind"]], load_encoder(job["model"])
    policy, reference = Policy(load_policy(job["model"])), Policy(load_policy(job["model"])).eval()
    ids = [tuple(encoder.prompt(text)) for text in job["rows"]]
    engine: Engine = NativeEngine(policy.lm, encoder.eos_id if job["eos"] else -1, bf16=job["bf16"])
    if job["answers"]:
        prompts = zip(ids, job["rows"], strict=True)
        engine = GivenAnswers({_key(row): given_completions(job, text, encoder.eos_id) for row, text in prompts})
    sampler = GroupSampler(
        [Problem(text, row, {}) for text, row in zip(job["rows"], ids, strict=True)],
        engine,
        encoder,
        [Sevens()],
        {"sevens": 1.0},
        spec,
        GroupSettings(job["batch"], job["samples"], SamplingSettings(job["new_tokens"], 1.0)),
        seed=0,
        accelerator=device,
    )
    objective = (GivenObjective if job["answers"] else OnPolicyObjective)(spec, job["new_tokens"], 1.0)
    source = ExperienceSource(
        spec,
        policy,
        reference,
        sampler,
        objective,
        micro_batch_tokens=job["budget"],
        bf16=job["bf16"],
        measure_kl_every=0,
    )
    return _trainer(job, policy, device), source, objective


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def spent(since: tuple[float, float]) -> dict[str, float]:
    """Return wall time and processor time in seconds. They are equal for one thread on an idle machine."""
    return {"seconds": time.perf_counter() - since[0], "processor": time.process_time() - since[1]}


MAKERS = {"sft": sft, "rm": rm, "dpo": dpo, "grpo": on_policy, "gspo": on_policy, "dapo": on_policy, "async": on_policy}


def run(job: Job) -> Job:
    if job.get("profile"):
        return {"shares": shares(job)}
    AcceleratorState._reset_state(reset_partial_state=True)  # Reset the precision that the last job set.
    device = Accelerator(mixed_precision="bf16" if job["bf16"] else "no", cpu=True)
    numbers = Numbers()
    gc.collect()
    gc.freeze()  # As on TRL's side: a collection in the timed run would walk through all imported modules.
    if job["kind"] == "dpo":
        loaded = Policy(load_policy(job["model"]))
        started = clock()
        trainer, source, objective = dpo(job, device, loaded)
    else:
        trainer, source, objective = MAKERS[job["kind"]](job, device)
        started = clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = LoopSettings(job["kind"], job["steps"], checkpoint_steps=job["steps"] + 1, checkpoint_minutes=1e9)
        fit(trainer, source, objective, settings, numbers, Checkpoints(Path(folder), keep=1))
    return {
        **spent(started),
        "losses": [step["loss"] for step in numbers.kept],
        "grad_norms": [step["grad_norm"] for step in numbers.kept],
        "tokens": trainer.tokens_trained,
    }


GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention"),
    "moving (gather, copy, fill)": (
        "aten::index", "aten::copy_", "aten::cat", "aten::fill_", "aten::gather", "aten::scatter", "aten::embedding", "aten::select",
        "aten::slice", "aten::_to_copy", "aten::to", "aten::clone", "aten::nonzero", "aten::repeat",
    ),
    "optimiser": ("Optimizer.step", "aten::_fused_adam", "aten::_foreach", "aten::addcdiv", "aten::addcmul", "aten::lerp"),
}  # fmt: skip
"""Groups of operators by the start of their names; torch's other operators count as elementwise."""


def shares(job: Job) -> dict[str, float]:
    """Return the seconds of each group of operators from torch's profiler; the rest of the processor time is Python."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        spent_in_all = run({**job, "profile": False})["processor"]
    seconds = dict.fromkeys([*GROUPS, "elementwise and softmax"], 0.0)
    for event in profile.key_averages():
        group = next((g for g, names in GROUPS.items() if event.key.startswith(names)), "elementwise and softmax")
        seconds[group] += event.self_cpu_time_total / 1e6 if event.key.startswith(("aten::", "Optimizer")) else 0.0
    return seconds | {"Python and dispatch": max(0.0, spent_in_all - sum(seconds.values()))}


def main() -> None:
    torch.set_num_threads(1)
    keep_heap()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
