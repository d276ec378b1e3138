"""Register the best model of a comparison as challenger, so that the registry shows it after the first run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipelines.config.params import load_params
from pipelines.promotion.registry import CHALLENGER, CHAMPION, DECISION, REASON, Registry
from pipelines.runtime.comparison import COMPARISON, read_comparison
from pipelines.runtime.identity import file_digest
from pipelines.tracking.describe import RUN_TAG
from pipelines.tracking.lockfile import locked_output
from pipelines.tracking.source import load
from posttrain.errors import TrackingError
from posttrain.files import write_atomic
from tasks.console import print_line

REGISTERED = Path(".posttrain/challenger")
"""Holds the digest of the comparison whose best model was registered."""


def register_best(root: Path) -> None:
    """Register the best model once per comparison. MLflow being away never fails a comparison: the next flow registers it."""
    if not (root / COMPARISON).is_file() or not (root / "params.yaml").is_file():
        return
    digest, mark = file_digest(root / COMPARISON), root / REGISTERED
    if mark.is_file() and mark.read_bytes() == digest.encode():
        return
    chosen = best_model(read_comparison(root))
    if chosen is None:
        return
    try:
        print_line(register(str(root), *chosen))
    except TrackingError as error:
        print_line(f"the best model is not in the registry yet: {error}")
        return
    write_atomic(mark, digest.encode())


def best_model(comparison: dict[str, Any]) -> tuple[str, str] | None:
    """Return the best algorithm's best model, e.g. grpo-0, and the result in words; None if no model solves the task."""
    if not comparison["solved"] or comparison["best"] is None:
        return None
    name = str(comparison["best"])
    row = comparison["models"][name]
    by_seed = dict(zip(row["seeds"], row[f"{comparison['headline']}_by_seed"], strict=True))
    return f"{name}-{max(by_seed, key=lambda seed: by_seed[seed])}", str(comparison["title"])


@task(name="challenger", task_run_name="register {model} as challenger", cache_policy=NO_CACHE, persist_result=False)
def register(root: str, model: str, words: str) -> str:
    """Register the model and give it the alias `challenger`; return the result in words.

    What the gate has decided stays: its tags, and its challenger, which `flows.promote` may promote.
    """
    project, folder = Path(root), f"models/align/{model}"
    registry = Registry(project, load_params(project / "params.yaml").project.experiment)
    champion, entry = registry.holding(CHAMPION), locked_output(project, folder)
    if champion is not None and entry is not None and champion.holds(entry["md5"]):
        return f"registry: {champion.name}, the champion, is the best model of this comparison"
    judged = [version for version in registry.versions() if DECISION in version.tags]
    same = next((version for version in judged if entry is not None and version.holds(entry["md5"])), None)
    if same is not None:
        return f"registry: {same.name} is the best model of this comparison; the gate has decided on it: {same.words(DECISION)}"
    trained = load(project / "runs" / "align" / model)
    tags = {REASON: f"best of a comparison: {words}"} | ({} if trained is None else {RUN_TAG: trained.identity})
    version = registry.register(model, folder, tags, f"Best of a comparison: {words}")
    if any(CHALLENGER in each.aliases for each in judged):
        return f"registry: {version.name} is the best model of this comparison; the gate's challenger stays"
    registry.challenge(version.number)
    return f"registry: {version.name} is challenger; `make retrain` asks the gate if it may become champion"
