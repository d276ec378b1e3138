"""Ask how often people preferred a candidate to the champion, for the page of the decision, and as a check if params.yaml asks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from pipelines.config.gate_schema import PeopleParams
from pipelines.config.yaml_files import read_yaml
from pipelines.labelling.win_rates import WinRate, win_rate
from pipelines.promotion.decision import Check, Decision
from pipelines.promotion.named import PRODUCTION
from pipelines.tracking.lockfile import locked_output

POINTER = Path("champion.dvc")


def preferred(project: Path, candidate: str, champion: str | None) -> WinRate | None:
    """Return how often people preferred a candidate to the champion's weights, or to the supervised model if there is no champion."""
    mine, theirs = _md5(project, f"models/align/{candidate}"), _md5(project, champion or "models/sft")
    return win_rate(project, mine, theirs) if mine and theirs else None


def with_people(decision: Decision, found: WinRate | None, limits: PeopleParams | None) -> Decision:
    """Return the decision with the check of people's preference, if params.yaml asks for it."""
    return decision if limits is None else replace(decision, checks=(*decision.checks, _check(decision, found, limits)))


def _check(decision: Decision, found: WinRate | None, limits: PeopleParams) -> Check:
    advice = f"`posttrain label {decision.challenger} champion` asks people"
    if found is None:
        words = (
            f"nobody has compared {decision.challenger} with {decision.reference} (gate.people asks for it); {advice}"
        )
        return Check("people", math.nan, limits.win_rate, False, words)
    words = f"{found.words} The interval must begin at {100 * limits.win_rate:.0f} % or above"
    if found.prompts < limits.min_prompts:
        words += f", on {limits.min_prompts} prompts or more; {advice}"
    passed = found.low >= limits.win_rate and found.prompts >= limits.min_prompts
    return Check("people", found.low, limits.win_rate, passed, words)


def _md5(project: Path, folder: str) -> str:
    """Return the hash of a model's weights, empty if it is unknown."""
    if folder == PRODUCTION:
        path = project / POINTER
        return str(read_yaml(path)["outs"][0]["md5"]) if path.is_file() else ""
    entry = locked_output(project, folder)
    return "" if entry is None else str(entry["md5"])
