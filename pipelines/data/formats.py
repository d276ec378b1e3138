"""Recognise the common formats of data sets by their columns, so that they need no mapping."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.data.conversation_rows import Sourced
from pipelines.data.files import Record
from pipelines.data.messages import from_json
from pipelines.data.tables import SCORES, ULTRAFEEDBACK
from posttrain.data.messages import MARKS, WEIGHTS, is_thumb, one_reading, thumb
from posttrain.errors import DataError

Convert = Callable[[Record], Record]


@dataclass(frozen=True)
class Format:
    """A data format. `convert` returns a record with the canonical columns."""

    name: str
    kinds: tuple[Sourced, ...]
    needs: frozenset[str]
    convert: Convert
    reads: frozenset[str] = frozenset()
    """Other columns that become part of the prompt."""
    fits: Callable[[Record], bool] = lambda record: True
    """False for a record that has the columns and a different shape."""


def recognised(kind: Sourced, records: Sequence[Record], where: str) -> Format | None:
    """Return the format of records whose columns say it.

    Raises:
        DataError: the columns are those of two formats, or the format would leave out a part of the question.
    """
    present = {str(name) for record in records for name in record}
    complete = [f for f in FORMATS if kind in f.kinds and f.needs <= present and all(map(f.fits, records))]
    if not complete:
        return None
    found, *others = complete
    other = next((f for f in others if not f.needs <= found.needs), None)
    if other is not None:
        raise DataError(
            f"{where}: its columns are those of two formats, {found.name!r} ({', '.join(sorted(found.needs))}) and {other.name!r}"
            f" ({', '.join(sorted(other.needs))}), and only one of them would be used. Name the columns to use in data.{kind}.columns;"
            " if some rows have one shape and some the other, put them into two files."
        )
    for name in sorted(_ASKED & present - found.needs - found.reads):
        if any(record.get(name) not in (None, "", []) for record in records):
            raise DataError(
                f"{where}: the format {found.name!r} would leave out the column {name!r}, which seems to be a part of the question. Map"
                f" each column in data.{kind}.columns; a prompt may be made of several, such as prompt: '{{{name}}} {{…}}'. If {name!r}"
                " is not a part of it, map the columns without it."
            )
    return found


def require_known(kind: Sourced, records: Sequence[Record], where: str) -> None:
    """Raise DataError if the records' columns are of no known format. The message proposes no mapping: a wrong one would leak."""
    there = sorted({str(name) for record in records for name in record})
    if there == ["text"]:
        raise DataError(
            f"{where}: its only column is `text`, one whole text per record; this table needs to know what is prompt and what is"
            " answer. Make two columns, prompt and completion, in the file; only completions are trained. To train whole texts from"
            f" their second word on, set data.{kind}.columns: {{completion: text, prompt: text}} and data.{kind}.extract:"
            r" {completion: '^\s*\S+(.*)', prompt: '^(\s*\S+)'}"
        )
    graded = (
        " Several graded or ranked answers per record: data.preferences.graded; a label that says which of two answers won:"
        " data.preferences.preferred."
        if kind == "preferences"
        else ""
    )
    columns = {column for f in FORMATS if kind in f.kinds for column in f.needs}
    if wrong := [name for name in there if name not in columns and name.strip().lower() in columns]:
        advice = "; ".join(f"{name!r}: {_spelt(name)} ({name.strip().lower()})" for name in wrong)
        raise DataError(
            f"{where}: the names of its columns are not written as they must be: {advice}. Correct the header of the file."
        )
    known = "; ".join(f"{f.name}: {', '.join(sorted(f.needs))}" for f in FORMATS if kind in f.kinds)
    raise DataError(
        f"{where}: no known format has its columns ({', '.join(name or repr(name) for name in there)}). Known by their columns"
        f" are {known}. For other names, map each column in data.{kind}.columns; a prompt must not contain its answer.{graded}"
    )


def _spelt(name: str) -> str:
    """Return the advice for a column's name."""
    spaces = ["remove the space"] if name != name.strip() else []
    return " and ".join([*spaces, *(["write it in lower case"] if name != name.lower() else [])])


def _same(record: Record) -> Record:
    return record


def _messages(name: str) -> Convert:
    def convert(record: Record) -> Record:
        given = record.get(name)
        turns = from_json(given)
        system = record.get("system") or record.get("system_prompt")
        if system and not isinstance(system, str):
            raise DataError(f"system {str(system)[:60]!r}: must be text; correct the record, or leave the column out")
        own = (
            one_reading(turns[0], "turn 0").get("content") if isinstance(turns, list) and _has_system(turns) else system
        )
        if system and own != system:
            raise DataError(
                f"the column system ({str(system)[:40]!r}) and the conversation's own system message ({str(own)[:40]!r}) differ, and"
                " only one of them would be used; leave one out"
            )
        if isinstance(turns, list) and system and not _has_system(turns):
            turns = [{"role": "system", "content": system}, *turns]
        # text stays text, so that it is counted as such where it is read
        turns = json.dumps(turns, ensure_ascii=False) if isinstance(given, str) and isinstance(turns, list) else turns
        return record | {"messages": turns, "tools": record.get("tools") or record.get("functions")}

    return convert


def _has_system(turns: list[Any]) -> bool:
    return bool(turns) and isinstance(turns[0], dict) and "system" in (turns[0].get("role"), turns[0].get("from"))


def _instruction(more: str, answer: str) -> Convert:
    def convert(record: Record) -> Record:
        parts = [_part(record.get(column), column) for column in ("instruction", more)]
        asked = "\n".join(part for part in parts if part)
        history, system = record.get("history") or [], record.get("system")
        if not history and not system:
            return record | {"prompt": asked, "completion": record.get(answer)}
        turns = [{"role": "system", "content": system}] if system else []
        if not isinstance(history, list) or any(not isinstance(turn, list) or len(turn) != 2 for turn in history):
            raise DataError(
                f"history {str(history)[:60]!r}: must be a list of [question, answer]; correct the record, or leave the column out"
            )
        for question, reply in history:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        return record | {
            "prompt": [*turns, {"role": "user", "content": asked}],
            "completion": [{"role": "assistant", "content": record.get(answer)}],
        }

    return convert


def _part(value: Any, column: str) -> str:
    """Return a part of a question as text. Raises DataError if it is neither text nor a number."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, float) and math.isnan(value):  # how tables write a missing value
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{column} {str(value)[:60]!r}: must be text; correct the record, or leave the column out")
    return str(value)


def unused(kind: Sourced, found: Format, records: Sequence[Record], where: str) -> list[str]:
    """Return the names of the columns that the format does not read; `id` is replaced by the row's position.

    Raises:
        DataError: one of them may say which rows or tokens are trained, such as `loss_mask`.
    """
    read = {*found.needs, *found.reads, *_OPTIONAL.get(kind, ()), "id"}
    names = sorted({str(name) for record in records for name in record} - read)
    labels = [record["label"] for record in records if record.get("label") is not None]
    words = bool(labels) and all(str(label).lower() in ("true", "false") for label in labels)
    # 1 in every row may say anything; 0 next to 1 is a thumbs down
    if kind == "sft" and "label" in names and (words or _has_bad(labels)):
        raise DataError(
            f"{where}: the column 'label' is true or false, and answers with false would be imitated, too. Keep only the good answers and"
            " remove the column, or name the file in data.labelled."
        )
    for name in names if kind in TRAINED else ():
        if name.lower() in (*WEIGHTS, *MARKS) and any(record.get(name) is not None for record in records):
            remedy = (
                "A row's weight is the column `weight`, a message's its key `weight`; rename"
                if kind == "sft"
                else "Rename"
            )
            raise DataError(
                f"{where}: the column {name!r} may say which tokens are trained, and would be ignored. {remedy} or remove the column, or"
                f" map the other columns in data.{kind}.columns."
            )
    return names


def _has_bad(labels: Sequence[Any]) -> bool:
    return all(map(is_thumb, labels)) and not all(thumb(label, "") for label in labels)


def _pair(record: Record) -> Record:
    """Take UltraFeedback's names of the scores, too."""
    named = {new: record[old] for old, new in ULTRAFEEDBACK.items() if old in record and new not in record}
    # a single message is a conversation of one turn
    turns = {name: [record[name]] for name in ("chosen", "rejected") if isinstance(record.get(name), dict)}
    return record | named | turns if named or turns else record


def _asked_in_conversations(record: Record) -> Record:
    """Return a pair of LLaMA-Factory, whose earlier turns are in `conversations` and whose answers are one message each."""
    converted = _messages("conversations")(record)
    prompt = converted.pop("messages")
    return _pair(converted | {"prompt": prompt})


def _one_answer_each(record: Record) -> bool:
    return "prompt" not in record and not any(isinstance(record.get(name), list) for name in ("chosen", "rejected"))


def _asked(name: str) -> Convert:
    return lambda record: record | {"prompt": record.get(name)}


def _openai_pair(record: Record) -> Record:
    """Return a pair of OpenAI's preference fine-tuning, whose earlier turns and tools are in `input`."""
    asked = record.get("input")
    if not isinstance(asked, dict):
        raise DataError(f"input {str(asked)[:60]!r}: must be an object with messages; correct the record")
    names = {"chosen": record.get("preferred_output"), "rejected": record.get("non_preferred_output")}
    return record | names | {"prompt": asked.get("messages"), "tools": asked.get("tools")}


def _tagged(convert: Convert) -> Convert:
    """Take LLaMA-Factory's name of a label, too."""
    return lambda record: convert(record | {"label": record.get("label", record.get("kto_tag"))})


def _verl(record: Record) -> Record:
    judge = record.get("reward_model")
    if isinstance(judge, str):
        try:
            judge = json.loads(judge)
        except (ValueError, RecursionError):
            raise DataError(
                f"reward_model {judge[:60]!r}: must be an object with ground_truth, or one as JSON"
            ) from None
    gold = judge.get("ground_truth") if isinstance(judge, dict) else None
    return record if gold is None else record | {"answer": gold}


_OPTIONAL: dict[str, tuple[str, ...]] = {
    "sft": ("weight", "tools"), "preferences": ("tools", *SCORES, *ULTRAFEEDBACK), "labelled": ("tools",), "problems": ("tools",),
    "evaluation": ("tools",),
}  # fmt: skip
"""Columns that the formats of a table read if they are there."""
TRAINED: tuple[Sourced, ...] = ("sft", "preferences", "labelled")
"""Tables whose answers are trained."""
_ASKED = frozenset(
    (
        "choices",
        "options",
        "context",
        "passage",
        "article",
        "document",
        "background",
        "input",
        "system",
        "system_prompt",
        "history",
    )
)
"""Names of columns without which a question cannot be answered."""
_CHAT = frozenset({"system", "system_prompt", "functions"})
"""Columns that formats of whole conversations read if they are there."""
_PROBLEMS: tuple[Sourced, ...] = ("problems", "evaluation")
FORMATS = (
    Format("KTO", ("sft", "preferences", "labelled"), frozenset({"prompt", "completion", "label"}), _same),
    Format("messages with a label", ("labelled",), frozenset({"messages", "label"}), _messages("messages"), _CHAT),
    *(
        Format(f"{name} with a label", ("labelled",), frozenset({column, label}), _tagged(_messages(column)), _CHAT)
        for name, column, label in (
            ("ShareGPT", "conversations", "label"),
            ("ShareGPT", "conversations", "kto_tag"),
            ("messages", "messages", "kto_tag"),
        )
    ),
    *(
        Format(
            "Alpaca with a label",
            ("labelled",),
            frozenset({"instruction", "output", label}),
            _tagged(_instruction("input", "output")),
            frozenset({"input", "system", "history"}),
        )
        for label in ("label", "kto_tag")
    ),
    Format("prompt and completion", ("sft",), frozenset({"prompt", "completion"}), _same),
    Format("messages", ("sft",), frozenset({"messages"}), _messages("messages"), _CHAT),
    Format("ShareGPT", ("sft",), frozenset({"conversations"}), _messages("conversations"), _CHAT),
    Format("conversation", ("sft",), frozenset({"conversation"}), _messages("conversation"), _CHAT),
    Format(
        "Alpaca",
        ("sft",),
        frozenset({"instruction", "output"}),
        _instruction("input", "output"),
        frozenset({"input", "system", "history"}),
    ),
    Format(
        "Dolly",
        ("sft",),
        frozenset({"instruction", "response"}),
        _instruction("context", "response"),
        frozenset({"context", "system", "history"}),
    ),
    Format("preferences", ("preferences",), frozenset({"prompt", "chosen", "rejected"}), _pair),
    Format(
        "ShareGPT pairs",
        ("preferences",),
        frozenset({"conversations", "chosen", "rejected"}),
        _asked_in_conversations,
        _CHAT,
        _one_answer_each,
    ),
    Format(
        "OpenAI preferences",
        ("preferences",),
        frozenset({"input", "preferred_output", "non_preferred_output"}),
        _openai_pair,
    ),
    Format("pairs with an implicit prompt", ("preferences",), frozenset({"chosen", "rejected"}), _pair),
    Format("problems", _PROBLEMS, frozenset({"prompt", "answer"}), _same),
    Format(
        "prompts without answers",
        ("problems",),
        frozenset({"prompt"}),
        _same,
        fits=lambda record: {*record} <= {"prompt", "tools", "id"},
    ),
    Format("verl", _PROBLEMS, frozenset({"prompt", "reward_model"}), _verl),
    Format("questions", _PROBLEMS, frozenset({"question", "answer"}), _asked("question")),
    Format("mathematics", _PROBLEMS, frozenset({"problem", "answer"}), _asked("problem")),
)
