"""Return the first row of a table as far as it is known before a run, and compare the forms of the tables."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.config.params import Params
from pipelines.data.column_mapping import canonical_rows
from pipelines.data.files import read_file
from pipelines.data.sources import HUB, is_generator, local_files, table_rows
from pipelines.data.tables import Row
from posttrain.environments.base import built_in
from posttrain.environments.parts import Kind
from posttrain.errors import PosttrainError

ROWS = 20
"""Rows of a local file that are looked into."""


def first_row(params: Params, kind: Kind) -> Row | None:
    """Return a table's first row; None for a hub data set, a user's module, or a source that cannot be read (which others report)."""
    source = getattr(params.data, kind)
    if any(name.startswith(HUB) for name in source.names):
        return None
    try:
        if is_generator(source.source):
            if source.source not in built_in():
                return None
            few = params.data.model_copy(update={kind: source.model_copy(update={"rows": 1})})
            rows = table_rows(kind, few)
        else:
            records = read_file(local_files(source)[0])[:ROWS]
            rows = canonical_rows(kind, source.model_copy(update={"rows": None}), records)
    except (PosttrainError, IndexError):
        return None
    return rows[0] if rows else None


def mixed_forms(params: Params) -> Iterator[str]:
    """Yield the tables of prompts whose form is not that of the demonstrations: such a model is asked differently than it was taught."""
    taught = first_row(params, "sft")
    if taught is None or "completion" not in taught:
        return
    chat = not isinstance(taught["completion"], str)
    asked: dict[Kind, bool] = {}
    for kind in ("problems", "evaluation"):
        row = first_row(params, kind)
        if row is not None and "prompt" in row:
            asked[kind] = not isinstance(row["prompt"], str)
    different = [f"data.{kind}" for kind, form in asked.items() if form != chat]
    if not different:
        return
    names, verb = " and ".join(different), "have" if len(different) > 1 else "has"
    if chat:
        remedy = " ".join(f"'{name}.template=\"{{prompt}}\"'" for name in different)
        yield (
            f"warning: data.sft teaches conversations, but {names} {verb} plain prompts, which go without the chat template: the model is"
            f" asked in a form that it was not taught. To make turns of them: posttrain configure {remedy}"
        )
    else:
        yield (
            f"warning: data.sft teaches plain text, but {names} {verb} conversations: the model is asked in a form that it was not taught."
            " To make turns of the demonstrations: posttrain configure 'data.sft.template=\"{prompt}\"'"
        )
