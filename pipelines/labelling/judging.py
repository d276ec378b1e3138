"""A judge model as an annotator: its judgements of a session, its agreement with people, and whether it may label alone."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.labelling.judgements import JUDGE, SKIP, TOP_SCORE, Desk, Judgement, is_judge
from pipelines.labelling.session import AGAIN, Session, open_session
from pipelines.runtime.journal import read
from posttrain.errors import DataError
from posttrain.evaluation.agreement import cohen_kappa, interval, krippendorff_alpha
from posttrain.judges import Judge, Reply, Rubric, compare, grade

if TYPE_CHECKING:
    from posttrain.api import Model

BATCH = 32
"""Items that are asked before their judgements are recorded."""


@dataclass
class LocalJudge:
    """A model of this machine that answers greedily, one question at a time. `md5` is the hash of its weights."""

    name: str
    md5: str
    model: Model
    max_tokens: int
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def body(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        return {"weights": self.md5, "messages": [dict(m) for m in messages], "max_tokens": self.max_tokens}

    def complete(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """Return the model's reply. A model without a chat template continues the messages as one text."""
        encoder = self.model.encoder
        chat = [dict(message) for message in messages]
        prompt: Any = chat if encoder.tokenizer.chat_template else "\n\n".join(m["content"] for m in chat) + "\n"
        length = len(encoder.prompt(prompt))
        room = encoder.max_length - length
        if room < 1:
            raise DataError(
                f"{self.name}: a question has {length} tokens and the judge's context {encoder.max_length}; use a different model"
            )
        with self._lock:
            (text,) = self.model.generate([prompt], max_new_tokens=min(self.max_tokens, room))
        return Reply(text, length, len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"]))


@dataclass(frozen=True)
class Agreement:
    """How often a judge says the same as people about the same items.

    Attributes:
        items: items that a person and the judge judged.
        chance_corrected: Cohen's kappa over (person, judge) pairs of labels; Krippendorff's interval alpha for scores. None if undefined.
        people: the same between people, where two of them judged the same item: the level that a judge can be expected to reach.
    """

    items: int
    chance_corrected: float | None
    people: float | None


def annotator_name(model: str, rubric: Rubric) -> str:
    """Return the name of a judge as an annotator: model and rubric. A changed rubric is a different annotator."""
    digest = hashlib.sha256(json.dumps([model, rubric.criteria]).encode()).hexdigest()[:6]
    return f"{JUDGE}{model[-24:]} {digest}"


def label(desk: Desk, judge: Judge, rubric: Rubric, annotator: str) -> int:
    """Let the judge label every item of the session that it has not labelled, and return how many it labelled.

    Raises:
        DataError: the session asks for rankings.
        JudgeError: the judge could not be asked; judgements until then are recorded.
    """
    session = desk.session
    if session.ask == "ranking":
        raise DataError(f"{session.name} asks for rankings, which judges do not give; use a session of pairs or scores")
    done = {each.task for each in desk.judgements() if each.annotator == annotator}
    tasks = [task for task in session.tasks(annotator) if task not in done and not task.endswith(AGAIN)]
    for start in range(0, len(tasks), BATCH):
        batch = tasks[start : start + BATCH]
        values = (
            _pairs(session, judge, rubric, batch) if session.ask == "pairs" else _scores(session, judge, rubric, batch)
        )
        for task, value in zip(batch, values, strict=True):
            desk.judge_item(annotator, task, f"{annotator}/{task}", value)
    return len(tasks)


def _pairs(session: Session, judge: Judge, rubric: Rubric, tasks: Sequence[str]) -> list[Any]:
    items = [session.item(task) for task in tasks]
    found = compare(judge, rubric, [(each.prompt, each.answers[0].text, each.answers[1].text) for each in items])
    values: dict[str | None, Any] = {"first": 0, "second": 1, "tie": "tie", None: SKIP}
    return [values[verdict] for verdict in found]


def _scores(session: Session, judge: Judge, rubric: Rubric, tasks: Sequence[str]) -> list[Any]:
    items = [session.item(task) for task in tasks]
    graded = iter(grade(judge, rubric, [(item.prompt, answer.text) for item in items for answer in item.answers]))
    values = []
    for item in items:
        scores = [next(graded) for _ in item.answers]
        complete = [min(TOP_SCORE, max(1, round(score))) for score in scores if score is not None]
        values.append(complete if len(complete) == len(scores) else SKIP)
    return values


def agreement(folder: Path, annotator: str, ask: str) -> Agreement:
    """Return the agreement of a judge with people over all sessions in `folder` that ask in the same way."""
    pairs: list[tuple[Any, Any]] = []
    between: list[list[Any]] = []
    items = 0
    for path in sorted(folder.glob("*/items.jsonl")):
        session = open_session(path.parent)
        labels = _labels(session) if session.ask == ask else {}
        for by_annotator in labels.values():
            people = [label for name, label in by_annotator.items() if not is_judge(name)]
            between.append(people)
            if annotator in by_annotator and people:
                items += 1
                pairs += [(label, by_annotator[annotator]) for label in people]
    if ask == "scores":
        units = [unit for person, judge in pairs for unit in map(list, zip(person, judge, strict=True))]
        of_people = [list(scores) for unit in between if len(unit) > 1 for scores in zip(*unit, strict=True)]
        return Agreement(items, krippendorff_alpha(units, interval), krippendorff_alpha(of_people, interval))
    return Agreement(items, cohen_kappa(pairs), krippendorff_alpha(between))


def _labels(session: Session) -> dict[str, dict[str, Any]]:
    """Return the label of each annotator for each item, from the session's journal; a list of scores is a tuple."""
    done: dict[tuple[str, str], Any] = {}
    keys: dict[str, tuple[str, str]] = {}
    for record in read(session.folder / "journal.jsonl"):
        if record["kind"] == "judgement":
            keys[record["key"]] = record["annotator"], record["task"]
            done[keys[record["key"]]] = record["value"]
        elif record["kind"] == "undo":
            done.pop(keys[record["key"]], None)
    labels: dict[str, dict[str, Any]] = {}
    for (annotator, task), value in done.items():
        if value != SKIP and not task.endswith(AGAIN):
            labels.setdefault(task, {})[annotator] = tuple(value) if isinstance(value, list) else value
    return labels


def judged_by(judgements: Sequence[Judgement], annotator: str) -> dict[str, int]:
    """Return how many items the judge decided, called ties, and gave no verdict on."""
    mine = [each for each in judgements if each.annotator == annotator]
    ties, skipped = sum(each.value == "tie" for each in mine), sum(each.value == SKIP for each in mine)
    return {"decided": len(mine) - ties - skipped, "ties": ties, "no verdict": skipped}
