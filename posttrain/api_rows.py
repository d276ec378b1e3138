"""Check the rows that `train` is given, and bring them to one form; a message names the row, the column and the remedy.

Example:
    >>> supervised_rows([{"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}])
    [{'prompt': [{'role': 'user', 'content': '1+1='}], 'completion': [{'role': 'assistant', 'content': '2'}]}]
    >>> supervised_rows([{"prompt": "1+1="}])
    Traceback (most recent call last):
    posttrain.errors.DataError: rows, row 0: has no column 'completion' (it has prompt); give prompt and completion
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.api_arguments import is_finite, require_list
from posttrain.data.call_spellings import require_json_calls
from posttrain.data.conversations import as_messages
from posttrain.data.messages import (
    MARKS,
    WEIGHTS,
    is_thumb,
    is_tool,
    once_each,
    one_reading,
    parted,
    refuse_repeated_texts,
    require_whole_weights,
    role_of,
    thumb,
    weighted,
)
from posttrain.data.tokens import TextEncoder
from posttrain.errors import DataError
from posttrain.rewards.extraction import equal, gold_answers
from posttrain.rewards.functions import BUILT_IN
from posttrain.rewards.golds import gold_texts
from posttrain.settings import context_limit
from posttrain.text import is_blank
from posttrain.text import shortened as shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Row = dict[str, Any]
WEIGHT = "weight"
"""Optional column of rows for imitation: the weight of each token of the row, a number that is not negative."""
SCORES = ("chosen_score", "rejected_score")
_WHOLE = "messages"
_ALMOST = 0.8
"""Names of columns that are at least this similar to an optional one are taken for a misspelling of it."""
_WIDEST = 1e15
"""Largest difference of two scores."""


def prompt_rows(rows: Any) -> list[Row]:
    """Return rows with a prompt and the same further columns; a text or a list of messages is a row with only a prompt."""
    table = [{"prompt": row} if isinstance(row, str | list | tuple) else row for row in _entries("rows", rows)]
    found = [_row("rows", row, i, ("prompt",)) for i, row in enumerate(table)]
    for i, row in enumerate(found):
        _refuse_answered(row["prompt"], f"rows, row {i}")
        if different := sorted(set(row) ^ set(found[0])):
            raise DataError(
                f"rows, row {i}: has the columns {', '.join(row)}, and row 0 has {', '.join(found[0])}. A reward function reads columns of"
                f" all rows; give {different[0]!r} in every row or in none"
            )
    return found


def supervised_rows(rows: Any, name: str = "rows", weighs: bool = True) -> list[Row]:
    """Return rows with `prompt` and `completion`. A row with `messages` is parted at its first answer.

    `weighs`: the loss reads weights of rows and fractions as weights of turns.
    """
    found = []
    for i, row in enumerate(_entries(name, rows)):
        if isinstance(row, Mapping) and _WHOLE in row:
            if both := sorted({"prompt", "completion"} & set(row)):
                raise DataError(
                    f"{name}, row {i}: has {_WHOLE} and {' and '.join(both)}, of which only one could be learnt; remove the other"
                )
            _check_text(row[_WHOLE], f"{name}, row {i}: {_WHOLE}", chat=True)
            asked, answered, _ = parted(row[_WHOLE])
            if not asked or not answered:
                roles = ", ".join(turn["role"] for turn in row[_WHOLE])
                raise DataError(
                    f"{name}, row {i}: its messages have no {'answer' if asked else 'question before the answer'} (their roles are"
                    f" {roles}); give a turn of 'user' and then one of 'assistant'"
                )
            rest = {column: value for column, value in row.items() if column != _WHOLE}
            row = {"prompt": asked, "completion": answered, **rest}
        one = _row(name, row, i, ("prompt", "completion"), (WEIGHT,))
        _check_training(one, f"{name}, row {i}", (WEIGHT,) if weighs else ())
        one = _said_once(one, ("completion",), f"{name}, row {i}", weighs)
        if WEIGHT in one:
            _check_number(one[WEIGHT], f"{name}, row {i}: {WEIGHT}", least=0.0)
        found.append(one)
    _refuse_bad_answers(found, name)
    refuse_repeated_texts(found, ("completion",), name)
    if found and not any(row.get(WEIGHT, 1.0) for row in found):
        raise DataError(
            f"{name}: the weight of every row is 0, so nothing would be learnt; give at least one weight above 0"
        )
    return found


def _refuse_mixed(rows: Sequence[Row]) -> None:
    """Raise DataError if labelled rows are plain text and chat messages: KTO measures its KL on answers to other rows' prompts."""
    kinds = {isinstance(row["prompt"], str) and isinstance(row["completion"], str): i for i, row in enumerate(rows)}
    if len(kinds) == 2:
        raise DataError(
            f"rows: row {kinds[True]} is plain text and row {kinds[False]} has chat messages, and KTO measures its KL on answers to other"
            " rows' prompts. Make all rows one of the two, such as [{'role': 'user', 'content': …}] for a plain prompt"
        )


def _refuse_bad_answers(rows: Sequence[Row], name: str) -> None:
    """Raise DataError if the rows have labels, true or false, and one is false: imitation would learn the bad answer."""
    labels = {i: row["label"] for i, row in enumerate(rows) if row.get("label") is not None}
    if not all(is_thumb(label) for label in labels.values()):
        return
    bad = [i for i, label in labels.items() if not thumb(label, "")]
    if bad:
        raise DataError(
            f"{name}, row {bad[0]}: its label is {shown(labels[bad[0]])}, so its answer is a bad one, and imitation would learn it"
            f" ({len(bad)} of {len(rows)} rows). Leave such rows out, train with 'kto', which learns from both, or rename the column if"
            " it means something else"
        )


def labelled_rows(rows: Any) -> list[Row]:
    """Return rows with `prompt`, `completion` and `label`, which is True or False."""
    found = [_row("rows", row, i, ("prompt", "completion", "label")) for i, row in enumerate(_entries("rows", rows))]
    for i, row in enumerate(found):
        _check_training(row, f"rows, row {i}")
        row |= _said_once(row, ("completion",), f"rows, row {i}")
        row["label"] = thumb(row["label"], f"rows, row {i}: label")
    _refuse_mixed(found)
    refuse_repeated_texts(found, ("completion",), "rows")
    return found


def preference_rows(rows: Any, needs_scores: bool) -> list[Row]:
    """Return rows with `prompt`, `chosen`, `rejected`; scores are in every row or in none."""
    entries = _entries("rows", rows)
    needs = ("prompt", "chosen", "rejected")
    found = [_alike(_row("rows", row, i, needs, SCORES)) for i, row in enumerate(entries)]
    scored = needs_scores or any(name in row for row in found for name in SCORES)
    for i, row in enumerate(found):
        _check_training(row, f"rows, row {i}")
        row |= _said_once(row, ("chosen", "rejected"), f"rows, row {i}")
        if row["chosen"] == row["rejected"]:
            raise DataError(
                f"rows, row {i}: chosen and rejected are the same, so there is nothing to learn from it; remove the row"
            )
        for name in SCORES if scored else ():
            if name not in row:
                why = "the algorithm weighs pairs by their scores" if needs_scores else "other rows have scores"
                raise DataError(
                    f"rows, row {i}: has no column {name!r}, and {why}; give {' and '.join(SCORES)} in every row"
                )
            _check_number(row[name], f"rows, row {i}: {name}", least=-math.inf)
        if scored and row[SCORES[0]] < row[SCORES[1]]:
            raise DataError(
                f"rows, row {i}: the chosen answer's score {shown(row[SCORES[0]])} is below the rejected one's {shown(row[SCORES[1]])};"
                " exchange the answers, or correct the scores"
            )
    refuse_repeated_texts(found, ("chosen", "rejected"), "rows")
    return found


def refuse_ties(rows: Sequence[Row], algorithm: str) -> None:
    """Raise DataError if the scores of every pair are equal, or differ by more than a loss can hold."""
    gaps = [float(row[SCORES[0]]) - float(row[SCORES[1]]) for row in rows if SCORES[0] in row]
    if gaps and len(gaps) == len(rows) and not any(gaps):
        raise DataError(
            f"rows: the two scores of every pair are equal, and {algorithm} weighs a pair by their difference, so nothing would be learnt;"
            " give scores that differ"
        )
    wide = next((i for i, gap in enumerate(gaps) if gap > _WIDEST), None)
    if wide is not None:
        raise DataError(
            f"rows, row {wide}: the scores differ by {gaps[wide]:g}, and at most {_WIDEST:g} can be computed with; divide all scores by one"
            " number"
        )


def _alike(row: Row) -> Row:
    """Return a pair whose answers are both texts or both messages: otherwise each would follow a different prompt."""
    answers = ("chosen", "rejected")
    if all(isinstance(row[name], str) for name in answers):
        return row
    return row | {name: as_messages(row[name], "assistant") for name in answers}


def check_golds(name: str, function: Any, golds: Sequence[Any]) -> None:
    """Raise DataError if a gold answer of the built-in reward `answer` could not match even itself."""
    if function is not BUILT_IN["answer"]:
        return
    for row, gold in enumerate(gold_texts(name, golds)):
        if not any(equal(one, gold) for one in gold_answers(gold)):
            raise DataError(
                f"rows, row {row}: the answer {shown(gold)} is no number that the reward `answer` could find. Give a number; for letters or"
                " texts pass functools.partial(posttrain.rewards.functions.answer, kind='choice'), or 'text', as the reward"
            )


def check_prompt(encoder: TextEncoder, prompt: Any, place: str, tools: list[Any] | None = None) -> tuple[int, ...]:
    """Return the ids of a prompt. Raises DataError if it is no text and no messages, has no tokens, or leaves no room for an answer."""
    _check_text(prompt, place)
    ids = tuple(encoder.prompt(prompt, tools, place))
    if not ids:
        raise DataError(
            f"{place} has no tokens, so the first token of the answer has no context; give a text that is not empty"
        )
    if len(ids) >= encoder.max_length:
        raise DataError(
            f"{place} has {len(ids)} tokens, and the model's context of {encoder.max_length} leaves no room for an answer; shorten it"
        )
    return ids


def check_room(config: PreTrainedConfig, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Raise DataError for a prompt that does not fit into the model's context together with `new` tokens of the answer."""
    limit = context_limit(config.get_text_config().to_dict())
    for i, ids in enumerate(prompts):
        if limit is not None and len(ids) + new > limit:
            raise DataError(
                f"rows, row {i}: the prompt has {len(ids)} tokens, and {new} new ones exceed the model's context of {limit}; shorten it, or"
                " lower max_new_tokens"
            )


def _entries(name: str, rows: Any) -> list[Any]:
    found = require_list("train", name, rows, "a list of rows, e.g. [{'prompt': 'a', 'completion': 'b'}]")
    if not found:
        raise DataError(f"train needs at least one row; {name} is empty")
    return found


def _row(name: str, row: Any, number: int, needs: Sequence[str], optional: Sequence[str] = ()) -> Row:
    place = f"{name}, row {number}"
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: is {shown(row)} ({type(row).__name__}); give a mapping with {' and '.join(needs)}")
    for column in needs:
        if column not in row:
            has = ", ".join(map(str, row)) or "none"
            raise DataError(f"{place}: has no column {column!r} (it has {has}); give {' and '.join(needs)}")
        if column != "label":
            _check_text(row[column], f"{place}: {column}")
    if "tools" in row:
        _check_tools(row["tools"], f"{place}: tools")
    for column in row:
        if not isinstance(column, str):
            raise DataError(f"{place}: the column {shown(column)} is no text; name each column by a text")
        close = difflib.get_close_matches(column.lower(), optional, n=1, cutoff=_ALMOST)
        if close and column not in optional and column.lower()[0] == close[0][0]:  # "height" is no misspelt "weight"
            raise DataError(
                f"{place}: the column {column!r} would be ignored; did you mean {close[0]!r}? Rename or remove it"
            )
    return {column: _with_weights(value) if column in needs else value for column, value in row.items()}


def _with_weights(value: Any) -> Any:
    """Return messages with their weights under the key `weight`, anything else as it is."""
    if not isinstance(value, list | tuple):
        return value
    return [weighted(turn, "") if isinstance(turn, Mapping) else turn for turn in value]


def _check_training(row: Row, place: str, read: Sequence[str] = ()) -> None:
    """Raise DataError for a column such as `loss_mask` that may say which tokens are trained, if it is not one of `read`."""
    for column in row:
        if column not in read and column.lower() in (*WEIGHTS, *MARKS):
            whole = f"Give the whole row a {WEIGHT!r}, each message of a conversation its own" if WEIGHT in read else ""
            raise DataError(
                f"{place}: the column {column!r} may say which tokens are trained, and would be ignored."
                f" {whole or 'Leave out rows that must not count'}, or rename the column if it means something else"
            )


def _said_once(row: Row, answers: Sequence[str], place: str, weighs: bool = False) -> Row:
    """Return the row with answers that do not repeat its prompt.

    Raises DataError if one is empty, which would be learnt, or has a weight that the loss does not read.
    """
    row, _ = once_each(row, answers, place)
    _refuse_answered(row["prompt"], place)
    for name in answers:
        if not weighs:
            require_whole_weights(row[name], f"{place}: {name}")
        if row[name] is None or not _speaks(row[name]):
            said = "only the prompt again" if row[name] is None else shown(row[name])
            raise DataError(f"{place}: {name} is {said}, so the model would learn to say nothing; remove the row")
    return row


def _speaks(answer: Any) -> bool:
    """Return True if an answer has text, or a turn of the assistant with text or a tool call."""
    if isinstance(answer, str):
        return not is_blank(answer)
    spoken = [turn for turn in answer if turn["role"] == "assistant"]
    return any(not is_blank(str(turn.get("content") or "")) or turn.get("tool_calls") for turn in spoken)


def _refuse_answered(prompt: Any, place: str) -> None:
    """Raise DataError for a prompt of messages that ends with an answer: the answer to learn or to sample would be a second one."""
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{place}: the prompt ends with a turn of the assistant, so the answer would be in the prompt; end it with the user's question"
        )


def _check_tools(tools: Any, place: str) -> None:
    """Raise DataError unless the tools are a list of mappings, or that as JSON; None and an empty text mean none."""
    try:
        found = json.loads(tools) if isinstance(tools, str) and tools else tools or []
    except ValueError:
        found = None
    if not isinstance(found, list | tuple) or not all(map(is_tool, found)):
        raise DataError(
            f"{place} is {shown(tools)}; give a list of tools, each with a function's name, or that list as JSON"
        )


def _check_text(value: Any, place: str, chat: bool = False) -> None:
    """Raise DataError unless the value is a text, or a list of messages whose contents are texts."""
    if isinstance(value, str) and not chat:
        _check_encodable(value, place)
        return
    if not isinstance(value, list | tuple) or not value:
        either = "" if chat else "a text, or "
        raise DataError(
            f"{place} is {shown(value)} ({type(value).__name__}); give {either}a list of messages such as"
            " [{'role': 'user', 'content': 'hello'}]"
        )
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise DataError(f"{place}, turn {i} is {shown(turn)}; give a mapping with role and content")
        spelt = role_of(turn["role"], f"{place}, turn {i}")
        if spelt != turn["role"] and spelt != "tool":  # some templates have a role of their own for a tool's answer
            raise DataError(
                f"{place}, turn {i}: the role is {shown(turn['role'])}; write {spelt!r}, as chat templates do"
            )
        content = turn.get("content")
        if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
            raise DataError(f"{place}, turn {i}: the content is {shown(content)}; give a text")
        one_reading(turn, f"{place}, turn {i}")
        _check_encodable(content or "", f"{place}, turn {i}")
        require_json_calls(turn, f"{place}, turn {i}")
        weighted(turn, f"{place}, turn {i}")


def _check_encodable(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds {text[error.start]!r} at character {error.start}, half of a surrogate pair, which is no text; remove it, or"
            " read the file again with the right encoding"
        ) from None


def _check_number(value: Any, place: str, least: float) -> None:
    if not is_finite(value) or value < least:
        limit = "" if least == -math.inf else " that is not negative"
        raise DataError(f"{place} is {shown(value)}; give a finite number{limit}")
