"""Make preference pairs: of graded answers, of a label that names the winner, of single answers with thumbs up or down."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.config.data_schema import GradedAnswers, PreferredAnswer
from pipelines.data.files import Record
from pipelines.data.messages import human_assistant
from pipelines.data.tables import SCORES, ULTRAFEEDBACK, Row, is_messages
from posttrain.data.messages import once_each, thumb
from posttrain.errors import ConfigError, DataError
from posttrain.text import nearest, shortened

Changes = Counter[str]
MOST_SHOWN = 8
"""Names of columns in one line of the counts."""
"""How many records a change of the data is about, by its description."""
KNOWN_PAIRS = (
    ". Known are: prompt, chosen and rejected; chosen and rejected as whole conversations that begin with the same turns;"
    " conversations (the earlier turns), chosen and rejected. A prompt in another column is named by data.preferences.columns:"
    " {prompt: COLUMN, chosen: chosen, rejected: rejected}"
)
"""The end of an error about a pair without a prompt."""
REPEATED = "conversations whose answers repeat the prompt, of which one copy is kept"
"""How the validation page counts rows that repeat their prompt in the answers."""
At = Callable[[Any, str], Any]
"""The value at a dotted path of a record, or `absent`."""


def count_unused(names: Sequence[str], changes: Changes) -> None:
    """Count columns that no row reads, by name."""
    if names:
        more = ", …" if len(names) > MOST_SHOWN else ""
        changes[f"columns that are not used: {', '.join(map(_named, names[:MOST_SHOWN]))}{more}"] += len(names)


def _named(name: str) -> str:
    """Return a column's name to show; pandas writes its index into a column without a name."""
    return name if name.strip() else f"{name!r} (a column without a name, such as an index of pandas)"


def graded_pairs(
    rows: Sequence[Row],
    records: Sequence[Record],
    graded: GradedAnswers,
    where: str,
    at: At,
    absent: Any,
    changes: Changes,
) -> list[Row]:
    """Return every better answer of each record against every worse one."""
    pairs: list[Row] = []
    _require_graded(records, graded, where, at, absent)
    for i, (row, record) in enumerate(zip(rows, records, strict=True)):
        answers = _graded(record, graded, f"{where}, row {i}", at, absent)
        if graded.better is None and not all(isinstance(score, bool) for _, score in answers):
            shown = ", ".join(str(score) for _, score in answers[:4])
            raise ConfigError(
                f"data.preferences.graded.better: missing. Say whether a higher or a lower `{graded.score}` is better (row {i} has"
                f" {shown}): better: higher, or better: lower for ranks. The wrong one would invert every pair."
            )
        sign = -1.0 if graded.better == "lower" else 1.0
        graded_ones = [(text, score) for text, score in answers if score not in (None, "missing")]
        changes["answers without a score, left out"] += len(answers) - len(graded_ones)
        scored = [
            (text, sign * number(score, f"{where}, row {i}: {graded.score}") + 0.0) for text, score in graded_ones
        ]
        found = [
            row | {"chosen": better, "rejected": worse, "chosen_score": high, "rejected_score": low, "record": i}
            for better, high in scored
            for worse, low in scored
            if high > low
        ]
        changes["records without a better and a worse answer, left out"] += not found
        pairs += found
    if not pairs:
        raise DataError(
            f"{where}: no record holds a better and a worse answer among {graded.answers or ', '.join(graded.columns or ())}"
        )
    return pairs


def _require_graded(records: Sequence[Record], graded: GradedAnswers, where: str, at: At, absent: Any) -> None:
    """Raise DataError if no record has a place that `graded` names."""
    place = f"{where}: data.preferences.graded"
    if graded.answers is None:
        for column in graded.columns or ():
            _require_place(records, column, f"{place}.columns", at, absent)
            found = [inner for record in records if isinstance(inner := at(record, column), Mapping)]
            _require_keys(found, graded, place, at, absent)
            if not found and graded.text:
                _require_place(records, f"{column}.{graded.text}", f"{place}.text", at, absent)
            if not found:
                raise DataError(
                    f"{place}.columns: {column} holds answers without scores ({shortened(at(records[0], column))}), and a"
                    f" score is read from within its answer: {column}: {{text: …, {graded.score}: …}}. Write the file so, or put answers"
                    " and scores into two lists of each record: graded: {answers: LIST, score: LIST}"
                )
        return
    _require_place(records, graded.answers, f"{place}.answers", at, absent)
    listed = [inner for record in records if isinstance(inner := at(record, graded.answers), list)]
    _require_keys([a for answers in listed for a in answers if isinstance(a, Mapping)], graded, place, at, absent)
    if any(isinstance(a, str) for answers in listed for a in answers):
        _require_place(records, graded.score, f"{place}.score", at, absent)


def _require_keys(answers: Sequence[Any], graded: GradedAnswers, place: str, at: At, absent: Any) -> None:
    if answers and not graded.text:
        names = sorted({str(name) for answer in answers for name in answer})
        raise DataError(f"{place}.text: missing. Name the key of the answer's text, one of {', '.join(names)}")
    for name, path in (("text", graded.text), ("score", graded.score)) if answers else ():
        _require_place(answers, path, f"{place}.{name}", at, absent)


def _require_place(records: Sequence[Any], path: str, setting: str, at: At, absent: Any) -> None:
    """Raise DataError if no record has a value other than null at the path."""
    if all(at(record, path) in (None, absent) for record in records):
        names = {str(name) for record in records for name in record}
        names |= {
            f"{name}.{key}"
            for record in records
            for name, inner in record.items()
            if isinstance(inner, Mapping)
            for key in inner
        }
        raise DataError(f"{setting}: no record has a value in {path!r}{nearest(path, names)}")


def _graded(record: Record, graded: GradedAnswers, where: str, at: At, absent: Any) -> list[tuple[Any, Any]]:
    """Return (answer, score) of every answer of the record."""
    if graded.answers is None:
        columns = graded.columns or []
        found = [(at(record, f"{column}.{graded.text}"), at(record, f"{column}.{graded.score}")) for column in columns]
        there = [pair for pair in found if pair[0] is not absent]
        return [(text, "missing" if score is absent else score) for text, score in there]
    listed = at(record, graded.answers)
    if listed is None or listed is absent:
        return []
    if not isinstance(listed, list):
        raise DataError(f"{where}: {graded.answers} is {shortened(listed)}; it must be a list of answers")
    if all(isinstance(answer, Mapping) for answer in listed):
        read = [(at(answer, graded.text), at(answer, graded.score)) for answer in listed]
        return [(None if text is absent else text, "missing" if score is absent else score) for text, score in read]
    scores = at(record, graded.score)
    if not isinstance(scores, list) or len(scores) != len(listed):
        raise DataError(f"{where}: {graded.score} must be a list with one score for each of the {len(listed)} answers")
    return list(zip(listed, scores, strict=True))


def preferred_pairs(
    rows: Sequence[Row],
    records: Sequence[Record],
    preferred: PreferredAnswer,
    where: str,
    at: At,
    absent: Any,
    changes: Changes,
) -> list[Row]:
    """Return a pair for each record whose label, or most of whose annotators, name one of its two answers.

    An answer that a record lacks is None, so that validation counts it.
    """
    pairs: list[Row] = []
    (first, one), (second, two) = preferred.answers.items()
    for path, setting in [
        *((column, "columns") for column in preferred.columns),
        *((answer, f"answers.{label}") for label, answer in preferred.answers.items()),
    ]:
        _require_place(records, path, f"{where}: data.preferences.preferred.{setting}", at, absent)
    for i, (row, record) in enumerate(zip(rows, records, strict=True)):
        found = {name: at(record, name) for name in (*preferred.columns, one, two)}
        found = {name: None if value is absent else value for name, value in found.items()}
        votes = Counter(_vote(found[column], preferred, f"{where}, row {i}: {column}") for column in preferred.columns)
        changes["labels of the better answer that are missing, which count for neither"] += votes[None]
        if votes[first] == votes[second] or max(votes[first], votes[second]) < votes[""]:
            changes["pairs without a winner, left out"] += 1
            continue
        better, worse = (one, two) if votes[first] > votes[second] else (two, one)
        pairs.append(row | {"chosen": found[better], "rejected": found[worse], "record": i})
    if not pairs:
        raise DataError(f"{where}: no record has a winner by {', '.join(preferred.columns)}")
    return pairs


def _vote(value: Any, preferred: PreferredAnswer, where: str) -> str | None:
    """Return the label of the winner, "" for a tie, or None if there is no label."""
    label = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if isinstance(value, bool) and label.lower() in {*preferred.answers, *preferred.ties}:
        label = label.lower()  # as JSON and YAML write it
    if label in preferred.answers:
        return label
    if label in preferred.ties:
        return ""
    if value is None or value != value:  # NaN: how tables write a missing value
        return None
    place = (
        f"{where} is {label!r}, which is none of data.preferences.preferred.answers ({', '.join(preferred.answers)})"
    )
    alike = next((known for known in preferred.answers if known.strip().lower() == label.strip().lower()), None)
    if alike is not None:
        raise DataError(
            f"{place}; if it means {alike!r}, spell all labels of the column in one way, and answers as the column does"
        )
    raise DataError(f"{place}; if it is a tie, add it: ties: [{label!r}]")


def liked_records(records: Sequence[Record], up: Sequence[bool], where: str, changes: Changes) -> list[Record]:
    """Return the records of good answers and count the others. Raises DataError if there are none."""
    changes["answers with label false, left out of imitation"] += up.count(False)
    liked = [record for record, good in zip(records, up, strict=True) if good]
    if not liked:
        raise DataError(f"{where}: every record has label false, so there is no answer to imitate")
    return liked


def thumbs_pairs(records: Sequence[Record], changes: Changes) -> list[Record]:
    """Return every answer with thumbs up against every one with thumbs down to the same prompt."""
    prompts: dict[str, dict[bool, list[Any]]] = {}
    for i, record in enumerate(records):
        absent = next((name for name in ("prompt", "completion", "label") if name not in record), None)
        if absent:
            raise DataError(
                f"row {i}: has a label of thumbs in other rows, but no {absent}; correct or remove the record"
            )
        answers = prompts.setdefault(json.dumps(record["prompt"], sort_keys=True), {True: [], False: []})
        answers[thumb(record["label"], f"row {i}: label")].append(record["completion"])
    pairs = [
        {"prompt": json.loads(prompt), "chosen": good, "rejected": bad}
        for prompt, answers in prompts.items()
        for good in answers[True]
        for bad in answers[False]
    ]
    changes["answers with a label but no counterpart of the same prompt, left out"] += sum(
        len(a[True]) + len(a[False]) for a in prompts.values() if not (a[True] and a[False])
    )
    if not pairs:
        raise DataError("no prompt has both an answer with label true and one with label false, so there is no pair")
    return pairs


def with_prompt(row: Row, where: str, changes: Changes) -> Row:
    """Return the pair with its shared conversation in `prompt`, and the different turns in chosen and rejected."""
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is None and isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = human_assistant(chosen), human_assistant(rejected)
        if chosen is None or rejected is None:
            raise DataError(
                f"{where}: the pair has no prompt, and its texts are no conversations that begin with 'Human:'; give the prompt"
                f" its own column{KNOWN_PAIRS}"
            )
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        if row.get("prompt") is None:
            raise DataError(
                f"{where}: the pair has no prompt, and chosen or rejected is no conversation that could hold one; give the row a"
                f" prompt, or remove it{KNOWN_PAIRS}"
            )
        return row
    given = [answer for answer in (chosen, rejected, row.get("prompt")) if not isinstance(answer, str | None)]
    if not all(is_messages(answer) for answer in given):
        if row.get("prompt") is None:
            raise DataError(
                f"{where}: chosen or rejected holds a turn without role and content; correct or remove the row{KNOWN_PAIRS}"
            )
        return row  # validation counts values of a wrong type
    if row.get("prompt") is None:
        shared = _shared(chosen, rejected)
        if not shared:
            raise DataError(
                f"{where}: chosen and rejected have no first turn in common, so the pair has no prompt; correct or remove"
                f" the row{KNOWN_PAIRS}"
            )
        return row | {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    return prompt_once(row, ("chosen", "rejected"), where, changes)


def prompt_once(row: Row, answers: Sequence[str], where: str, changes: Changes) -> Row:
    """Return the row with answers that do not repeat the prompt, and count it if one did."""
    asked = row["prompt"]
    # validation counts values of a wrong type
    if not (isinstance(asked, str) or is_messages(asked)) or not all(is_messages(row[name]) for name in answers):
        return row
    row, repeated = once_each(row, answers, where)
    changes[REPEATED] += repeated
    return row


def _shared(chosen: list[Any], rejected: list[Any]) -> int:
    """Return how many first turns are the prompt of both: all that are equal, but each keeps an answer."""
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    while count and not (_speaks(chosen[count:]) and _speaks(rejected[count:])):
        count -= 1
    return count


def _speaks(turns: list[Any]) -> bool:
    return any(turn["role"] == "assistant" for turn in turns)


def number(value: Any, where: str) -> float:
    """Return a score as a finite number. Raises DataError otherwise."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        shown = "missing" if value == "missing" else repr(value)[:60]
        raise DataError(f"{where} is {shown}; it must be a number or a boolean") from None
    if result != result or result in (float("inf"), float("-inf")):
        raise DataError(f"{where} is {result}; it must be finite. Correct or remove the record.")
    return result


def score_names(columns: Mapping[str, str] | None, records: Sequence[Record]) -> dict[str, str]:
    """Return the source's own name of each score that it does not call by the table's name."""
    if columns is not None:
        return {name: columns[name] for name in SCORES if name in columns}
    return {new: old for old, new in ULTRAFEEDBACK.items() if any(old in record for record in records)}


def check_scores(rows: list[Row], where: str, names: Mapping[str, str], mapped: bool = False) -> None:
    """Convert both scores to numbers. Raises DataError, with the source's `names`, if the rows have only one of them.

    Args:
        mapped: a mapping of columns names the scores.
    """
    given = [name for name in SCORES if any(row.get(name) is not None for row in rows)]
    if len(given) == 1:
        has, other = given[0], next(name for name in SCORES if name not in given)
        spelling = dict(zip(SCORES, ULTRAFEEDBACK, strict=True)) if names.get(has) in ULTRAFEEDBACK else {}
        missing = names.get(other, spelling.get(other, other))
        raise DataError(
            f"{where}: has {names.get(has, has)}, but no row has a value of {missing}; pairs need both scores, or neither. Add {missing},"
            f" or {f'leave {has} out of data.preferences.columns' if mapped else 'remove this column from the file'}"
        )
    for row in rows:
        for name in SCORES:
            if given:
                row[name] = number(row.get(name, "missing"), f"{where}, row {row['id']}: {names.get(name, name)}")
            else:
                row.pop(name, None)
