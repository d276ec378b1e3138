"""Sessions with answers written by hand."""

from __future__ import annotations

from pathlib import Path

from pipelines.labelling.session import Answer, Ask, Item, Session


def session(folder: Path, count: int = 12, ask: Ask = "pairs", repeated: int = 0, answers: int = 2) -> Session:
    """Return a saved session; the answers of item 3 are 3.0 by model-0, 3.1x by model-1, 3.2xx by model-2."""
    items = [
        Item(
            str(i),
            f"{i}+0=",
            tuple(Answer(f"{i}.{j}{'x' * j}", f"model-{j}", f"md5-{j}") for j in range(answers)),
        )
        for i in range(count)
    ]
    made = Session(folder, ask, 0, repeated, tuple(items))
    made.save()
    return made
