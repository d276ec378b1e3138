"""Define the sides of benchmarks/rollouts.py: each samples a case's answers and counts their tokens.

As a program, it runs vLLM in vLLM's own environment.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Side = Callable[[], int]
"""Samples once and returns the number of sampled tokens."""


@dataclass(frozen=True)
class Case:
    """prompts x samples answers with at most new_tokens tokens; with an end of sequence (eos >= 0) they may be shorter."""

    prompts: list[list[int]]
    samples: int
    new_tokens: int
    bf16: bool = False
    eos: int = -1
    rows: int = 512


def native(model: Any, case: Case) -> Side:
    from posttrain.rollouts.engine import Request, SamplingSettings
    from posttrain.rollouts.native import NativeEngine

    engine = NativeEngine(model, case.eos, max_rows=case.rows, bf16=case.bf16)
    seeds = [tuple((0, i, j) for j in range(case.samples)) for i in range(len(case.prompts))]
    requests = [Request(tuple(p), s) for p, s in zip(case.prompts, seeds, strict=True)]
    settings = SamplingSettings(case.new_tokens, 1.0)
    return lambda: sum(len(c.tokens) for group in engine.sample(requests, settings) for c in group)


def generate(model: Any, case: Case) -> Side:
    """Return the side of `generate` with its dynamic cache and the same sampling settings, all answers in one batch."""
    import torch

    prompts = torch.tensor(case.prompts)
    options = {
        "do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": case.new_tokens, "pad_token_id": 0,
        "num_return_sequences": case.samples, "attention_mask": torch.ones_like(prompts),
    }  # fmt: skip
    options |= {"eos_token_id": case.eos} if case.eos >= 0 else {"min_new_tokens": case.new_tokens}

    def run() -> int:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case.bf16):
            answers = model.generate(prompts, **options)[:, prompts.shape[1] :]
        ended = (answers == case.eos).int().cumsum(1)
        return int((ended - (answers == case.eos).int() == 0).sum())

    return run


def continuous(model: Any, case: Case) -> Side:
    """Return the side of transformers' continuous batching, with the log-probabilities that an RL trainer needs."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    longest = max(map(len, case.prompts)) + case.new_tokens
    page = 64
    rows = min(case.rows, len(case.prompts) * case.samples)
    budget = ContinuousBatchingConfig(
        page_size=page, num_blocks=rows * -(-longest // page), max_batch_tokens=2048, return_logprobs=True, seed=0
    )
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=case.new_tokens, eos_token_id=case.eos,
        pad_token_id=0, num_return_sequences=case.samples,
    )  # fmt: skip

    def run() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.bf16):
            answers = model.generate_batch(
                case.prompts, config, continuous_batching_config=budget, progress_bar=False, warmup=False
            )
        if errors := {answer.error for answer in answers.values() if answer.error}:
            raise RuntimeError(f"generate_batch: {errors}")
        return sum(len(answer.generated_tokens) for answer in answers.values())

    return run


class Apart:
    """A side in a fork of this process. The fork keeps the memory settings of this moment; later settings do not affect it."""

    def __init__(self, side: Side) -> None:
        context = multiprocessing.get_context("fork")
        self.here, there = context.Pipe()
        self.child = context.Process(target=_answer, args=(there, side), daemon=True)
        self.child.start()
        there.close()

    def rate(self) -> float:
        """Return the tokens per second of the child's processor time."""
        self.here.send("again")
        tokens, seconds = self.here.recv()
        return float(tokens / seconds)

    def close(self) -> None:
        self.here.send(None)  # Closing is not sufficient: later forks hold this end as well.
        self.child.join()


def _answer(asked: Any, side: Side) -> None:
    while asked.recv():
        started = time.process_time()
        tokens = side()
        asked.send((tokens, time.process_time() - started))


class Vllm:
    """vLLM's CPU build in a child process with its own environment; the child samples once per input line."""

    def __init__(self, python: str, folder: Path, case: Case) -> None:
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
        environment.pop("PYTHONPATH", None)
        self.child = subprocess.Popen(
            [python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
        )
        self._ask({"folder": str(folder), **asdict(case)})

    def _ask(self, message: Any) -> dict[str, Any]:
        assert self.child.stdin
        assert self.child.stdout
        self.child.stdin.write(json.dumps(message) + "\n")
        self.child.stdin.flush()
        for line in self.child.stdout:
            if line.startswith("{"):
                said: dict[str, Any] = json.loads(line)
                return said
        raise RuntimeError(f"vLLM ended with status {self.child.wait()}")

    def rate(self) -> float:
        """Return the tokens per second of the child's processor time."""
        said = self._ask("again")
        return float(said["tokens"] / said["seconds"])

    def close(self) -> None:
        assert self.child.stdin
        self.child.stdin.close()
        self.child.wait()


def serve() -> None:
    """Run the child: the first line is the case, each further line requests a run."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    case = json.loads(sys.stdin.readline())
    longest = max(map(len, case["prompts"])) + case["new_tokens"]
    llm = LLM(
        case["folder"], dtype="bfloat16" if case["bf16"] else "float32", max_model_len=longest, max_num_seqs=case["rows"],
        enforce_eager=True, logprobs_mode="processed_logprobs", disable_log_stats=True,
    )  # fmt: skip
    asked = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
    params = SamplingParams(
        n=case["samples"], temperature=1.0, max_tokens=case["new_tokens"], logprobs=0, detokenize=False,
        ignore_eos=case["eos"] < 0, stop_token_ids=[case["eos"]] if case["eos"] >= 0 else None,
    )  # fmt: skip
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        started = time.process_time()
        answers = llm.generate(asked, params, use_tqdm=False)
        tokens = sum(len(output.token_ids) for answer in answers for output in answer.outputs)
        print(json.dumps({"tokens": tokens, "seconds": time.process_time() - started}), flush=True)


if __name__ == "__main__":
    serve()
