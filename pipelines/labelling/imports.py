"""Read judgements that people made elsewhere: exports of Label Studio (JSON) and Argilla (`dataset.records.to_json`).

Label Studio: tasks with `data` and `annotations`; the Pairwise tag, whose result selects `left` or `right`.
Argilla: records with `fields` and `responses`; a LabelQuestion whose labels name the answer fields, or a RankingQuestion over them.

Example:
    >>> answer_names({"prompt": "p", "response_1": "a", "response_2": "b", "topic": "x"})
    ['response_1', 'response_2']
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.files import read_file
from pipelines.data.tables import is_messages
from pipelines.labelling.judgements import JUDGE, is_judge
from pipelines.labelling.session import Answer, Ask, Item
from posttrain.errors import DataError

PROMPTS = ("prompt", "instruction", "question", "input")
PLACES = {"left": 0, "right": 1, "first": 0, "second": 1, "a": 0, "b": 1, "1": 0, "2": 1}
TIES = {"tie": "tie", "equal": "tie", "same": "tie", "both": "tie", "bad": "bad", "neither": "bad", "none": "bad"}
LONGEST_NAME = 40
_NUMBERED = re.compile(r"(.+?)[-_ ]?(\d+|[abAB])")


@dataclass(frozen=True)
class Imported:
    """One judgement of an export; `value` is by answers, as in a session's journal."""

    annotator: str
    item: str
    value: Any
    time: str


Reader = Callable[[Mapping[str, Any], int], tuple[Item, list[Imported]]]


def read_export(path: Path) -> tuple[Ask, list[Item], list[Imported]]:
    """Return the kind of question, the items, and the judgements of an export.

    Raises:
        DataError: it is of neither tool, or holds a judgement that a session cannot hold.
    """
    records = read_file(path)
    if not records:
        raise DataError(f"{path}: holds no record")
    if all(isinstance(record.get("data"), dict) and "annotations" in record for record in records):
        found = [_read(path, "Label Studio", _label_studio, record, number) for number, record in enumerate(records)]
    elif all(isinstance(record.get("fields"), dict) and "responses" in record for record in records):
        found = [_read(path, "Argilla", _argilla, record, number) for number, record in enumerate(records)]
    else:
        raise DataError(
            f"{path}: neither Label Studio's JSON export (records with `data` and `annotations`) nor Argilla's (`fields` and `responses`)."
            " A file of finished pairs needs no import: put it into inbox/preferences."
        )
    judgements = [each for _, several in found for each in several]
    kinds = {"ranking" if isinstance(each.value, list) else "pairs" for each in judgements}
    if len(kinds) != 1:
        raise DataError(
            f"{path}: holds {'both choices and rankings' if kinds else 'no judgement'}; export one question"
        )
    return ("ranking" if "ranking" in kinds else "pairs"), [item for item, _ in found], judgements


def _read(path: Path, tool: str, reader: Reader, record: Mapping[str, Any], number: int) -> tuple[Item, list[Imported]]:
    """Return a record's item and judgements. Raises DataError naming the record if it has not the tool's form."""
    try:
        return reader(record, number)
    except DataError as error:
        raise DataError(f"{path}, record {number}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}, record {number}: has not the form of an export of {tool} ({type(error).__name__}: {error}); export it again"
        ) from None


def answer_names(fields: Mapping[str, Any]) -> list[str]:
    """Return the names of the answers: the only names that differ by a number or letter at the end. Raises DataError otherwise."""
    groups: dict[str, list[str]] = {}
    for name in fields:
        match = _NUMBERED.fullmatch(name)
        if match and isinstance(fields[name], str):
            groups.setdefault(match[1], []).append(name)
    several = [sorted(names) for names in groups.values() if len(names) > 1]
    if len(several) != 1:
        raise DataError(
            f"the fields {', '.join(fields)} do not show which are the answers; name them like answer1 and answer2 in the export"
        )
    return several[0]


def _label_studio(record: Mapping[str, Any], number: int) -> tuple[Item, list[Imported]]:
    data = record["data"]
    results = list(_pairwise(record["annotations"]))
    named = [name for _, result in results for name in str(result.get("to_name", "")).split(",")][:2]
    names = named if len(named) == 2 and all(name in data for name in named) else answer_names(data)
    item = _item(data, names, number)
    return item, [
        Imported(_annotator("label-studio", annotation.get("completed_by")), item.id, _place(result), _time(annotation))
        for annotation, result in results
    ]


def _pairwise(annotations: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield each annotation that was not cancelled with its result of the Pairwise tag."""
    for annotation in annotations:
        if annotation.get("was_cancelled"):
            continue
        results = annotation.get("result") or []
        pairwise = [result for result in results if result.get("type") == "pairwise"]
        if results and not pairwise:
            kinds = ", ".join(sorted({str(result.get("type")) for result in results}))
            raise DataError(f"an annotation has results of the type {kinds}; only the Pairwise tag can be imported")
        yield from ((annotation, result) for result in pairwise)


def _place(result: Mapping[str, Any]) -> int:
    selected = str((result.get("value") or {}).get("selected"))
    if selected not in ("left", "right"):
        raise DataError(f"a Pairwise result selects {selected!r}, not left or right")
    return PLACES[selected]


def _argilla(record: Mapping[str, Any], number: int) -> tuple[Item, list[Imported]]:
    names = answer_names(record["fields"])
    item = _item(record["fields"], names, number)
    return item, [
        Imported(
            _annotator("argilla", user), item.id, _argilla_value(value, names), str(record.get("updated_at") or "")
        )
        for user, value in _responses(record["responses"])
    ]


def _responses(responses: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (user, value) of submitted responses to the one question, of Argilla 2 (by question) or 1 (by user)."""
    if isinstance(responses, dict):
        if len(responses) > 1:
            raise DataError(f"a record has responses to the questions {', '.join(responses)}; export one question")
        by_user = [
            (each.get("user_id"), each.get("value"), each.get("status")) for r in responses.values() for each in r
        ]
    else:
        by_user = [
            (each.get("user_id"), value.get("value"), each.get("status"))
            for each in responses or ()
            for value in (each.get("values") or {}).values()
        ]
    yield from ((user, value) for user, value, status in by_user if status in (None, "submitted"))


def _argilla_value(value: Any, names: Sequence[str]) -> Any:
    """Return a label or a ranking by answers."""
    if isinstance(value, list):
        if all(isinstance(each, dict) for each in value):
            ranks = [float(each["rank"]) for each in value]
            if len(set(ranks)) < len(ranks):
                raise DataError(
                    "a ranking has two answers of the same rank, and a ranking here has no ties; leave such records out of the export"
                )
            value = [each["value"] for _, each in sorted(zip(ranks, value, strict=True), key=lambda pair: pair[0])]
        if sorted(map(str, value)) != sorted(names):
            raise DataError(f"a ranking is of {value}, and the answers are {', '.join(names)}")
        return [names.index(name) for name in value]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(
            f"a submitted response has the value {value!r}, which is no label; leave such records out of the export"
        )
    text = str(value).strip()
    if text in names:
        return list(names).index(text)
    if text.lower() in PLACES:
        return PLACES[text.lower()]
    if text.lower() in TIES:
        return TIES[text.lower()]
    raise DataError(f"the label {text!r} is no answer ({', '.join(names)}), place or tie")


def _item(fields: Mapping[str, Any], names: Sequence[str], number: int) -> Item:
    prompt = next((fields[name] for name in PROMPTS if fields.get(name)), None)
    if not (isinstance(prompt, str) or is_messages(prompt)) or any(
        not isinstance(fields.get(name), str) for name in names
    ):
        raise DataError(
            f"its prompt (one of {', '.join(PROMPTS)}) is missing or neither text nor messages, or an answer is no text"
        )
    return Item(str(number), prompt, tuple(Answer(fields[name], name, "") for name in names))


def _annotator(tool: str, who: Any) -> str:
    """Return an annotator's name: an address if the export has one, else the tool and the name or number there.

    Different annotators have different names: a name that is too long, unprintable or a judge's is shortened and gets a digest.
    """
    if isinstance(who, dict):
        who = who.get("email") or who.get("id")
    given = "unknown" if who is None else str(who)
    text = given if "@" in given else f"{tool} {given}"
    if len(text) <= LONGEST_NAME and text.isprintable() and not is_judge(text):
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    shown = "".join(each for each in text.removeprefix(JUDGE) if each.isprintable())
    return f"{shown[: LONGEST_NAME - 9]} {digest}"


def _time(annotation: Mapping[str, Any]) -> str:
    return str(annotation.get("created_at") or "")
