"""Refuse a mapping of columns that would put an answer into its prompt, or train rows and tokens that the file excludes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.config.data_schema import GradedAnswers, TableSource
from pipelines.data.conversation_rows import Sourced
from pipelines.data.files import Record
from pipelines.data.formats import TRAINED
from pipelines.data.paths import is_missing, paths_of, value_at
from posttrain.data.messages import MARKS, ROLES, WEIGHTS
from posttrain.errors import ConfigError, DataError

_ANSWERS = ("completion", "chosen", "rejected", "answer", "messages")
_EXCLUDED = ("0", "0.0", "false", "no")


def refuse_leak(kind: Sourced, source: TableSource, wanted: Mapping[str, str], records: Sequence[Record]) -> None:
    """Raise ConfigError if a prompt reads its answer, a part of it, or a place that holds it, without an expression that parts them.

    Turns of others than the assistant are no answer: `{prompt: chosen.0.content, chosen: chosen}` reads the question of a conversation.
    """
    if "prompt" not in wanted or "prompt" in (source.extract or {}):
        return
    asked = sorted(set(paths_of(wanted["prompt"])))
    present = {name for record in records for name in record}
    answers = [(name, path) for name in _ANSWERS if name in wanted for path in paths_of(wanted[name])]
    answers += [("a graded answer", path) for path in _graded_paths(source.graded, asked)] if source.graded else []
    answers += [("a preferred answer", path) for path in source.preferred.answers.values()] if source.preferred else []
    for name, path in answers:
        parts = path.split(".")
        # a column's own name may contain dots; then only this name reads it
        around = {path} if path in present else {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        for place in asked:
            inside = place.startswith(f"{path}.") and place not in present
            if place in around or (inside and _reads_answer(records, path, place.removeprefix(f"{path}."))):
                raise ConfigError(
                    f"data.{kind}.columns: prompt and {name} are both read from {place!r}, so the answer would be in the prompt,"
                    " whole or in part. Map other columns; for a whole conversation, map `messages` (sft) or leave `prompt` out"
                    " (preferences)."
                )


def _graded_paths(graded: GradedAnswers, asked: Iterable[str]) -> list[str]:
    """Return the paths of the answers' texts; of one list of answers, the list and the texts at the indices that `asked` reads."""
    if graded.answers is None:
        return [f"{column}.{graded.text}".rstrip(".") for column in graded.columns or ()]
    below = [path.removeprefix(f"{graded.answers}.") for path in asked if path.startswith(f"{graded.answers}.")]
    indices = sorted({path.partition(".")[0] for path in below})
    return [graded.answers, *(f"{graded.answers}.{index}.{graded.text}".rstrip(".") for index in indices)]


def _reads_answer(records: Sequence[Record], path: str, inner: str) -> bool:
    """Return True if a record's value at `path` holds an answer at `inner`: anything but a turn of a different role in a conversation.

    A list of mappings without roles is one of graded answers, whose texts have their own paths.
    """
    index = inner.partition(".")[0]
    for record in records:
        turns = value_at(record, path)
        if is_missing(value_at(turns, inner)) or isinstance(turns, str):
            continue
        turn: Any = value_at(turns, index)
        if not isinstance(turns, list) or not isinstance(turn, Mapping):
            return True
        role = turn.get("role", turn.get("from"))
        if isinstance(role, str) and ROLES.get(role.strip().lower()) == "assistant":
            return True
    return False


def refuse_exclusion(
    kind: Sourced, where: str, unread: Iterable[str], records: Sequence[Record], mapped: bool = False
) -> None:
    """Raise DataError if a column that is not read, such as `loss_mask`, excludes rows or tokens from training.

    Args:
        mapped: a column could be mapped to the weight of rows.
    """
    for name in unread if kind in TRAINED else ():
        if name.lower() not in (*WEIGHTS, *MARKS):
            continue
        row = next((i for i, record in enumerate(records) if _excludes(record.get(name))), None)
        if row is not None:
            several = isinstance(records[row][name], list)
            remedy = f"Map it, data.sft.columns: {{weight: {name}}}" if mapped and not several else "Leave them out"
            raise DataError(
                f"{where}: the column {name!r} is not read, and excludes rows or tokens from training (first: row {row}), so they would be"
                f" trained. {remedy}, or remove or rename the column if it means something else."
            )


def _excludes(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_excludes, value))
    return isinstance(value, bool | int | float | str) and str(value).strip().lower() in _EXCLUDED
