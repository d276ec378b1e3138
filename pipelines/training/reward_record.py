"""Records of the reward model and the own code that a stage reads. The stage `reward_readers` writes them; later stages depend on them."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.runtime.context import RunContext
from posttrain.errors import DataError

MODEL = "models/reward"
FOLDER = Path("runs/reward_readers/artifacts")
CODE = "code"
"""Name of the digests of own code in a record; absent if there is none."""
EVALUATION = "evaluation.json"
"""Record of the evaluation, in FOLDER."""


def align_record(algorithm: str) -> str:
    """Return the name of an algorithm's record in FOLDER."""
    return f"algorithms/{algorithm}.json"


def reward_inputs(args: Namespace, record: str, *, reads: bool, code: Sequence[str] = ()) -> list[str]:
    """Return a stage's record, the reward model if the stage reads it, and the files of own code that it imports.

    The records describe the project's params.yaml, so a stage that is given a different file has none.
    """
    own = args.params == Path("params.yaml").resolve()
    return [*([str(FOLDER / record)] if own else []), *([MODEL] if reads else []), *code]


def record_of(inputs: Mapping[str, str], *, reads: bool, code: Sequence[str]) -> dict[str, Any]:
    """Return the record of a stage: the digests of the reward model, if it is read, and of the files of own code."""
    return ({MODEL: inputs[MODEL]} if reads else {}) | ({CODE: {path: inputs[path] for path in code}} if code else {})


def check_record(context: RunContext, record: str) -> None:
    """Compare the record with the inputs of the run. Raises DataError if it describes a different reward model or different own code.

    DVC would otherwise store the result under a reward model with which it was not made.
    """
    path = FOLDER / record
    if str(path) not in context.inputs:
        return
    written = json.loads(path.read_text(encoding="utf-8"))
    _check_code(context, written.get(CODE, {}), path)
    recorded = written.get(MODEL)
    present = context.inputs.get(MODEL)
    if recorded != present:
        raise DataError(
            f"{context.name}: {MODEL} is {_words(present)}, but {path} was written for {_words(recorded)}. DVC would record the wrong"
            " reward model with this result. Type `dvc repro reward_readers`, then repeat the command."
        )


def _check_code(context: RunContext, recorded: Mapping[str, str], path: Path) -> None:
    """Raise DataError if own code is not as it was when the record was written. No other input is a Python file."""
    present = {file: digest for file, digest in context.inputs.items() if file.endswith(".py")}
    changed = sorted(file for file in {*recorded, *present} if recorded.get(file) != present.get(file))
    if changed:
        raise DataError(
            f"{context.name}: {changed[0]} is not the file that {path} was written for. DVC would record this result under the old code."
            " Type `dvc repro reward_readers`, then repeat the command."
        )


def _words(digest: str | None) -> str:
    """Return a digest or its absence in words."""
    return "not read" if digest is None else f"the model {digest[:12]}"
