"""Turn rows into conversations: whole ones are parted into prompt and completion, plain ones get a system message or a template."""

from __future__ import annotations

from typing import Any, Literal

from pipelines.config.data_schema import TableSource
from pipelines.data.compact import compact
from pipelines.data.messages import canonical_messages, canonical_tools, from_json
from pipelines.data.pairs import Changes, prompt_once, with_prompt
from pipelines.data.tables import TEXT, TOOLS, Row, is_messages
from pipelines.data.tool_results import MOVED, NULLS, UNASKED, in_order_of_calls, null_arguments, unasked
from posttrain.data.messages import INSTRUCTING, ROLES, parted, refuse_repeated_texts, require_whole_weights
from posttrain.environments.parts import Kind
from posttrain.errors import ConfigError, DataError

Sourced = Kind | Literal["labelled"]
"""Tables with a section under `data`."""
_WHOLE = "messages"
IGNORED_WEIGHTS = "turns with a weight above 0 that are not trained: only answers of the assistant are"
"""How the validation page counts marks such as `train: true` at a user's turn or in a prompt."""

REPEATED_TEXTS = "answers whose text begins with the whole prompt, which is kept"


def chat_rows(kind: Sourced, rows: list[Row], source: TableSource, where: str, changes: Changes) -> list[Row]:
    """Return the rows with chat messages in the canonical form; the list is changed, so that old and new rows are not held together.

    Raises DataError naming the row if it has no such form.
    """
    answers = [name for name in TEXT[kind] if name != "prompt"]
    if answers and all(name in row for row in rows for name in TEXT[kind]):
        changes[REPEATED_TEXTS] += refuse_repeated_texts(rows, answers, where)
    for i, row in enumerate(rows):
        place = f"{where}, row {row['id']}"
        read = {name: from_json(row[name]) for name in (*TEXT[kind], _WHOLE) if name in row}
        changes["conversations read from text that is JSON"] += any(
            isinstance(row[n], str) and isinstance(read[n], list) for n in read
        )
        row |= {name: _read(value, place, changes) for name, value in read.items()}
        if TOOLS in row:
            row[TOOLS] = canonical_tools(row[TOOLS], place)
        if kind in ("sft", "labelled") and _WHOLE in row:
            row = _parted(row, place, changes)
        shares = kind == "preferences" and row.get("prompt") is None  # the turns that both answers begin with
        if kind == "preferences":
            row = with_prompt(row, place, changes)
        elif "completion" in TEXT[kind]:
            row = prompt_once(row, ("completion",), place, changes)
        for name in answers if kind != "sft" else ():
            require_whole_weights(row[name], f"{place}: {name}")
        row = _as_conversation(kind, row, source)
        for name in answers or ("prompt",):
            if is_messages(row["prompt"]) and is_messages(row[name]):
                turns = row["prompt"] if name == "prompt" else [*row["prompt"], *row[name]]
                changes[UNASKED] += unasked(turns)
                changes[NULLS] += null_arguments(turns)
        changes["conversations that end with a turn of the user or a tool, which is not trained"] += any(
            is_messages(row[name]) and row[name][-1]["role"] != "assistant" for name in TEXT[kind] if name != "prompt"
        )
        changes["turns of the assistant without text, of which only the end is trained"] += sum(
            turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls")
            for name in answers
            if is_messages(row[name])
            for turn in row[name]
        )
        changes[IGNORED_WEIGHTS] += sum(
            bool(turn.get("weight")) and (turn["role"] != "assistant" or name == "prompt")
            for name in TEXT[kind]
            if is_messages(row[name])
            for turn in row[name]
        )
        if not shares:
            _refuse_answered(kind, row, place)
        rows[i] = _compact(_with_system(kind, row, source, changes))
    return rows


def _refuse_answered(kind: Sourced, row: Row, where: str) -> None:
    """Raise DataError if a prompt of messages ends with an answer and another answer follows."""
    asked = row["prompt"]
    if not is_messages(asked) or asked[-1]["role"] != "assistant":
        return
    if kind == "preferences":
        follows = any(
            row[name] and row[name][0]["role"] == "assistant" for name in TEXT[kind][1:] if is_messages(row[name])
        )
        remedy = "; if chosen and rejected are whole conversations, leave it out: columns: {chosen: chosen, rejected: rejected}"
    else:
        follows = bool(row.get("completion", 1))
        remedy = "; for a whole conversation of the sft table, map columns: {messages: COLUMN}"
    if follows:
        raise DataError(
            f"{where}: the prompt ends with an assistant turn, so the answer would be in the prompt. End it with the user's"
            f" question{remedy}"
        )


def _read(value: Any, where: str, changes: Changes) -> Any:
    """Return chat messages in the canonical form, with tools' results in the order of their calls; anything else as it is."""
    turns = canonical_messages(value, where)
    if not is_messages(turns):
        return turns
    ordered, moved = in_order_of_calls(turns)
    changes[MOVED] += moved
    return ordered


def _compact(row: Row) -> Row:
    """Return the row and its messages in less memory."""
    return compact({n: [*map(compact, v)] if is_messages(v) else v for n, v in row.items()})


def _parted(row: Row, where: str, changes: Changes) -> Row:
    """Return a whole conversation as the turns before the first answer, and those from it on."""
    turns = row.pop(_WHOLE)
    rest = {name: value for name, value in row.items() if name != "id"}
    if not is_messages(turns):
        raise DataError(
            f"{where}: its conversation is {_shown(turns)}; it must be a list of messages with role and content"
        )
    asked, answered, greets = parted(turns)
    if strange := sorted({turn["role"] for turn in turns} - {*ROLES.values()}):
        if not answered:
            raise DataError(
                f"{where}: its conversation has no answer of the assistant, and turns of {', '.join(strange)}; write `assistant` as the"
                " role of answers"
            )
        changes[f"conversations with turns of unknown roles, which are not trained: {', '.join(strange)}"] += 1
    changes["conversations that begin with the assistant, whose first turn is not trained"] += greets
    return {"id": row["id"], "prompt": asked or None, "completion": answered or None, **rest}


def _as_conversation(kind: Sourced, row: Row, source: TableSource) -> Row:
    """Return the row with messages in all columns if one has them, or if the table is given a template or a system message."""
    template = source.template or ("{prompt}" if source.system is not None else None)
    values = [row[name] for name in TEXT[kind]]
    if source.template is not None and isinstance(row["prompt"], list):
        raise ConfigError(f"data.{kind}.template: has no effect on prompts that are chat messages already. Remove it.")
    if template is None and not any(is_messages(value) for value in values):
        return row
    roles = {name: "user" if name == "prompt" else "assistant" for name in TEXT[kind]}
    written = dict(row)
    if isinstance(row["prompt"], str) and template is not None:
        written["prompt"] = template.replace("{prompt}", row["prompt"])
    turned = {n: [{"role": role, "content": written[n]}] for n, role in roles.items() if isinstance(written[n], str)}
    return written | turned


def _with_system(kind: Sourced, row: Row, source: TableSource, changes: Changes) -> Row:
    prompt = row["prompt"]
    if source.system is None or not is_messages(prompt):
        return row
    if any(turn["role"] in INSTRUCTING for turn in prompt):
        changes["conversations that keep their own system message instead of data.*.system"] += 1
        return row
    return row | {"prompt": [{"role": "system", "content": source.system}, *prompt]}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
