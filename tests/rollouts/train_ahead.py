"""Train a tiny policy one step off with a sampling process, and print that process's id and a digest of weights and metrics.

python -m tests.rollouts.train_ahead FOLDER STEP     SIGKILL right after STEP (0: never); a second start resumes from FOLDER
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from posttrain.algorithms.grpo import GRPO
from posttrain.rollouts.ahead import Ahead, Background
from posttrain.rollouts.process import ProcessEngine
from posttrain.training.checkpoint import Checkpoints
from posttrain.training.loop import LoopSettings, fit
from posttrain.training.trainer import Trainer
from tests.models import small
from tests.training.runs import OPTIMIZER, Memory, source_of

STEPS = 8


class Notes(Memory):
    """Keeps the metrics of a step in a file, as a journal does, and kills the process at the wanted step."""

    def __init__(self, folder: Path, engine: ProcessEngine, kill_at: int) -> None:
        super().__init__()
        self.path, self.engine, self.last = folder / "notes.json", engine, kill_at
        if self.path.exists():
            self.steps = {int(step): values for step, values in json.loads(self.path.read_text()).items()}

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        super().metrics(step, values)
        self.path.write_text(json.dumps(self.steps))
        if step == self.last:
            assert self.engine.process is not None
            print(self.engine.process.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, kill_at: int) -> None:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(os.getpid())
    policy = small.policy()
    engine = ProcessEngine(policy.lm, small.EOS, slots=1)
    source, objective = source_of(replace(GRPO, anchor="rollout"), policy, ahead=Ahead(Background(engine), 1, STEPS))
    objective.staleness = 1
    trainer: Trainer[Any] = Trainer(policy, OPTIMIZER, total_steps=STEPS, micro_batch_tokens=60)
    notes = Notes(folder, engine, kill_at)
    settings = LoopSettings("ahead", STEPS, checkpoint_steps=2)
    fit(trainer, source, objective, settings, notes, Checkpoints(folder / "checkpoints"))
    assert engine.process is not None
    print(engine.process.pid)
    engine.close()
    digest = hashlib.sha256(json.dumps(notes.steps, sort_keys=True).encode())
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
