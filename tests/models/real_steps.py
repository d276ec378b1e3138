"""Four steps of supervised fine-tuning on a model folder with an adapter and a checkpoint after each step, in its own process.

python -m tests.models.real_steps FOLDER CHECKPOINTS WEIGHTS [STEP]: with STEP the process kills itself after that step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from posttrain.data.batches import EpochOrder
from posttrain.data.tokens import table_tokens
from posttrain.environments import word_problems
from posttrain.models.folders import load_encoder, load_policy
from posttrain.models.lora import Adapter
from posttrain.models.policy import Policy
from posttrain.settings import LoraSettings, OptimizerSettings
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.loop import LoopSettings, fit
from posttrain.training.supervised import EpochSource, Example, SupervisedObjective
from posttrain.training.trainer import Trainer
from tests.training.runs import Memory


class Deadly(Memory):
    """A recorder that kills the process when it records a step."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        super().metrics(step, values)


def main(folder: str, checkpoints: str, weights: str, kill_at: str = "0") -> None:
    torch.set_num_threads(1)
    policy = Policy(load_policy(folder))
    torch.manual_seed(0)
    Adapter(policy.lm, LoraSettings(rank=4, alpha=8))
    rows = [Example(t) for t in table_tokens(load_encoder(folder), word_problems.rows("sft", 8, 0), "completion")]
    settings = OptimizerSettings(1e-3, schedule="cosine", warmup_steps=1)
    trainer: Trainer[Any] = Trainer(policy, settings, total_steps=4, micro_batch_tokens=512, bf16=True)
    source: Any = EpochSource(rows, EpochOrder(len(rows), 2, 1, 0))
    recorder, loop = Deadly(kill_at=int(kill_at) or None), LoopSettings("sft", 4, checkpoint_steps=1)
    fit(trainer, source, SupervisedObjective(), loop, recorder, Checkpoints(Path(checkpoints)))
    torch.save(trainer.weights(), weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
