"""Record judgements: each is on disk before the next item is shown, and can be undone until it is handed to the inbox."""

from __future__ import annotations

import fcntl
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipelines.labelling.session import AGAIN, Session
from pipelines.runtime.journal import Journal, Record
from posttrain.errors import DataError

CHOICES = ("first", "second", "tie", "bad")
SKIP = "skip"
JUDGE = "judge/"
"""Beginning of the name of an annotator that is a model; no person may use it."""
TOP_SCORE = 10
_NAME_LENGTH = 40


def clock() -> str:
    """Return the present time in UTC; the time of a judgement is part of its data."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Judgement:
    """One judgement.

    Attributes:
        key: chosen by the page, so that a request that is sent twice counts once.
        places: indices of the answers in the order in which they were shown.
        value: pairs: the index of the better answer, "tie" or "bad" (both are). scores: one number from 1 to 10 for each answer.
            ranking: the indices of the answers, the best first. Always "skip" if the annotator had no opinion.
    """

    key: str
    annotator: str
    task: str
    places: tuple[int, ...]
    value: Any
    time: str

    @property
    def counts(self) -> bool:
        """Return True for a judgement that training may use: neither skipped nor a repetition."""
        return self.value != SKIP and not self.task.endswith(AGAIN)


@dataclass
class Desk:
    """The judgements of one session. All methods may be called from several threads."""

    session: Session
    now: Callable[[], str] = clock
    _done: dict[str, dict[str, Judgement]] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _handed: set[str] = field(default_factory=set)
    _batches: dict[int, list[str]] = field(default_factory=dict)
    _written: set[int] = field(default_factory=set)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        """Open the journal and replay it. Raises DataError if a different process serves this session."""
        self.session.folder.mkdir(parents=True, exist_ok=True)
        self._guard = (self.session.folder / ".lock").open("w")
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._guard.close()
            raise DataError(
                f"the session {self.session.name} is already open in a different process; stop it, or choose another --name"
            ) from None
        self._journal = Journal(self.session.folder / "journal.jsonl")
        for record in self._journal.records():
            self._replay(record)

    def close(self) -> None:
        """Close the journal and release the session."""
        self._journal.close()
        self._guard.close()

    def state(self, annotator: str) -> dict[str, Any]:
        """Return everything the page shows to an annotator: progress, and the next item without its models."""
        check_name(annotator)
        with self._lock:
            done, tasks = self._done.get(annotator, {}), self.session.tasks(annotator)
            task = next((name for name in tasks if name not in done), None)
            last = next(reversed(done.values()), None)
            shown = None
            if task is not None:
                item, places = self.session.item(task), self.session.places(annotator, task)
                shown = {"task": task, "prompt": item.prompt, "answers": [item.answers[i].text for i in places]}
            can_undo = last is not None and last.key not in self._handed
            return {
                "ask": self.session.ask, "done": len(done), "total": len(tasks), "item": shown, "can_undo": can_undo
            }  # fmt: skip

    def judge(self, annotator: str, task: str, key: str, given: Any) -> None:
        """Record a judgement in terms of the places that were shown. A key that was recorded before changes nothing.

        Raises:
            DataError: the value or the task is not valid.
        """
        check_name(annotator)
        with self._lock:
            if key in self._seen:
                return
            if task not in self.session.tasks(annotator):
                raise DataError(f"the session {self.session.name} has no task {task!r} for {annotator}")
            if task in self._done.get(annotator, {}):
                return
            places = self.session.places(annotator, task)
            value = _by_answer(self.session.ask, places, given)
            record = {"kind": "judgement", "key": key, "annotator": annotator, "task": task}
            self._append(record | {"places": places, "value": value, "time": self.now()})

    def judge_item(self, annotator: str, task: str, key: str, value: Any, time: str = "") -> None:
        """Record a judgement that was not made on this page: by a model, or in a different tool. The value is by answers."""
        with self._lock:
            if key in self._seen:
                return
            record = {"kind": "judgement", "key": key, "annotator": annotator, "task": task}
            places = list(range(len(self.session.item(task).answers)))
            self._append(record | {"places": places, "value": value, "time": time or self.now()})

    def undo(self, annotator: str) -> None:
        """Take the annotator's last judgement back. Raises DataError if there is none, or it was handed over."""
        with self._lock:
            last = next(reversed(self._done.get(annotator, {}).values()), None)
            if last is None:
                raise DataError("there is no judgement to undo")
            if last.key in self._handed:
                raise DataError("your last judgement was handed to the inbox, so it cannot be undone here")
            self._append({"kind": "undo", "key": last.key, "annotator": annotator, "time": self.now()})

    @property
    def is_untouched(self) -> bool:
        """Return True if there is no judgement, not even an undone one."""
        with self._lock:
            return not self._seen

    def is_finished(self, annotator: str) -> bool:
        """Return True if the annotator has judged every task."""
        with self._lock:
            return len(self._done.get(annotator, {})) == len(self.session.tasks(annotator))

    def judgements(self) -> list[Judgement]:
        """Return all judgements that were not undone, by annotator and in the order in which they were made."""
        with self._lock:
            return [judgement for _, done in sorted(self._done.items()) for judgement in done.values()]

    def hand_over(
        self,
        write: Callable[[int, list[Judgement]], None],
        trusted: str | None = None,
        only: str | None = None,
    ) -> int:
        """Give judgements that were not handed over to `write`, as a numbered batch, and return how many.

        Judgements of models stay, except those of the model named `trusted`. With `only`, other annotators' judgements stay too, so that
        they can still be undone.
        The batch is recorded first. If the process dies before `write` has finished, the next call writes exactly the same batch again.
        """
        with self._lock:
            fresh = [
                each.key
                for each in self.judgements()
                if each.counts
                and each.key not in self._handed
                and (each.annotator == trusted or not is_judge(each.annotator))
                and only in (None, each.annotator)
            ]
            if fresh:
                self._append({"kind": "batch", "number": len(self._batches) + 1, "keys": fresh})
            by_key = {each.key: each for each in self.judgements()}
            for number in sorted(self._batches.keys() - self._written):
                write(number, [by_key[key] for key in self._batches[number]])
                self._append({"kind": "written", "number": number})
            return len(fresh)

    def handed_before(self, number: int) -> list[Judgement]:
        """Return the judgements of the batches before one."""
        keys = {key for batch, listed in self._batches.items() if batch < number for key in listed}
        return [each for each in self.judgements() if each.key in keys]

    def _append(self, record: Record) -> None:
        """Write one record; after a failed write the journal is opened anew, which removes the partial line."""
        try:
            self._journal.append(record)
        except BaseException:
            self._journal.close()
            self._journal = Journal(self._journal.path)
            raise
        self._replay(record)

    def _replay(self, record: Mapping[str, Any]) -> None:
        match record["kind"]:
            case "judgement":
                fields = {name: record[name] for name in ("key", "annotator", "task", "value", "time")}
                judgement = Judgement(**fields, places=tuple(record["places"]))
                self._done.setdefault(judgement.annotator, {})[judgement.task] = judgement
                self._seen.add(judgement.key)
            case "undo":
                done = self._done[record["annotator"]]
                self._done[record["annotator"]] = {t: j for t, j in done.items() if j.key != record["key"]}
            case "batch":
                self._batches[record["number"]] = record["keys"]
                self._handed |= set(record["keys"])
            case "written":
                self._written.add(record["number"])


def is_judge(annotator: str) -> bool:
    """Return True if an annotator is a model."""
    return annotator.startswith(JUDGE)


def check_name(annotator: str) -> None:
    """Raise DataError unless a person's name can be stored and shown."""
    if is_judge(annotator):
        raise DataError(f"a name that begins with {JUDGE} means a model that judges; take a different one")
    if not annotator.strip() or len(annotator) > _NAME_LENGTH or not annotator.isprintable():
        raise DataError(f"an annotator's name is 1 to {_NAME_LENGTH} printable characters, and not {annotator[:60]!r}")


def _by_answer(ask: str, places: list[int], given: Any) -> Any:
    """Return a value by answers instead of places. Raises DataError if it is not valid."""
    if given == SKIP:
        return SKIP
    count = len(places)
    if ask == "pairs" and given in CHOICES:
        return places[CHOICES.index(given)] if given in CHOICES[:2] else given
    if isinstance(given, list) and len(given) == count and all(type(each) is int for each in given):
        if ask == "scores" and all(1 <= score <= TOP_SCORE for score in given):
            return [given[places.index(answer)] for answer in range(count)]
        if ask == "ranking" and sorted(given) == list(range(count)):
            return [places[place] for place in given]
    wanted = {
        "pairs": ", ".join(CHOICES),
        "scores": f"{count} whole numbers from 1 to {TOP_SCORE}",
        "ranking": f"the places 0 to {count - 1}, each once, the best first",
    }[ask]
    raise DataError(f"{json.dumps(given)[:80]} is no judgement here; valid: {wanted}, or {SKIP}")
