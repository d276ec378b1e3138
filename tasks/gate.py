"""Tasks of the gate: find champion and candidates, decide, and update the registry."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from pipelines.config.params import Params, load_params
from pipelines.gate import DECISION, PAGE, aligned
from pipelines.promotion.page import markdown
from pipelines.promotion.registry import (
    AGAINST,
    CHAMPION,
    EVALUATION,
    MD5,
    MEASURE,
    REASON,
    ROLLED_BACK,
    ProductionChanged,
    Registry,
    Version,
)
from pipelines.promotion.registry import DECISION as DECISION_TAG
from pipelines.runtime.redaction import redact
from pipelines.tracking.describe import RUN_TAG
from pipelines.tracking.lockfile import locked_output, read_lock
from pipelines.tracking.source import load
from pipelines.tracking.store import tracking_uri
from posttrain.errors import OrchestrationError, TrackingError
from posttrain.files import write_atomic
from tasks.champion import FOLDER, POINTER, production, put_into_production, switching
from tasks.console import print_line
from tasks.measure import measure
from tasks.remote import push
from tasks.slots import lease, machine_slots
from tasks.stage import run_logged, stop

SETTLED = Path(".posttrain/gate.json")
_WATCHED = ("models/align/", "runs/evaluate/", "data/valid")
RETRY_SECONDS = [2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 60.0]


def is_away(_task: Any, _run: Any, state: Any) -> bool:
    """Tell Prefect to retry if the registry did not respond."""
    return isinstance(state.result(raise_on_failure=False), TrackingError) and not stop.is_set()


_patient: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": len(RETRY_SECONDS),
    "retry_delay_seconds": RETRY_SECONDS,
    "retry_condition_fn": is_away,
}


@dataclass(frozen=True)
class Situation:
    """Champion, candidates and barred models.

    Attributes:
        barred: maps a model to the version that was rolled back by hand.
        registry: the weights under each alias, and those that were rolled back.
        known: the weights of every version.
    """

    champion: Version | None
    candidates: tuple[str, ...]
    barred: Mapping[str, Version]
    registry: Mapping[str, str]
    known: frozenset[str]


@task(name="champion and candidates", task_run_name="champion and candidates", **_patient)
def look_up(root: str) -> Situation:
    """Return the trained models whose weights are neither the champion's nor rolled back by hand."""
    project = Path(root)
    params = load_params(project / "params.yaml")
    registry = Registry(project, params.project.experiment)
    champion, barred = registry.holding(CHAMPION), registry.barred()
    if champion is not None and champion.fault:
        raise OrchestrationError(champion.fault)
    hashes = {name: _md5(project, name) for name in aligned(params.project.algorithms, params.project.seeds)}
    hashes = {name: md5 for name, md5 in hashes.items() if md5}
    free = [name for name, md5 in hashes.items() if md5 not in barred and (champion is None or not champion.holds(md5))]
    excluded = {name: barred[md5] for name, md5 in hashes.items() if md5 in barred}
    known = frozenset(version.tags.get(MD5, "") for version in registry.versions())
    return Situation(champion, tuple(free), excluded, registry.state(), known)


def require_known_weights(root: Path, situation: Situation) -> None:
    """Raise OrchestrationError if the registry does not know the weights in production, or names no champion for them.

    The registry is lost, older or a different one, or its alias was deleted by hand. Without this check the gate would promote a model
    without comparing it with the one in production.
    """
    md5 = production(root)
    if md5 is None or (md5 in situation.known and situation.champion is not None):
        return
    if md5 in situation.known:
        raise OrchestrationError(
            f"models/champion holds weights ({md5}, named by {POINTER}) of this registry, and no version has the alias {CHAMPION}, as if it"
            " was deleted by hand. Without a champion the gate would compare with the supervised model, so nothing is promoted."
            " `posttrain models` lists the versions; `python -m flows.promote N` makes version N champion."
        )
    held = "has no champion" if situation.champion is None else f"names {situation.champion.name} as champion"
    raise OrchestrationError(
        f"models/champion holds weights ({md5}, named by champion.dvc) that the registry at {redact(tracking_uri(root.absolute()))} does"
        f" not know; it {held}. The registry may be lost, older or a different one, so nothing is promoted. If MLFLOW_TRACKING_URI is"
        " wrong, correct it. If the weights are right, register them: `python -m flows.promote --adopt`. For a different version, give"
        " its number: `python -m flows.promote 1`."
    )


@task(name="gate", task_run_name="gate", cache_policy=NO_CACHE, persist_result=False)
def ask(
    root: str, champion: Version | None, candidates: Sequence[str], flow_run: str = "", tracking: bool = True
) -> dict[str, Any]:
    """Run pipelines.gate in its own slot and return the content of decision.json."""
    command = [sys.executable, "-m", "pipelines.gate", "--candidates", *candidates]
    if champion is not None:
        command += ["--champion", FOLDER.as_posix(), "--champion-name", f"the champion, {champion.name}"]
        command += ["--earlier", champion.evaluation] if champion.evaluation is not None else []
    with lease(machine_slots(several=False), stop, on_wait=lambda: print_line("gate waits for a free slot")) as held:
        run_logged(Path(root), "gate", command, held=held, flow_run=flow_run, followed=not tracking)
    decision: dict[str, Any] = json.loads((Path(root) / DECISION).read_text(encoding="utf-8"))
    return decision


@task(name="register", task_run_name="register {decision[challenger]}", **_patient)
def register(root: str, decision: Mapping[str, Any], champion: Version | None = None) -> Version:
    """Register the challenger with the decision and its reasons.

    Its weights are first pushed to DVC's remote, if there is one, so that any workspace can promote the version later. Raises
    OrchestrationError, with the registry unchanged, if the remote does not hold all of them afterwards.
    """
    project, name = Path(root), str(decision["challenger"])
    pushed = push(project, f"models/align/{name}", _md5(project, name))
    registry = Registry(project, load_params(project / "params.yaml").project.experiment)
    trained = load(project / "runs" / "align" / name)
    words = "; ".join(decision["refusals"]) or "every check was passed"
    tags = {DECISION_TAG: "passed" if decision["promote"] else "refused", REASON: words}
    tags[AGAINST] = "none" if champion is None else str(champion.number)
    tags[MEASURE] = measure(project)
    tags |= {EVALUATION: str(decision["evaluation"])} if "evaluation" in decision else {}
    if trained is not None:
        tags[RUN_TAG] = trained.identity
    version = registry.register(name, f"models/align/{name}", tags, f"Against {decision['reference']}: {words}")
    registry.challenge(version.number)
    print_line(
        f"{version.name} is registered; its weights are in DVC's {'remote' if pushed else 'cache (no remote is set)'}"
    )
    return registry.version(version.number)


@task(name="promote", task_run_name="promote version {number}", **_patient)
def make_champion(root: str, number: int, against: int | None) -> Version | None:
    """Restore the weights to models/champion, then move the registry's aliases, which production follows.

    Returns None, with nothing changed, if the decision is out of date: `against`, the champion that the gate compared with, is champion no
    longer, or the version was rolled back by hand meanwhile.
    """
    project = Path(root)
    registry = Registry(project, load_params(project / "params.yaml").project.experiment)
    with switching(project):
        champion, version = registry.holding(CHAMPION), registry.version(number)
        now = None if champion is None else champion.number
        if ROLLED_BACK in version.tags or now not in (against, number):
            return None
        try:
            return put_into_production(project, version, lambda: registry.promote(number, (champion,)))
        except ProductionChanged:  # bringing the weights takes a while, and other projects have their own lock
            return None


def publish(root: Path, decision: Mapping[str, Any], note: str) -> None:
    """Publish the decision as Prefect artifacts."""
    create_markdown_artifact(key="decision", markdown=markdown(dict(decision), note), description=note)
    create_link_artifact(
        key="decision-page", link=(root / PAGE).absolute().as_uri(), link_text="Why", description=PAGE.as_posix()
    )


def key(root: Path, registry: Mapping[str, str]) -> str:
    """Return a hash of everything that a decision depends on: models, evaluations, data, the gate's limits, the registry."""
    stages = read_lock(root)
    outs = {str(out["path"]): str(out.get("md5")) for stage in stages.values() for out in stage.get("outs", ())}
    watched = {path: md5 for path, md5 in sorted(outs.items()) if path.startswith(_WATCHED)}
    params: Params = load_params(root / "params.yaml")
    about = {
        "outs": watched,
        "project": params.project.model_dump(),
        "gate": params.gate.model_dump(),
        "registry": redact(tracking_uri(root.absolute())),
        "versions": dict(registry),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def settled(root: Path, registry: Mapping[str, str]) -> str | None:
    """Return the earlier decision about exactly this state, in words; None if there is none."""
    path = root / SETTLED
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        words = str(record["words"]) if record["key"] == key(root, registry) else None
    except (ValueError, KeyError, TypeError):
        print_line(f"{SETTLED} cannot be read, as after a power cut; the gate decides again")
        return None
    return words


def settle(root: Path, words: str, registry: Mapping[str, str]) -> None:
    """Remember that this state was decided, so that a run without anything new ends at once."""
    path = root / SETTLED
    write_atomic(path, (json.dumps({"key": key(root, registry), "words": words}, indent=1) + "\n").encode())


def _md5(root: Path, name: str) -> str:
    """Return the hash of a model in dvc.lock, empty if it has none."""
    entry = locked_output(root, f"models/align/{name}")
    return "" if entry is None else str(entry["md5"])
