"""Open the inbox that a setting names: a folder or an object store."""

from __future__ import annotations

from pathlib import Path

from pipelines.data.inbox import Inbox, StoreInbox
from pipelines.data.inbox_folder import FolderInbox


def open_inbox(where: str, *, required: bool = False) -> Inbox:
    """Open a folder or a store. `required` refuses a folder that is not there, which a misspelt setting looks like."""
    if "://" in where and not where.startswith("file://"):
        return StoreInbox(where)
    return FolderInbox(Path(where.removeprefix("file://")).expanduser(), required=required)
