"""Read the context length of a local model folder, so that limits are checked before anything runs. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from posttrain.settings import context_limit


def context_of(source: str) -> int | None:
    """Return the context length of a model folder; None if it names none, or if `source` is no readable folder here."""
    try:
        config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a hub id, or a folder that the stage `base` refuses with a better reason
        return None
    if not isinstance(config, dict):
        return None
    text = config.get("text_config")
    for values in (text if isinstance(text, dict) else {}, config):
        if limit := context_limit(values):
            return limit
    return None
