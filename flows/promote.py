"""Promote a model by hand, or roll the champion back.

    python -m flows.promote                   the challenger becomes champion
    python -m flows.promote 3                 version 3 becomes champion
    python -m flows.promote --roll-back --reason "answers in French"
    python -m flows.promote 3 --approval      waits for a person's answer in Prefect's UI

`python -m pipelines.commands.models` lists the versions. A roll-back makes the previous champion the champion at once; the gate refuses
the rolled-back weights from then on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas import State
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.states import Cancelled

from flows.command import main
from flows.gatekeeping import links
from flows.hooks import HOOKS
from flows.workspace import WorkspaceBusy, only_flow
from pipelines.config.params import load_params
from pipelines.promotion.registry import CHALLENGER, REASON, Registry, Version
from posttrain.errors import OrchestrationError
from tasks import gate
from tasks.champion import restore
from tasks.console import log_line, print_line
from tasks.notify import notify

APPROVAL_HOURS = 24 * 7


class Approval(RunInput):
    """A person's answer in Prefect's UI."""

    approve: bool = True
    comment: str = ""


@flow(name="promote", persist_result=False, **HOOKS)
def promote(
    version: int | None = None, roll_back: bool = False, reason: str = "", approval: bool = False
) -> State[None] | None:
    """Make `version` (default: the challenger) champion of the current directory's project, or give production back."""
    if roll_back and (version is not None or approval):
        raise OrchestrationError(
            "a roll-back always goes to the previous champion, so it takes neither a version nor --approval. To make"
            " a different version champion, give its number without --roll-back."
        )
    project = Path.cwd()
    registry = registry_of(project)
    if roll_back:
        _roll_back(project, registry, reason or "no reason was given")
        return None
    chosen = registry.version(version) if version is not None else _challenger(registry)
    comment = ""
    if approval:
        notify("waiting", f"{chosen.name} waits for approval: {chosen.tags.get(REASON)}", links(project, chosen))
        answer = pause_flow_run(
            wait_for_input=Approval.with_initial_data(
                description=f"**{chosen.name}** may become champion: {chosen.tags.get(REASON)}. Approve?"
            ),
            timeout=APPROVAL_HOURS * 3600,
        )
        comment = answer.comment
        if not answer.approve:
            return _decline(project, registry, chosen, comment)
    champion = gate.make_champion(str(project), chosen.number)
    _announce(
        "promoted", project, champion, f"{champion.name} is champion, promoted by hand. {comment or reason}".rstrip()
    )
    _restore(project, champion)
    return None


def registry_of(project: Path) -> Registry:
    """Return the registry of a project."""
    return Registry(project, load_params(project / "params.yaml").project.experiment)


def _roll_back(project: Path, registry: Registry, reason: str) -> None:
    """Roll back to the previous champion and restore its weights."""
    champion, before = registry.roll_back(reason)
    _announce(
        "rolled back", project, champion, f"{champion.name} is champion again, in place of {before.name}: {reason}"
    )
    _restore(project, champion)


def _challenger(registry: Registry) -> Version:
    """Return the challenger. Raises OrchestrationError if there is none."""
    found = registry.holding(CHALLENGER)
    if found is None:
        raise OrchestrationError(
            "there is no challenger: the last candidate was promoted, or none is registered yet. Give a version number:"
            " `python -m pipelines.commands.models` lists them."
        )
    return found


def _decline(project: Path, registry: Registry, version: Version, comment: str) -> State[None]:
    """Record that a person declined the version."""
    words = f"{version.name} was not approved: {comment or 'no comment'}"
    registry.tag(version.number, {"decision": "declined", REASON: words})
    _announce("refused", project, version, words)
    return Cancelled(message=words)


def _announce(event: str, project: Path, version: Version, words: str) -> None:
    """Log an event and send it to the webhook."""
    log_line(words)
    notify(event, words, links(project, version))


def _restore(project: Path, champion: Version) -> None:
    """Restore models/champion at once, unless a flow is using it."""
    try:
        with only_flow(project):
            restore(project, champion)
    except WorkspaceBusy as error:
        log_line(f"models/champion does not hold {champion.name} yet: {error}")


def _arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flow's arguments."""
    parser.add_argument("version", nargs="?", type=int, help="number of the version (default: the challenger)")
    parser.add_argument("--roll-back", action="store_true", help="make the previous champion the champion again")
    parser.add_argument("--reason", default="", help="stored with the version and sent to the webhook")
    parser.add_argument("--approval", action="store_true", help="wait for a person's answer in Prefect's UI")


def _call(options: argparse.Namespace) -> Any:
    """Run the flow with the parsed options."""
    if options.approval:
        print_line("waits for an answer in Prefect's UI; PREFECT_API_URL must name a server")
    return promote(options.version, options.roll_back, options.reason, options.approval, return_state=True)


if __name__ == "__main__":
    sys.exit(main("promote", __doc__, _call, _arguments, exclusive=False))
