"""Estimate the time that a flow still needs, from the seconds of finished stages like it, here or in the last flow."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from pipelines.report.makespan import like


def last_seconds(root: Path) -> dict[str, float]:
    """Return the seconds of each stage that ran in the last flow; empty if no flow has run here, or its record is damaged."""
    path = root / ".posttrain" / "flow.json"
    if not path.is_file():
        return {}
    try:
        stages = json.loads(path.read_bytes())["stages"]
        return {name: float(stage["ended"] - stage["started"]) for name, stage in stages.items() if stage["ran"]}
    except (ValueError, KeyError, TypeError, AttributeError):  # only an estimate; this flow writes a new record
        return {}


def time_left(left: Collection[str], seconds: Mapping[str, float], slots: int) -> str:
    """Return the time left in words, empty if nothing is left, or if the time of most stages is not known yet.

    Example:
        >>> time_left({"align@dpo-0", "align@dpo-1"}, {"align@grpo-0": 90.0}, 1)
        'about 3 min left'
        >>> time_left({"align@dpo-0", "compare"}, {"align@grpo-0": 30.0}, 1)
        'at least 30 s left'
    """
    alike = {name: like(name, seconds) for name in left}
    known = {name: sum(map(seconds.__getitem__, each)) / len(each) for name, each in alike.items() if each}
    if not known or 2 * len(known) < len(left):
        return ""
    longest = max(known.values())
    total = max(longest, sum(known.values()) / slots)
    words = f"{total:.0f} s" if total < 90 else f"{total / 60:.0f} min"
    return f"{'about' if len(known) == len(left) else 'at least'} {words} left"
