"""Promote a model by hand, or roll the champion back.

    python -m flows.promote                   the challenger becomes champion
    python -m flows.promote 3                 version 3 becomes champion
    python -m flows.promote --roll-back --reason "answers in French"
    python -m flows.promote 3 --approval      waits for a person's answer in Prefect's UI
    python -m flows.promote --adopt           registers the weights of models/champion in a registry that does not know them

`posttrain models` lists the versions. The weights are copied to DVC's remote, if there is one, before they become
champion. A roll-back makes the previous champion the champion at once; the gate refuses
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
from flows.names import dated
from flows.production import registry_of, switch
from pipelines.promotion.registry import (
    AGAINST,
    CHALLENGER,
    CHAMPION,
    FILES,
    MD5,
    MEASURE,
    REASON,
    ROLLED_BACK,
    SIZE,
    Registry,
    Version,
)
from pipelines.runtime.command_line import whole
from pipelines.runtime.markup import markdown_text
from posttrain.errors import OrchestrationError
from tasks.cache import cached
from tasks.champion import FOLDER, POINTER, pointer_entry, switching
from tasks.console import log_line
from tasks.measure import measure
from tasks.notify import notify
from tasks.remote import copy_weights

APPROVAL_HOURS = 24 * 7
NOTHING = "nothing was changed"


class Approval(RunInput):
    """A person's answer in Prefect's UI."""

    approve: bool = True
    comment: str = ""


@flow(name="promote", flow_run_name=dated("promote"), persist_result=False, **HOOKS)
def promote(
    version: int | None = None,
    roll_back: bool = False,
    reason: str = "",
    approval: bool = False,
    adopt: bool = False,
) -> State[None] | None:
    """Make `version` (default: the challenger) champion of the current directory's project, or give production back."""
    if adopt and (version is not None or approval or roll_back):
        raise OrchestrationError(
            "--adopt registers the weights of models/champion, so it takes neither a version nor another option."
        )
    if roll_back and (version is not None or approval):
        raise OrchestrationError(
            "a roll-back always goes to the previous champion, so it takes neither a version nor --approval. To make"
            " a different version champion, give its number without --roll-back."
        )
    project = Path.cwd()
    registry = registry_of(project)
    if adopt:
        _adopt(project, registry)
        return None
    if roll_back:
        _roll_back(project, registry, reason or "no reason was given")
        return None
    chosen = registry.version(version) if version is not None else _challenger(registry)
    comment = ""
    judged = version is None or approval
    judged_against = chosen.tags.get(AGAINST, _champion_number(registry))
    # who names a version that was rolled back asks for it nevertheless
    known = None if version is None else chosen.tags.get(ROLLED_BACK)
    if judged:
        _refuse_stale(registry, chosen, judged_against, known)
    if approval:
        notify("waiting", f"{chosen.name} waits for approval: {chosen.words(REASON)}", links(project, chosen))
        answer = pause_flow_run(
            wait_for_input=Approval.with_initial_data(
                description=markdown_text(f"{chosen.name} may become champion: {chosen.words(REASON)}. Approve?")
            ),
            timeout=APPROVAL_HOURS * 3600,
        )
        comment = answer.comment
        if not answer.approve:
            return _decline(project, registry, chosen, comment)

    before: list[Version | None] = []

    def choose() -> Version:
        before.append(registry.holding(CHAMPION))
        if judged:
            _refuse_stale(registry, registry.version(chosen.number), judged_against, known)
        copy_weights(project, chosen.path, chosen.md5, NOTHING)
        return registry.version(chosen.number)

    champion = switch(project, choose, lambda found: registry.promote(found.number, before))
    _announce(
        "promoted", project, champion, f"{champion.name} is champion, promoted by hand. {comment or reason}".rstrip()
    )
    return None


def _roll_back(project: Path, registry: Registry, reason: str) -> None:
    """Roll back to the previous champion and restore its weights."""
    pairs: list[tuple[Version, Version]] = []

    def choose() -> Version:
        pairs.append(registry.roll_back_pair())
        return pairs[-1][1]

    champion, before = switch(project, choose, lambda _: registry.roll_back(reason, pairs[-1]))
    _announce(
        "rolled back", project, champion, f"{champion.name} is champion again, in place of {before.name}: {reason}"
    )


def _adopt(project: Path, registry: Registry) -> None:
    """Register the weights of models/champion and make them champion. Raises OrchestrationError if the registry knows them."""
    with switching(project):
        entry = pointer_entry(project)
        if entry is None:
            raise OrchestrationError(
                f"there is no {POINTER}, so no weights are in production here; run `make retrain`."
            )
        known = next((each for each in registry.versions() if each.holds(str(entry["md5"]))), None)
        if known is not None:
            raise OrchestrationError(
                f"the weights of models/champion are {known.name} already. `python -m flows.promote {known.number}` makes it champion."
            )
        weights = Version(0, {MD5: str(entry["md5"]), SIZE: str(entry["size"]), FILES: str(entry["nfiles"])}, ())
        if not copy_weights(project, FOLDER.as_posix(), weights.md5, NOTHING) and not cached(project, weights.md5):
            raise OrchestrationError(
                f"the weights that {POINTER} names ({weights.md5}) are not in DVC's cache, so {NOTHING}: no roll-back could restore them."
                f" If the file is damaged, type `git checkout {POINTER}`; then run again."
            )
        champion = registry.adopt(FOLDER.as_posix(), entry)
    _announce("promoted", project, champion, f"{champion.name} is champion: its weights were in production before")


def _challenger(registry: Registry) -> Version:
    """Return the challenger. Raises OrchestrationError if there is none."""
    found = registry.holding(CHALLENGER)
    if found is None:
        raise OrchestrationError(
            "there is no challenger: the last candidate was promoted, or none is registered yet. Give a version number:"
            " `posttrain models` lists them."
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


def _champion_number(registry: Registry) -> str:
    """Return the champion's number as the gate records it."""
    champion = registry.holding(CHAMPION)
    return "none" if champion is None else str(champion.number)


def _refuse_stale(registry: Registry, version: Version, judged_against: str, known: str | None = None) -> None:
    """Raise OrchestrationError if the gate's decision is out of date.

    It is, if the version was rolled back since, or was compared with a different champion, or by a different measure, than today's.
    `known` is the reason of an earlier roll-back that the promotion overrules.
    """
    if version.tags.get(ROLLED_BACK, known) != known:
        raise OrchestrationError(
            f"{version.name} was rolled back by hand after it was judged, so the decision is out of date. `python -m flows.promote"
            f" {version.number}` promotes it nevertheless."
        )
    now = _champion_number(registry)
    if now not in (judged_against, str(version.number)):
        raise OrchestrationError(
            f"{version.name} was judged against {_named(judged_against)}, and the champion is now {_named(now)}, so the decision is"
            f" out of date. Run `make retrain` to judge again, or `python -m flows.promote {version.number}` to promote it without"
            " a decision."
        )
    judged_by = version.tags.get(MEASURE)
    if judged_by is not None and judged_by != measure(registry.project):
        raise OrchestrationError(
            f"the evaluation set, or the parameters of evaluation, rewards or gate, have changed since {version.name} was judged, so the"
            f" decision is out of date. Run `make retrain` to judge again, or `python -m flows.promote {version.number}` to promote it"
            " without a decision."
        )


def _named(number: str) -> str:
    return "the supervised model" if number == "none" else f"version {number}"


def _arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flow's arguments."""
    parser.add_argument("version", nargs="?", type=whole(1), help="number of the version (default: the challenger)")
    parser.add_argument("--roll-back", action="store_true", help="make the previous champion the champion again")
    parser.add_argument("--reason", default="", help="stored with the version and sent to the webhook")
    parser.add_argument("--adopt", action="store_true", help="register the weights of models/champion as champion")
    parser.add_argument("--approval", action="store_true", help="wait for a person's answer in Prefect's UI")


def _call(options: argparse.Namespace) -> Any:
    """Run the flow with the parsed options."""
    if options.approval and options.server is None:
        raise OrchestrationError(
            "--approval waits for an answer in Prefect's UI, and without PREFECT_API_URL there is no page to answer on. Set it to a"
            " running server (docs/operations.md), or promote without --approval."
        )
    # pyrefly: ignore[no-matching-overload]
    return promote(
        options.version, options.roll_back, options.reason, options.approval, options.adopt, return_state=True
    )


if __name__ == "__main__":
    sys.exit(main("promote", __doc__, _call, _arguments, exclusive=False))
