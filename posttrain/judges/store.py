"""Keep a judge's replies on disk by the hash of the question, so that a repeated or resumed run asks nothing twice.

Example:
    >>> key_of({"model": "m", "messages": []}) == key_of({"messages": [], "model": "m"}) != key_of({"model": "n", "messages": []})
    True
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.files import write_atomic
from posttrain.judges.client import Reply


def key_of(question: Any) -> str:
    """Return the hash of everything that decides a reply."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ReplyStore:
    """A folder of replies; None keeps none."""

    folder: Path | None

    def read(self, key: str) -> Reply | None:
        """Return a kept reply. None if there is none, or if it is damaged; it is then asked for again."""
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            kept = json.loads(path.read_bytes())
            return Reply(str(kept["text"]), int(kept["prompt_tokens"]), int(kept["completion_tokens"]))
        except (ValueError, TypeError, LookupError):
            return None

    def write(self, key: str, reply: Reply) -> None:
        """Keep a reply."""
        path = self._path(key)
        if path is not None:
            write_atomic(path, json.dumps(asdict(reply)).encode())

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key[:2] / f"{key[2:]}.json"
