"""Add the demonstrations of `data.experts` to the sft table, marked, so that CHORD trains on them and supervised fine-tuning does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.config.data_schema import DataParams, ExpertSource, TableSource
from pipelines.config.explain import validated
from pipelines.data.pairs import Changes
from pipelines.data.sources import alike, configured_rows, is_generator, numbered
from pipelines.data.tables import EXPERT, WEIGHT, Row
from posttrain.errors import ConfigError, DataError


def with_experts(rows: list[Row], data: DataParams, changes: Changes | None = None) -> list[Row]:
    """Return the rows of the sft table, followed by the marked demonstrations of `data.experts`; without it, the rows as they are.

    Raises:
        ConfigError: an option has no effect on the source.
        DataError: prompts or answers have a different form from those of the sft table.
    """
    if data.experts is None:
        return rows
    try:
        found = configured_rows("sft", expert_data(data, data.experts), changes)
    except (ConfigError, DataError) as error:  # the reader knows the table sft only
        raise type(error)(in_experts(str(error))) from None
    if not found:
        raise DataError("data.experts: the source has no rows, so there is nothing to demonstrate")
    made = alike("sft", rows, found, Path("data.experts"))
    own = [{name: value for name, value in row.items() if name != WEIGHT} | {EXPERT: True} for row in made]
    return numbered([*(row | {EXPERT: False} for row in rows), *own])


def in_experts(message: str) -> str:
    """Return a message about the source of the sft table as one about the experts' source."""
    return message.replace("data.sft", "data.experts")


def expert_data(data: DataParams, source: ExpertSource) -> DataParams:
    """Return `data` with the experts as its sft table, and the generator's options changed by theirs.

    Raises ConfigError if a source that is no generator has options.
    """
    given = source.model_dump(exclude={"options"})
    changed: dict[str, Any] = {"sft": TableSource(**given)}
    name = source.source
    if not source.options:
        return data.model_copy(update=changed)
    if not isinstance(name, str) or not is_generator(name):
        raise ConfigError(f"data.experts.options: has no effect, because {name!r} is no generator. Remove it.")
    section = getattr(data, name, None) if name in ("arithmetic", "stories") else None
    if section is not None:
        values = section.model_dump() | source.options
        # a stage's section is a proxy that tracks reads, whose class attribute is that of the section
        changed[name] = validated(section.__class__, values, ("data", "experts", "options"))
    else:
        changed["environments"] = data.environments | {name: data.environments.get(name, {}) | source.options}
    return data.model_copy(update=changed)
