"""TRL's AsyncGRPOTrainer on given answers, without vLLM: its planner, prefix-tree packing, loss, optimiser and loop are unchanged.

TRL has one attention for it, FlashAttention 3 from the Hugging Face hub, which has no build for CPUs. `varlen_cpu` takes that
kernel's place, with its signature. The worker hands out the job's answers with their log-probabilities; weights are sent nowhere.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
from torch import Tensor
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
from trl.trainer import utils
from varlen_cpu import varlen_attention

Job = dict[str, Any]


class GivenAnswers:
    """A rollout worker whose answers exist before training begins; see TRL's RolloutWorkerProtocol."""

    def __init__(self, samples: list[RolloutSample]) -> None:
        self.samples = samples
        self.rollout_buffer: queue.Queue[RolloutSample] = queue.Queue()
        self.metrics_queue: queue.Queue[Job] = queue.Queue()

    def start(self) -> None:
        for sample in self.samples:
            self.rollout_buffer.put(sample)

    def stop(self) -> None:
        """Do nothing: no process runs."""

    def update_model_version(self, model_version: int) -> None:
        """Do nothing: the answers are given."""

    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("the trainer asks for more answers than the job has")


class NoTransfer:
    """A weight transfer that sends nothing; see TRL's WeightTransferProtocol."""

    def init_weight_transfer(self) -> None: ...
    def pause(self) -> None: ...
    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None: ...
    def resume(self) -> None: ...
    def destroy(self) -> None: ...


def as_on_a_gpu() -> None:
    """Let the trainer run on a CPU as it does on a GPU: with attention by offsets, and with a head that scores only the answers."""
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=varlen_attention)
    utils._use_triton = lambda device: True  # Only of the choice of positions; the head's kernel asks for itself.
    async_grpo_trainer.get_peak_flops_per_device = lambda accelerator, dtype: None  # CUDA's name of the device


def async_grpo(job: Job, settings: Job, tokenizer: Any) -> AsyncGRPOTrainer:
    """Prepare a trainer whose loss is a mean over the tokens of an update: one micro-batch, or several of equal numbers of tokens."""
    as_on_a_gpu()
    args = AsyncGRPOConfig(
        **settings, epsilon=0.2, epsilon_high=0.28, num_generations=job["samples"], max_completion_length=job["new_tokens"],
        token_budget=-1, max_staleness=job["steps"] + 2, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    samples = list(_samples(job, tokenizer)) + [_filler()] * args.per_device_train_batch_size
    return AsyncGRPOTrainer(
        job["model"], args=args, train_dataset=datasets.Dataset.from_dict({"prompt": job["rows"]}),
        processing_class=tokenizer, rollout_worker=GivenAnswers(samples), weight_transfer=NoTransfer(),
    )  # fmt: skip


def _samples(job: Job, tokenizer: Any) -> Iterator[RolloutSample]:
    for group, text in enumerate(job["rows"]):
        prompt = tokenizer(text)["input_ids"]
        rewards = np.array([sum(ids) % 7 for ids in job["answers"][text]], dtype=np.float64)
        for answer, logprobs, advantage in zip(
            job["answers"][text], job["logprobs"][text], rewards - rewards.mean(), strict=True
        ):
            yield _sample(prompt, answer, logprobs, float(advantage), group)


def _sample(prompt: list[int], answer: list[int], logprobs: list[float], advantage: float, group: int) -> RolloutSample:
    before = [0] * len(prompt)
    return RolloutSample(
        prompt=[], completion=[], input_ids=np.array([*prompt, *answer]), completion_mask=np.array([*before, *(1 for _ in answer)]),
        old_log_probs=np.array([*before, *logprobs], dtype=np.float32), advantage=advantage, model_version=1, group_id=group, metrics={},
    )  # fmt: skip


def _filler() -> RolloutSample:
    """Return an answer of one token: the data loader fetches one micro-batch more than it trains."""
    return _sample([5], [5], [0.0], 0.0, -1)
