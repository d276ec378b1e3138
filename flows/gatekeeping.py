"""Decide on promotion after the evaluations: run the gate, promote or refuse, and report the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect.runtime import flow_run

from flows.production import reconcile
from pipelines.gate import PAGE
from pipelines.promotion.registry import ROLLED_BACK, Registry, Version
from tasks import gate
from tasks.champion import restore_champion
from tasks.console import log_line
from tasks.notify import notify


def decide_promotion(root: Path, *, tracking: bool, approval: bool) -> None:
    """Run the gate on the current evaluations, once: a state that was already decided is skipped."""
    situation = gate.look_up(str(root))
    gate.require_known_weights(root, situation)
    words = gate.settled(root, situation.registry)
    if words is not None:
        log_line(f"nothing new to decide: {words}")
    elif situation.candidates:
        _decide(root, situation, tracking=tracking, approval=approval)
    else:
        _log_barred(situation)
        words = log_line("no candidate differs from the champion and from the models that were rolled back")
        gate.settle(root, words, situation.registry)
    reconcile(root)


def _decide(root: Path, situation: gate.Situation, *, tracking: bool, approval: bool) -> None:
    """Compare the candidates with the champion, register the best one, and remember the decision."""
    _log_barred(situation)
    if situation.champion is not None:
        restore_champion(str(root), situation.champion)
    decision = gate.ask(str(root), situation.champion, situation.candidates, str(flow_run.get_id() or ""), tracking)
    version = gate.register(str(root), decision, situation.champion)
    words = _act(root, decision, version, situation.champion, approval)
    after = gate.look_up(str(root))
    expected = version if decision["promote"] and not approval else situation.champion
    if _number(after.champion) == _number(
        expected
    ):  # else a promotion by hand came between, and the next run decides again
        gate.settle(root, words, after.registry)


def _number(version: Version | None) -> int | None:
    return None if version is None else version.number


def _log_barred(situation: gate.Situation) -> None:
    for name, version in situation.barred.items():
        log_line(
            f"{name} is not considered, because {version.name} was rolled back by hand: {version.words(ROLLED_BACK)}"
        )


def _act(root: Path, decision: dict[str, Any], version: Version, champion: Version | None, approval: bool) -> str:
    """Carry the decision out and return the result in words."""
    if not decision["promote"]:
        words = f"{version.name} was refused, {decision['reference']} stays: " + "; ".join(decision["refusals"])
        event = "refused"
    elif approval:
        words = f"{version.name} passed the gate and waits for approval: {_ask_for_approval(version)}"
        event = "waiting"
    elif gate.make_champion(str(root), version.number, _number(champion)) is None:
        words = (
            f"{version.name} passed the gate against {decision['reference']}, and production was changed by hand meanwhile, so it is not"
            " promoted; the next run judges again"
        )
        event = "refused"
    else:
        words, event = f"{version.name} is champion, in place of {decision['reference']}", "promoted"
    gate.publish(root, decision, words)
    log_line(words)
    log_line(f"why: {PAGE}")
    notify(event, words, links(root, version))
    return words


def _ask_for_approval(version: Version) -> str:
    """Start the deployment of flows.promote, which pauses in Prefect's UI; without a deployment, return the command to type."""
    from prefect.deployments import run_deployment
    from prefect.exceptions import ObjectNotFound

    try:
        run: Any = run_deployment(
            "promote/promote", parameters={"version": version.number, "approval": True}, timeout=0, as_subflow=False
        )
    except ObjectNotFound:
        return f"python -m flows.promote {version.number}"
    return f"in Prefect's UI, flow run {run.name}"


def links(root: Path, version: Version) -> dict[str, str | None]:
    """Return links to the flow run, the version's page and the page of reasons."""
    from pipelines.config.params import load_params

    registry = Registry(root, load_params(root / "params.yaml").project.experiment)
    page = root / PAGE
    return {
        "flow run": flow_run.get_flow_run_ui_url(),
        "model": registry.link(version.number),
        "why": page.absolute().as_uri() if page.is_file() else None,
    }
