"""Put a model into production by hand, or take one out of it.

    python -m flows.promote                   the challenger becomes champion
    python -m flows.promote 3                 version 3 becomes champion
    python -m flows.promote --roll-back --reason "answers in French"
    python -m flows.promote 3 --approval      pauses until a person answers in Prefect's UI

`python -m pipelines.commands.models` shows the versions. A roll-back gives production to the previous champion at once, and bars the
weights that were rolled back from the gate.
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
from tasks.console import say, tell
from tasks.notify import notify

APPROVAL_HOURS = 24 * 7


class Approval(RunInput):
    """What a person answers in Prefect's UI."""

    approve: bool = True
    comment: str = ""


@flow(name="promote", persist_result=False, **HOOKS)
def promote(
    version: int | None = None, roll_back: bool = False, reason: str = "", approval: bool = False
) -> State[None] | None:
    """Make `version` (default: the challenger) champion of the current directory's project, or give production back."""
    if roll_back and (version is not None or approval):
        raise OrchestrationError(
            "a roll-back goes to the previous champion, at once: it takes neither a version nor an approval. To make"
            " another version champion, give its number without --roll-back."
        )
    project = Path.cwd()
    registry = registry_of(project)
    if roll_back:
        _roll_back(project, registry, reason or "no reason was given")
        return None
    wanted = registry.version(version) if version is not None else _challenger(registry)
    comment = ""
    if approval:
        notify("waiting", f"{wanted.name} waits for approval: {wanted.tags.get(REASON)}", links(project, wanted))
        answer = pause_flow_run(
            wait_for_input=Approval.with_initial_data(
                description=f"**{wanted.name}** may become champion: {wanted.tags.get(REASON)}. Approve?"
            ),
            timeout=APPROVAL_HOURS * 3600,
        )
        comment = answer.comment
        if not answer.approve:
            return _decline(project, registry, wanted, comment)
    champion = gate.make_champion(str(project), wanted.number)
    _tell("promoted", project, champion, f"{champion.name} is champion, promoted by hand. {comment or reason}".rstrip())
    _restore(project, champion)
    return None


def registry_of(project: Path) -> Registry:
    return Registry(project, load_params(project / "params.yaml").project.experiment)


def _roll_back(project: Path, registry: Registry, reason: str) -> None:
    champion, before = registry.roll_back(reason)
    _tell("rolled back", project, champion, f"{champion.name} is champion again, in place of {before.name}: {reason}")
    _restore(project, champion)


def _challenger(registry: Registry) -> Version:
    found = registry.holding(CHALLENGER)
    if found is None:
        raise OrchestrationError(
            "there is no challenger: the last candidate was promoted, or none was registered yet. Name a version:"
            " `python -m pipelines.commands.models` shows them."
        )
    return found


def _decline(project: Path, registry: Registry, version: Version, comment: str) -> State[None]:
    words = f"{version.name} was not approved: {comment or 'no comment'}"
    registry.tag(version.number, {"decision": "declined", REASON: words})
    _tell("refused", project, version, words)
    return Cancelled(message=words)


def _tell(event: str, project: Path, version: Version, words: str) -> None:
    tell(words)
    notify(event, words, links(project, version))


def _restore(project: Path, champion: Version) -> None:
    """models/champion follows at once, unless a flow is at work with it."""
    try:
        with only_flow(project):
            restore(project, champion)
    except WorkspaceBusy as error:
        tell(f"models/champion does not hold {champion.name} yet: {error}")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("version", nargs="?", type=int, help="number of the version (default: the challenger)")
    parser.add_argument("--roll-back", action="store_true", help="give production to the previous champion")
    parser.add_argument("--reason", default="", help="kept with the version and told to the webhook")
    parser.add_argument("--approval", action="store_true", help="wait for a person's answer in Prefect's UI")


def _call(options: argparse.Namespace) -> Any:
    if options.approval:
        say("waits for an answer in Prefect's UI; PREFECT_API_URL must name a server")
    return promote(options.version, options.roll_back, options.reason, options.approval, return_state=True)


if __name__ == "__main__":
    sys.exit(main("promote", __doc__, _call, _arguments, alone=False))
