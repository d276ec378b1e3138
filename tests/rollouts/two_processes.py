"""Run by two processes at once: python -m tests.rollouts.two_processes URL FOLDER. Each prints what it was answered."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from posttrain.errors import StaleWeightsError
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.vllm import VllmEngine
from posttrain.rollouts.vllm.probe import sequences
from posttrain.rollouts.vllm.server import Server
from tests.models import small

PROMPTS = [(5, 6, 7), (9, 10), (11, 3, 4)]
SETTINGS = SamplingSettings(6, 0.8)


def requests() -> list[Request]:
    return [Request(p, ((0, i), (1, i))) for i, p in enumerate(PROMPTS)]


def main(url: str, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    lm, version = small.language_model(), [0]
    engine = VllmEngine(
        lm, small.EOS, [Server(url)], version=lambda: version[0],
        # what the servers read is the main process's, wherever the others would write
        folder=folder / str(accelerator.process_index), probes=sequences(PROMPTS, 259, 64), accelerator=accelerator,
    )  # fmt: skip
    told = []
    for asked in (requests(), requests()[:1]):
        own = asked[accelerator.process_index :: 2]
        told.append([[c.tokens for c in group] for group in engine.sample(own, SETTINGS)])
        version[0] += 1
    print(json.dumps(told), flush=True)
    with torch.no_grad():
        lm.lm_head.weight.mul_(2)
    # the test has the server load nothing more by now
    sys.stdin.readline()
    version[0] += 1
    try:
        engine.sample(requests(), SETTINGS)
    except StaleWeightsError:
        print("refused", flush=True)
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
