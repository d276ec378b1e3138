"""Run by two processes at once: python -m tests.rollouts.two_processes URL FOLDER. Each prints the answers of its steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from posttrain.algorithms.grpo import GRPO
from posttrain.errors import StaleWeightsError
from posttrain.rollouts.vllm import VllmEngine
from posttrain.rollouts.vllm.probe import sequences
from posttrain.rollouts.vllm.server import VllmServer
from tests.models import small
from tests.training.runs import sampler

PROMPTS = (3, 1)
"""Of each step. In the second one a process has nothing to ask for."""


def steps(engine: VllmEngine, version: list[int], accelerator: Accelerator) -> list[list[tuple[int, ...]]]:
    """Return the answers of all processes, step by step, with an update between steps."""
    told = []
    for prompts in PROMPTS:
        drawn = sampler(GRPO, engine.lm, prompts=prompts, samples=2, accelerator=accelerator)
        drawn.engine = engine
        told.append([answer.completion.tokens for answer in drawn.sample()[0]])
        version[0] += 1
    return told


def new_engine(url: str, folder: Path, version: list[int], accelerator: Accelerator) -> VllmEngine:
    return VllmEngine(
        small.language_model(), small.EOS, [VllmServer(url)], version=lambda: version[0], folder=folder,
        probes=sequences([(5, 6, 7)], 259, 64), accelerator=accelerator,
    )  # fmt: skip


def main(url: str, folder: Path) -> None:
    accelerator, version = Accelerator(cpu=True), [0]
    # what the servers read is the main process's, wherever the others would write
    engine = new_engine(url, folder / str(accelerator.process_index), version, accelerator)
    print(json.dumps(steps(engine, version, accelerator)), flush=True)
    with torch.no_grad():
        engine.lm.lm_head.weight.mul_(2)
    # the test has the server load nothing more by now
    sys.stdin.readline()
    try:
        steps(engine, version, accelerator)
    except StaleWeightsError:
        print("refused", flush=True)
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
