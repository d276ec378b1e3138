"""From finished evaluations to the registry: ask the gate, promote or refuse, say why, tell whoever wants to know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect.runtime import flow_run

from pipelines.gate import PAGE
from pipelines.promotion.registry import Registry, Version
from tasks import gate
from tasks.champion import restore, restore_champion
from tasks.console import tell
from tasks.notify import notify


def judge(root: Path, *, tracking: bool, approval: bool) -> None:
    """Decide about what the evaluations found, once: a state that was decided about is left alone."""
    words = gate.settled(root)
    if words is not None:
        tell(f"nothing new, nothing to decide: {words}")
        return
    standing = gate.look_up(str(root))
    for name, version in standing.barred.items():
        tell(f"{name} is not asked: {version.name} was rolled back by hand: {version.tags.get('rolled_back')}")
    if not standing.candidates:
        assert standing.champion is not None or standing.barred
        gate.settle(root, tell("no candidate differs from the champion and from what was rolled back"))
        return
    if standing.champion is not None:
        restore_champion(str(root), standing.champion)
    decision = gate.ask(str(root), standing.champion, standing.candidates, str(flow_run.get_id() or ""), tracking)
    version = gate.register(str(root), decision)
    gate.settle(root, _act(root, decision, version, approval))


def _act(root: Path, decision: dict[str, Any], version: Version, approval: bool) -> str:
    """Carry the decision out; what was done, in words."""
    if not decision["promote"]:
        words = f"{version.name} was refused, {decision['reference']} stays: " + "; ".join(decision["refusals"])
        event = "refused"
    elif approval:
        words = f"{version.name} passed the gate and waits for approval: {_ask_for_approval(version)}"
        event = "waiting"
    else:
        champion = gate.make_champion(str(root), version.number)
        restore(root, champion)
        words, event = f"{version.name} is champion, in place of {decision['reference']}", "promoted"
    gate.publish(root, decision, words)
    tell(words)
    tell(f"why: {PAGE}")
    notify(event, words, links(root, version))
    return words


def _ask_for_approval(version: Version) -> str:
    """Start the deployment of flows.promote, which pauses in Prefect's UI; without one, the command to type."""
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
    """Where to look: the flow's run, the version's page, the reasons."""
    from pipelines.config.params import load_params

    registry = Registry(root, load_params(root / "params.yaml").project.experiment)
    page = root / PAGE
    return {
        "flow run": flow_run.get_flow_run_ui_url(),
        "model": registry.link(version.number),
        "why": page.absolute().as_uri() if page.is_file() else None,
    }
