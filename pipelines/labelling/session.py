"""A labelling session on disk: which answers are compared, and in which order each annotator sees them.

labels/NAME/items.jsonl        a header, then one item a line; written once
labels/NAME/journal.jsonl      every judgement, appended and fsynced before the page shows the next item
labels/NAME/judgements.jsonl   all judgements that count, with models and texts; rewritten from the journal
labels/NAME/summary.json       agreement and biases, from the same
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import DataError
from posttrain.files import write_atomic

FOLDER = Path("labels")
Ask = Literal["pairs", "scores", "ranking"]
ASKS: tuple[Ask, ...] = ("pairs", "scores", "ranking")
AGAIN = ":again"
"""End of the id of a task that shows an item for the second time."""


@dataclass(frozen=True)
class Answer:
    """One answer; `model` and `md5` name its weights and are not shown to annotators."""

    text: str
    model: str
    md5: str


@dataclass(frozen=True)
class Item:
    """A prompt, which is text or chat messages, and the answers to compare."""

    id: str
    prompt: Any
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Session:
    """All items. `repeated` items are shown to each annotator a second time, to measure their consistency.

    Judgements of a session that is `held_out` become held-out problems, and never rows of training.
    """

    folder: Path
    ask: Ask
    seed: int
    repeated: int
    items: tuple[Item, ...]
    held_out: bool = False

    @property
    def name(self) -> str:
        return self.folder.name

    def tasks(self, annotator: str) -> list[str]:
        """Return the ids of the annotator's tasks in their order: every item, then the repeated ones."""
        rng = random.Random(f"{self.seed}/{annotator}")
        ids = rng.sample([item.id for item in self.items], len(self.items))
        return [*ids, *(name + AGAIN for name in rng.sample(ids, min(self.repeated, len(ids))))]

    def item(self, task: str) -> Item:
        """Return the item of a task. Raises DataError if there is none."""
        name = task.removesuffix(AGAIN)
        found = next((item for item in self.items if item.id == name), None)
        if found is None:
            raise DataError(f"the session {self.name} has no item {name!r}")
        return found

    def places(self, annotator: str, task: str) -> list[int]:
        """Return the indices of the answers in the order in which they are shown; a second time it is the reverse."""
        item = self.item(task)
        order = list(range(len(item.answers)))
        random.Random(f"{self.seed}/{annotator}/{item.id}").shuffle(order)
        return order[::-1] if task.endswith(AGAIN) else order

    def save(self) -> None:
        """Write the items; a session is either complete or absent."""
        header = {"ask": self.ask, "seed": self.seed, "repeated": self.repeated}
        header |= {"held_out": True} if self.held_out else {}
        lines = [header, *(asdict(item) for item in self.items)]
        text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
        write_atomic(self.folder / "items.jsonl", text.encode("utf-8", "surrogatepass"))


def open_session(folder: Path) -> Session:
    """Read a session. Raises DataError if the folder holds none, or its file is damaged."""
    path = folder / "items.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(p.parent.name for p in folder.parent.glob("*/items.jsonl"))) or "none yet"
        raise DataError(f"there is no labelling session {folder.name}; sessions: {known}")
    try:
        header, *lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        items = tuple(
            Item(line["id"], line["prompt"], tuple(Answer(**answer) for answer in line["answers"])) for line in lines
        )
        return Session(
            folder, header["ask"], int(header["seed"]), int(header["repeated"]), items, bool(header.get("held_out"))
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({error}); the judgements in journal.jsonl refer to it, so restore it from a backup"
        ) from error


def pair_up(prompt: Any, answers: Sequence[Answer], first: int) -> list[Item]:
    """Return an item for every two answers with different texts; ids count from `first`."""
    pairs = [(a, b) for i, a in enumerate(answers) for b in answers[i + 1 :] if a.text != b.text]
    return [Item(str(first + number), prompt, pair) for number, pair in enumerate(pairs)]
