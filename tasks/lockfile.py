"""Sort dvc.lock in the order of the DAG: DVC appends each stage when it finishes, which is random for parallel stages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from posttrain.files import write_atomic

_ENTRY = re.compile(r"^  (?! )'?(.+?)'?:\n", re.MULTILINE)


def sort_lock(root: Path, order: Iterable[str]) -> None:
    """Rewrite dvc.lock so that two runs differ only if results differ. Entries are moved, never changed."""
    path = root / "dvc.lock"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    ordered = sorted_lock(text, order)
    if ordered != text:
        write_atomic(path, ordered.encode())


def sorted_lock(text: str, order: Iterable[str]) -> str:
    """Return the text with the entries of its last section, `stages:`, in `order`; unknown entries follow by name."""
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
