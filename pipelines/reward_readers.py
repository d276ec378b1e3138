"""Record which algorithms read the reward model and which own code they import, so that a change makes only their align stages stale.

    python -m pipelines.reward_readers

Writes one small file for each section of `algorithms`, and one for the evaluation: the digest of models/reward if it is read there, and
the digests of the user's modules that its rewards and environments import; empty without both. The later stages depend on their file
instead, because DVC cannot choose a dependency by algorithm. Own code must be in the folder `project.code`.
"""

from __future__ import annotations

import json
from argparse import Namespace

from pipelines.config.own_code import algorithm_code, evaluation_code, require_covered, used_code
from pipelines.config.params import load_params
from pipelines.runtime.run import Run
from pipelines.runtime.step import main
from pipelines.training.reward_record import EVALUATION, MODEL, align_record, record_of

READ = ("algorithms", "rewards", "evaluation", "align", "project.code")


def run(run: Run) -> None:
    """Write the records."""
    run.recorder.ready()
    params, digests = run.context.params, run.context.inputs
    require_covered(params, used_code(params))
    readers = {align_record(name): bool(params.reward_model_in(name)) for name in sorted(params.algorithms)}
    readers[EVALUATION] = bool(params.reward_model_in_evaluation())
    code = {align_record(name): algorithm_code(params, name) for name in sorted(params.algorithms)}
    code[EVALUATION] = evaluation_code(params)
    for name, reads in readers.items():
        record = record_of(digests, reads=reads, code=code[name])
        run.outputs.artifact(name).write_text(json.dumps(record) + "\n", encoding="utf-8")
    run.recorder.summary({"records": len(readers), "readers": sum(readers.values())})


def inputs(args: Namespace) -> list[str]:
    """Return the folder of the reward model, and the files of own code."""
    return [MODEL, *used_code(load_params(args.params))]


if __name__ == "__main__":
    main(run, "reward_readers", params=READ, inputs=inputs)
