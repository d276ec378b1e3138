"""Records of which reward model a stage reads, if any. The stage `reward_readers` writes them, and the later stages depend on them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from pipelines.runtime.context import RunContext
from posttrain.errors import DataError

MODEL = "models/reward"
FOLDER = Path("runs/reward_readers/artifacts")
EVALUATION = "evaluation.json"
"""Record of the evaluation, in FOLDER."""


def align_record(algorithm: str) -> str:
    """Return the name of an algorithm's record in FOLDER."""
    return f"algorithms/{algorithm}.json"


def reward_inputs(args: Namespace, record: str, *, reads: bool) -> list[str]:
    """Return a stage's record, and the reward model if the stage reads it.

    The records describe the project's params.yaml, so a stage that is given a different file has none.
    """
    own = args.params == Path("params.yaml").resolve()
    return [*([str(FOLDER / record)] if own else []), *([MODEL] if reads else [])]


def check_record(context: RunContext, record: str) -> None:
    """Compare the record with the inputs of the run. Raises DataError if it describes a different reward model.

    DVC would otherwise store the result under a reward model with which it was not made.
    """
    path = FOLDER / record
    if str(path) not in context.inputs:
        return
    recorded = json.loads(path.read_text(encoding="utf-8")).get(MODEL)
    present = context.inputs.get(MODEL)
    if recorded != present:
        raise DataError(
            f"{context.name}: {MODEL} is {_words(present)}, but {path} was written for {_words(recorded)}. DVC would record the wrong"
            " reward model with this result. Type `dvc repro reward_readers`, then repeat the command."
        )


def _words(digest: str | None) -> str:
    """Return a digest or its absence in words."""
    return "not read" if digest is None else f"the model {digest[:12]}"
