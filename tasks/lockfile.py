"""dvc.lock in the order of the DAG: DVC appends a stage when it finishes, and side by side that order is chance."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from posttrain.files import write_atomic

_ENTRY = re.compile(r"^  (?! )'?(.+?)'?:\n", re.MULTILINE)


def sort_lock(root: Path, order: Iterable[str]) -> None:
    """Rewrite dvc.lock so that two runs differ only where results differ. Entries are moved, never changed."""
    path = root / "dvc.lock"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    ordered = sorted_lock(text, order)
    if ordered != text:
        write_atomic(path, ordered.encode())


def sorted_lock(text: str, order: Iterable[str]) -> str:
    """The same text with the entries of its last section, `stages:`, in `order`; unknown ones follow by name."""
    head, marker, body = text.partition("stages:\n")
    starts = [match.start() for match in _ENTRY.finditer(body)]
    if not marker or not starts or starts[0] != 0:
        return text
    entries = [body[start:end] for start, end in zip(starts, [*starts[1:], len(body)], strict=True)]
    rank = {name: i for i, name in enumerate(order)}

    def key(entry: str) -> tuple[int, str]:
        match = _ENTRY.match(entry)
        assert match is not None
        return rank.get(match[1], len(rank)), match[1]

    return head + marker + "".join(sorted(entries, key=key))
