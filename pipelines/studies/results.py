"""The result of a study as a file that is committed, and the page of all verdicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.report.measured import all_runs, newest
from pipelines.studies.outcomes import Reader, same_prompts
from pipelines.studies.study import FIXED, FOLDER, Claim, Study, load_study, names
from pipelines.studies.verdict import Estimate, Verdict, combined, estimate, seeds_to_decide, verdict
from pipelines.studies.workspace import Workspace
from posttrain.errors import DataError
from posttrain.files import write_atomic

RESULTS = FOLDER / "results"
EARLIER = RESULTS / "earlier"
"""Results of series that a later one with other seeds or another design has replaced."""
PAGE = Path("docs/claims.md")


@dataclass(frozen=True)
class Decided:
    """One claim with its estimate and verdict."""

    claim: str
    outcome: str
    at_least: float
    value: float
    low: float
    high: float
    verdict: Verdict
    takes: str
    """For an undecided claim: the experiment that would decide it."""


@dataclass(frozen=True)
class Result:
    """All that the page shows of one study."""

    study: str
    digest: str
    verdict: Verdict
    seeds: int
    prompts: int
    confidence: float
    seconds: float
    """Seconds of work of the runs of this study on the machine that ran it."""
    claims: list[Decided]
    arms: dict[str, dict[str, float]]
    """Mean of each outcome over seeds, by arm."""
    looks: int = 1
    """Series of runs that share the level, this one included: `report.looks` of the study's parameters."""


class Entry(NamedTuple):
    """A study with its committed results."""

    name: str
    study: Study
    result: Result | None
    """None if it has not run."""
    earlier: Sequence[Result] = ()
    """Oldest first."""


def judge(name: str, study: Study, spaces: Sequence[Workspace]) -> Result:
    """Decide a study from its finished runs. Raises DataError if some have not finished."""
    params = spaces[0].params
    reader = Reader(study, spaces, params["evaluation"]["accuracy"])
    asked = same_prompts(reader)
    confidence, looks = params["report"]["confidence"], params["report"]["looks"]
    level = 1 - (1 - confidence) / looks / len(study.claims)
    claims = [_decide(claim, reader, level, asked.groups) for claim in study.claims]
    outcomes = sorted({claim.outcome for claim in study.claims} | {"answers/accuracy", *study.shown})
    arms = {arm: {o: _mean(reader, arm, o) for o in outcomes if _has(arm, o)} for arm in ("sft", *study.arms)}
    seconds = round(work_seconds(spaces), 1)
    decision = combined([decided.verdict for decided in claims])
    return Result(
        name, study.digest, decision, len(study.seeds), len(asked.prompts), confidence, seconds, claims, arms, looks
    )


def _decide(claim: Claim, reader: Reader, level: float, groups: Sequence[str] | None) -> Decided:
    values = {arm: reader.values(arm, claim.outcome) for arm in claim.contrast}
    found = estimate(values, claim.contrast, level, groups)
    decision = verdict(found, claim.at_least)
    takes = "" if decision != "undecided" else _takes(found, claim.at_least, level)
    value, low, high = (float(f"{number:.5g}") for number in (found.value, *found.limits))
    return Decided(claim.claim, claim.outcome, claim.at_least, value, low, high, decision, takes)


def _takes(found: Estimate, at_least: float, level: float) -> str:
    """Describe the experiment that would decide a claim, if the true contrast is the present estimate."""
    if found.low != found.low:
        return "values that differ: all are equal, which leaves no interval"
    seeds = seeds_to_decide(found, at_least, level)
    return f"about {seeds} seeds" if seeds else "more prompts, or more than 1,000 seeds"


def _has(arm: str, outcome: str) -> bool:
    """Return True if the arm was trained in the study or the outcome is one of the evaluation."""
    return arm not in FIXED or not outcome.startswith(("training/", "measured/"))


def _mean(reader: Reader, arm: str, outcome: str) -> float:
    return float(f"{reader.values(arm, outcome).mean():.5g}")


def work_seconds(spaces: Sequence[Workspace]) -> float:
    """Return the seconds of work of the runs of all workspaces on this machine; restored runs have none."""
    return sum(run.seconds for space in spaces for run in newest(all_runs(space.folder)))


def save(root: Path, result: Result) -> Path:
    """Write the result next to the studies and return its path. A result of another design or other seeds is kept in EARLIER."""
    path = root / RESULTS / f"{result.study}.json"
    before = saved(root, result.study)
    if before is not None and before.digest != result.digest:
        write_atomic(root / EARLIER / f"{result.study}-{len(earlier(root, result.study)) + 1}.json", path.read_bytes())
    write_atomic(path, (json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n").encode())
    return path


def saved(root: Path, name: str) -> Result | None:
    """Return the committed result of a study, or None. Raises DataError if the file is not a result."""
    path = root / RESULTS / f"{name}.json"
    return _read(path, name) if path.is_file() else None


def earlier(root: Path, name: str) -> list[Result]:
    """Return the results of a study's earlier series, oldest first. Raises DataError if a file is not a result."""
    paths = (root / EARLIER).glob(f"{name}-[0-9]*.json")
    return [_read(path, name) for path in sorted(paths, key=lambda path: int(path.stem.rpartition("-")[2]))]


def _read(path: Path, name: str) -> Result:
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Result(**tree | {"claims": [Decided(**claim) for claim in tree["claims"]]})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: not a result of a study ({error}). Write it again with: make study NAME={name}"
        ) from None


def all_saved(root: Path) -> list[Entry]:
    """Return every study with its committed results."""
    return [Entry(name, load_study(root, name), saved(root, name), earlier(root, name)) for name in names(root)]
