"""Run TRL's side of benchmarks/training.py in its own environment (benchmarks/peers/setup.sh creates it), without posttrain.

Reads one job per line from standard input and prints one line of JSON per job; benchmarks/training.py is the caller.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

Job = dict[str, Any]
GRPO_SETTINGS: dict[str, Job] = {
    "grpo": {"loss_type": "grpo", "beta": 0.04},
    "gspo": {"loss_type": "grpo", "beta": 0.0, "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "dapo": {"loss_type": "dapo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28},
}  # fmt: skip


class Numbers(TrainerCallback):
    """Loss and gradient norm of every step, as TRL logs them."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Job | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and "grad_norm" in logs:
            self.losses.append(logs["loss"])
            self.grad_norms.append(logs["grad_norm"])


def common(job: Job, folder: str) -> Job:
    return {
        "output_dir": folder, "use_cpu": True, "bf16": job["bf16"], "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "max_steps": job["steps"], "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0, "adam_beta2": 0.999, "seed": 0,
        "dataloader_num_workers": 0, "dataloader_pin_memory": False,
    }  # fmt: skip


def batches(job: Job, rows: int) -> Job:
    return {"per_device_train_batch_size": job["micro_rows"], "gradient_accumulation_steps": rows // job["micro_rows"]}


def sft(job: Job, folder: str, tokenizer: Any) -> Any:
    rows = [{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, c in job["rows"]]
    args = SFTConfig(
        **common(job, folder), **batches(job, job["batch"]), max_length=None, train_sampling_strategy="sequential"
    )
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return SFTTrainer(model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)


def rm(job: Job, folder: str, tokenizer: Any) -> Any:
    rows = [{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in job["rows"]]
    args = RewardConfig(
        **common(job, folder), **batches(job, job["batch"]), max_length=None, train_sampling_strategy="sequential",
        center_rewards_coefficient=0.01,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    return RewardTrainer(model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)


def dpo(job: Job, folder: str, tokenizer: Any) -> Any:
    rows = [{"prompt": tokenizer.decode(p), "chosen": "", "rejected": ""} for p, _, _ in job["rows"]]
    args = DPOConfig(
        **common(job, folder), **batches(job, job["batch"]), max_length=None, train_sampling_strategy="sequential", beta=0.1,
        precompute_ref_log_probs=job.get("precompute", False),
    )  # fmt: skip

    class Tokenized(DPOTrainer):  # type: ignore[misc]
        """Uses the token ids directly: the parent class would tokenize text again."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            columns = ("prompt_ids", "chosen_ids", "rejected_ids")
            return datasets.Dataset.from_list([dict(zip(columns, row, strict=True)) for row in job["rows"]])

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return Tokenized(model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)


def grpo(job: Job, folder: str, tokenizer: Any) -> Any:
    rows = [{"prompt": text} for text in job["rows"]]
    generation: Job = {} if job["eos"] else {"min_new_tokens": job["new_tokens"]}
    args = GRPOConfig(
        **common(job, folder), **batches(job, job["batch"] * job["samples"]), **GRPO_SETTINGS[job["kind"]],
        scale_rewards=False, num_generations=job["samples"], max_completion_length=job["new_tokens"], temperature=1.0,
        shuffle_dataset=False, generation_kwargs=generation,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)

    def rollout(prompts: list[str], trainer: Any) -> Job:
        """A prompt stands there once for each of its answers."""
        left = {text: list(answers) for text, answers in job["answers"].items()}
        answers = [left[text].pop(0) for text in prompts]
        ids = [tokenizer(text)["input_ids"] for text in prompts]
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": [[0.0] * len(a) for a in answers]}

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    return GRPOTrainer(
        model, reward_funcs=reward, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        rollout_func=rollout if job["answers"] else None,
    )  # fmt: skip


def async_grpo(job: Job, folder: str, tokenizer: Any) -> Any:
    from trl_async import async_grpo as prepared

    return prepared(job, common(job, folder) | batches(job, job["batch"] * job["samples"]), tokenizer)


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def spent(since: tuple[float, float]) -> dict[str, float]:
    """Return wall time and processor time in seconds. They are equal for one thread on an idle machine."""
    return {"seconds": time.perf_counter() - since[0], "processor": time.process_time() - since[1]}


MAKERS = {"sft": sft, "rm": rm, "dpo": dpo, "grpo": grpo, "gspo": grpo, "dapo": grpo, "async": async_grpo}


def run(job: Job) -> Job:
    if job["kind"] == "versions":
        return {package.__name__: package.__version__ for package in (trl, torch, transformers)}
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    numbers = Numbers()
    gc.collect()
    gc.freeze()  # Training begins with a full collection, which here would walk through all imported modules in the timed run.
    with tempfile.TemporaryDirectory() as folder:
        started = clock()
        trainer = MAKERS[job["kind"]](job, folder, tokenizer)
        if not job.get("precompute"):  # DPO's trainer computes the reference in its constructor.
            started = clock()
        trainer.add_callback(numbers)
        trainer.train()
        seconds = spent(started)
    trained = trainer.state.num_input_tokens_seen if job["kind"] in GRPO_SETTINGS else 0
    return {**seconds, "losses": numbers.losses, "grad_norms": numbers.grad_norms, "tokens": trained}


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Output of the libraries must not mix with the results.
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
