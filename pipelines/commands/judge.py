"""Let a model judge a labelling session, and compare it with the people who judged the same items.

    posttrain judge NAME            # NAME is a folder of labels/, which `posttrain label` made
    posttrain judge NAME --dry-run  # counts the questions, asks none

The model is `judge.model`, at the OpenAI-compatible address in POSTTRAIN_JUDGE_URL with the key in POSTTRAIN_JUDGE_API_KEY, or a model of
this project. It compares two answers in both orders; if the order changes its mind, the verdict is a tie. Replies are cached, so a
second call asks nothing. Its judgements go to the inbox only if it agrees with people: `judge.alone` says on how many items and how
much. Stop the session's page first.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from pipelines.commands.chat import open_models
from pipelines.commands.label import folder_or_model_md5
from pipelines.config.judge_schema import JudgeParams
from pipelines.config.params import Params, load_params
from pipelines.data.handover import needs_scores
from pipelines.data.inbox import location
from pipelines.labelling.judgements import Desk
from pipelines.labelling.judging import Agreement, LocalJudge, agreement, annotator_name, judged_by, label
from pipelines.labelling.preferences import hand_over, write_results
from pipelines.labelling.session import AGAIN, FOLDER, open_session
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, print_text, reports_errors
from pipelines.runtime.prices import FILE as PRICES
from pipelines.runtime.prices import read_prices
from pipelines.runtime.redaction import printable
from pipelines.tracking.judge_runs import copy_to_mlflow, record_usage
from posttrain.errors import ConfigError
from posttrain.judges import API_KEY, URL, ChatClient, Judge, Rubric, Usage

CACHE = Path(".posttrain/judges")


def open_judge(project: Path, params: Params) -> Judge:
    """Return the configured judge. Raises ConfigError if none is configured."""
    section, url = params.judge, os.environ.get(URL, "")
    if section.model is None:
        raise ConfigError(
            "judge.model is not set: type `posttrain configure judge.model=NAME`, where NAME is a model at the OpenAI-compatible address in"
            f" {URL}, or a model of this project such as champion"
        )
    if url:
        client = ChatClient(
            url, section.model, os.environ.get(API_KEY, ""), section.max_tokens, timeout_seconds=section.timeout_seconds
        )
        return Judge(client, project / CACHE, section.concurrent)
    md5 = folder_or_model_md5(project, section.model, params.project.experiment)
    ((name, model),) = open_models(project, [section.model])
    return Judge(LocalJudge(name, md5, model, section.max_tokens), project / CACHE, 1)


def may_label_alone(found: Agreement, params: JudgeParams) -> bool:
    """Return True if the judge agrees with people on enough items."""
    value = found.chance_corrected
    return found.items >= params.alone.items and value is not None and value >= params.alone.agreement


def describe(found: Agreement, ask: str, params: JudgeParams) -> list[str]:
    """Return the agreement, and whether it suffices, as lines of text."""
    measure = "Krippendorff's alpha" if ask == "scores" else "Cohen's kappa"
    lines = [f"agreement with people on {found.items} items: {measure} {_number(found.chance_corrected)}"]
    lines.append(f"agreement between people: Krippendorff's alpha {_number(found.people)}")
    if not may_label_alone(found, params):
        lines.append(
            f"not handed to the inbox: judge.alone asks for {measure} {params.alone.agreement:g} on {params.alone.items} items. Let people"
            " judge more of the same items with `posttrain label`, or change judge.model or judge.criteria."
        )
    return lines


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"


def judge_session(project: Path, name: str, params: Params, dry_run: bool) -> tuple[list[str], Path | None]:
    """Let the judge label one session. Return the outcome as lines of text, and the folder of the run with its cost."""
    session = open_session(FOLDER / name)
    rubric = Rubric(params.judge.criteria) if params.judge.criteria else Rubric()
    annotator = annotator_name(params.judge.model or "", rubric)
    desk = Desk(session)
    try:
        if dry_run:
            done = {each.task for each in desk.judgements() if each.annotator == annotator}
            left = [task for task in session.tasks(annotator) if task not in done and not task.endswith(AGAIN)]
            each = 2 if session.ask == "pairs" else len(session.items[0].answers) if session.items else 0
            line = f"{len(left)} items of {session.folder} are left: {each * len(left)} questions, if none is cached"
            return [line], None
        read_prices(project)  # a damaged list is reported before a question is paid
        judge, began = open_judge(project, params), time.time()
        try:
            count = label(desk, judge, rubric, annotator)
        finally:
            paid = record_usage(project, name, params, judge.usage, began)
        found = agreement(FOLDER, annotator, session.ask)
        kinds = ", ".join(f"{number} {kind}" for kind, number in judged_by(desk.judgements(), annotator).items())
        usage = judge.usage
        lines = [
            f"{annotator}: {count} items judged now; all of the session: {kinds}",
            f"{usage.asked} questions asked, {usage.cached} answered by the cache;"
            f" {usage.prompt_tokens} + {usage.completion_tokens} tokens, cost {price(project, params.judge, usage)}",
            *describe(found, session.ask, params.judge),
        ]
        if may_label_alone(found, params.judge) and not session.held_out:
            handed = hand_over(desk, location(project), scores=needs_scores(project), trusted=annotator)
            lines.append(f"{handed} judgements handed to the inbox")
        else:
            write_results(desk)
        return lines, paid
    finally:
        desk.close()


def price(project: Path, params: JudgeParams, usage: Usage) -> str:
    """Return the money for the sent requests by prices.yaml, or the line that it lacks."""
    prices, model = read_prices(project), params.model or ""
    money = None if prices is None else prices.of_judges({model: (usage.prompt_tokens, usage.completion_tokens)})
    if prices is None or money is None:
        return f"unknown: {PRICES} has no price of the judge; write there: judge_tokens: {{{model}: {{input: 0.5, output: 2.0}}}}"
    return f"{money:.4f} {prices.currency}"


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = _parse(argv)
    environment.quiet()
    project = environment.root()
    os.chdir(project)
    lines, paid = judge_session(project, args.session, load_params(project / "params.yaml"), args.dry_run)
    print_text("\n".join(map(printable, lines)))
    if paid is not None:
        copy_to_mlflow(project, paid)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("posttrain judge", __doc__)
    parser.add_argument("session", metavar="NAME", help="a session of labels/")
    parser.add_argument("--dry-run", action="store_true", help="count the questions, ask none")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
