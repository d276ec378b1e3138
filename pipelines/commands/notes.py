"""Lines that `configure` and `plan` print about settings and files that a run would not use; a run with them is no error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from pipelines.commands.first_rows import mixed_forms
from pipelines.commands.forecast import rows_by_table, steps_by_stage, too_long_warmups
from pipelines.commands.model_folders import unknown_layers
from pipelines.config.numbers import repeated_prompts
from pipelines.config.params import Params
from pipelines.config.schema import OnPolicyBudget
from pipelines.data.sources import accepted_files, local_files, unread
from posttrain.environments.parts import Kind
from posttrain.errors import DataError, PosttrainError

COUNTED = 32 * 2**20
"""Bytes of files whose rows `configure` counts: it should answer at once, and a warm-up longer than such a file is rare."""


def notes(params: Params, changes: Sequence[str] | None = None) -> list[str]:
    """Return one line for each thing that would have no effect.

    changes: lines of `configure`, such as "sft.epochs: 1 -> 2"; None for `plan`, which counts all steps and reports warm-ups itself.
    """
    changed = [] if changes is None else [*_without_effect(params, changes), *_too_long(params)]
    return [
        *changed,
        *_unread_files(params),
        *unused_rewards(params),
        *_learned_accuracy(params),
        *mixed_forms(params),
        *_repeated(params),
        *unknown_layers(params),
    ]


def _learned_accuracy(params: Params) -> Iterator[str]:
    """Yield that the models are ranked by a score which training may have raised without better answers."""
    name = params.evaluation.accuracy
    if params.rewards[name].function == "reward_model":
        yield (
            f"warning: evaluation.accuracy = {name} ranks the models by the mean score of the learned reward, which is no share of right"
            " answers and may rise while answers become worse. Name a reward that checks answers, such as answer, if there is one."
        )


def _repeated(params: Params) -> Iterator[str]:
    """Yield the algorithms whose steps draw more prompts than there are problems."""
    rows = params.data.problems.rows
    for name in params.project.algorithms:
        budget = params.budget(name)
        if rows is not None and isinstance(budget, OnPolicyBudget) and budget.prompts_per_step > rows:
            yield f"warning: {repeated_prompts(name, budget.prompts_per_step, rows)}"


def _without_effect(params: Params, changes: Sequence[str]) -> Iterator[str]:
    """Yield changes of the tiny model's shape if a different model is used."""
    shape = [line.partition(":")[0] for line in changes if line.startswith("model.tiny.")]
    if shape and params.model.source != "tiny":
        yield f"warning: {', '.join(shape)}: no effect, because model.source is {params.model.source!r} and not tiny."


def _too_long(params: Params) -> Iterator[str]:
    """Yield the stages that would stop because their warm-up is longer than their run, as `plan` does."""
    counted = {kind: _rows(params, kind) for kind in ("sft", "preferences")}
    for line in too_long_warmups(params, steps_by_stage(params, counted)):
        yield f"warning: {line}"


def _rows(params: Params, kind: Kind) -> int | None:
    """Return a table's rows; None if they are not known, or would be read from files of more than `COUNTED` bytes."""
    try:
        files = [*local_files(getattr(params.data, kind)), *accepted_files(kind)]
        if sum(path.stat().st_size for path in files) > COUNTED:
            return None
        return rows_by_table(params, (kind,))[kind]
    except (PosttrainError, OSError):  # `problems` reports a source that is absent or cannot be read
        return None


def _unread_files(params: Params) -> Iterator[str]:
    """Yield the files of other splits in each table's folders."""
    for kind in get_args(Kind):
        source = getattr(params.data, kind)
        try:
            left = unread(source)
        except DataError:  # `problems` reports a folder that cannot be read
            continue
        if left:
            yield (
                f"note: data.{kind} reads only files of the split {source.wanted_split!r} (data.{kind}.split); not read: {', '.join(left)}."
            )


def unused_rewards(params: Params) -> list[str]:
    """Return one line for each reward that neither training, choice of a checkpoint nor evaluation computes; a run with it is no error."""
    computed = {*params.evaluation.rewards}
    if params.align.best_checkpoint is not None:
        computed.add(params.align.best_checkpoint.reward)
    for name in params.project.algorithms:
        computed.update(params.algorithms[name].rewards or {})
    found = []
    for reward in params.rewards:
        if reward not in computed:
            elsewhere = [name for name, section in params.algorithms.items() if reward in (section.rewards or {})]
            where = (
                f"; {', '.join(elsewhere)} would use it, but project.algorithms does not list {'them' if len(elsewhere) > 1 else 'it'}"
                if elsewhere
                else ""
            )
            found.append(
                f"warning: rewards.{reward} is computed by nothing{where}. To train on it, give it a weight:"
                f" posttrain configure algorithms.NAME.rewards.{reward}=1.0. To measure it, add it to evaluation.rewards."
            )
    return found
