"""Record which algorithms read the reward model, so that a new reward model makes only their align stages stale.

    python -m pipelines.reward_readers

Writes one small file for each section of `algorithms`, and one for the evaluation: the digest of models/reward if it is read there, an
empty record if it is not. The later stages depend on their file instead of on models/reward, because DVC cannot choose a dependency by
algorithm.
"""

from __future__ import annotations

import json
from argparse import Namespace

from pipelines.runtime.run import Run
from pipelines.runtime.step import main
from pipelines.training.reward_record import EVALUATION, MODEL, align_record


def run(run: Run) -> None:
    """Write the records."""
    run.recorder.ready()
    params, digest = run.context.params, run.context.inputs[MODEL]
    readers = {align_record(name): bool(params.reward_model_in(name)) for name in sorted(params.algorithms)}
    readers[EVALUATION] = bool(params.reward_model_in_evaluation())
    for name, reads in readers.items():
        path = run.outputs.artifact(name)
        path.write_text(json.dumps({MODEL: digest} if reads else {}) + "\n", encoding="utf-8")
    run.recorder.summary({"records": len(readers), "readers": sum(readers.values())})


def inputs(args: Namespace) -> list[str]:
    """Return the folder of the reward model."""
    return [MODEL]


if __name__ == "__main__":
    main(run, "reward_readers", params=("algorithms", "rewards", "evaluation.rewards"), inputs=inputs)
