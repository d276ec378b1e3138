"""Let people compare answers of models on a page, and put their judgements into the inbox.

    posttrain label                            # two answers of the champion to each of 50 training prompts
    posttrain label champion challenger        # one answer of each; no annotator sees which is which
    posttrain label champion --ask scores --answers 4
    posttrain label --shadow                   # answers of `posttrain serve` and its shadow to the same requests
    posttrain label champion --held-out --prompts .posttrain/served     # fresh prompts for the evaluation, instead of preferences
    posttrain label --summary NAME             # agreement and biases of a session
    posttrain label --import FILE              # judgements that were exported from Label Studio or Argilla

Prints the page's address, which holds a secret. Everyone who judges opens it and gives a name. The page is reachable only from this
machine; from a different one, use `ssh -L 5050:127.0.0.1:5050 HOST`. Each judgement is on disk before the next item appears. When an
annotator has finished, or the server stops, judgements go to inbox/preferences, where `make retrain` takes them in. The same command
continues the same session; other models, prompts or options begin a new one. A session without judgements is removed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.commands.chat import open_models
from pipelines.commands.ui import free_port
from pipelines.config.params import Params, load_params
from pipelines.data.files import read_file
from pipelines.data.handover import needs_scores
from pipelines.data.inbox import location
from pipelines.data.tables import read_rows
from pipelines.labelling.held_out import gold_answer
from pipelines.labelling.imports import read_export
from pipelines.labelling.judgements import Desk
from pipelines.labelling.preferences import hand_over, write_results
from pipelines.labelling.sampling import CANDIDATES, Sampling, closest, most_disputed, sample_items
from pipelines.labelling.session import ASKS, FOLDER, Session, open_session
from pipelines.labelling.shadow import shadow_items
from pipelines.labelling.summary import describe, summarise
from pipelines.promotion.named import find_model
from pipelines.runtime import credentials, environment, web
from pipelines.runtime.command_line import (
    PORT,
    SEED,
    TEMPERATURE,
    command_parser,
    ends_with_ctrl_c,
    print_text,
    reports_errors,
    whole,
)
from pipelines.runtime.identity import content_digest, file_digest
from pipelines.runtime.redaction import printable
from pipelines.tracking.served import read_served
from pipelines.training.answer_scores import reward_scores, reward_spreads
from pipelines.validation.leakage import prompt_keys
from posttrain import network
from posttrain.errors import DataError

PROMPTS = Path("data/valid/preferences.parquet")
"""Training pairs. Their prompts are not held out, and a new pair of such a prompt stays on its side of the split."""


def prompts(path: Path) -> list[Any]:
    """Return the different prompts of a table, a file, or a folder of JSONL files, in their order. Raises DataError if there are none."""
    if path == PROMPTS and not path.is_file():
        raise DataError(f"{path} does not exist yet: type `make demo`, or give --prompts FILE with a column `prompt`")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    rows = read_rows(path) if path == PROMPTS else [row for file in files for row in read_file(file)]
    if any("prompt" not in row for row in rows):
        raise DataError(f"{path}: a record has no `prompt`; give a file whose records all have one")
    return list({json.dumps(row["prompt"], sort_keys=True): row["prompt"] for row in rows}.values())


def usable(found: Sequence[Any], tables: Path, *, held_out_session: bool = False) -> list[Any]:
    """Return the prompts whose rows the intake will accept, and report the others.

    A pair must not have a prompt of a held-out table. A prompt that is new to the pairs may become a held-out one, so it must not be in a
    different training table. Prompts of a held-out session must be in no table at all. Raises DataError if no prompt is left.
    """

    def keys(name: str, held_out: bool) -> set[str]:
        path = tables / f"{name}.parquet"
        return {key for row in read_rows(path) for key in prompt_keys(row, held_out)} if path.is_file() else set()

    pairs = keys("preferences", False)
    held_out = {name: keys(name, True) for name in ("evaluation", "preferences_heldout")}
    training = {name: keys(name, False) for name in ("problems", "sft", "labelled")}
    kept, left = list[Any](), Counter[str]()
    for prompt in found:
        as_training, as_held_out = (prompt_keys({"prompt": prompt}, side) for side in (False, True))
        place = next((name for name, known in held_out.items() if as_training & known), None)
        if place is None and held_out_session and as_held_out & pairs:
            place = "preferences"
        if place is None and not as_training & pairs:
            place = next((name for name, known in training.items() if as_held_out & known), None)
        if place is None:
            kept.append(prompt)
        else:
            left[place] += 1
    places = ", ".join(f"{name} has {count}" for name, count in sorted(left.items()))
    if not kept:
        raise DataError(
            f"all {len(found)} prompts are in other tables ({places}), so the intake would refuse their rows"
        )
    if left:
        print(
            f"label: {left.total()} of {len(found)} prompts are left out, since the intake would refuse their rows: {places}",
            file=sys.stderr,
        )
    return kept


def identity(args: argparse.Namespace, weights: Sequence[str], table: Path) -> str:
    """Return the name of a session: equal weights, prompts and options have equal ones."""
    names = ("ask", "answers", "count", "by", "repeat", "seed", "temperature", "max_new_tokens")
    options = {name: getattr(args, name) for name in names}
    options |= {"held_out": True} if args.held_out else {}
    text = json.dumps([options, list(weights), content_digest(table)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def with_defaults(args: argparse.Namespace, params: Params) -> argparse.Namespace:
    """Return the options with the values that they have if they are not given."""
    models = args.models or ["champion"]
    defaults = {
        "models": models,
        "answers": 2 if len(models) == 1 else 1,
        "max_new_tokens": params.evaluation.max_new_tokens,
        "temperature": params.evaluation.temperature,
        "prompts": PROMPTS,
    }
    missing = [name for name in defaults if getattr(args, name) in (None, [])]
    return argparse.Namespace(**(vars(args) | {name: defaults[name] for name in missing}))


def prepare(project: Path, args: argparse.Namespace, params: Params) -> Session:
    """Open the session of these options, or sample a new one."""
    if args.name and (FOLDER / args.name / "items.jsonl").is_file():
        return open_session(FOLDER / args.name)
    if args.shadow:
        return prepare_shadow(project, args)
    args = with_defaults(args, params)
    names, table = args.models, args.prompts
    found = usable(prompts(table), PROMPTS.parent, held_out_session=args.held_out)
    weights = [folder_or_model_md5(project, name, params.project.experiment) for name in names]
    folder = FOLDER / (args.name or identity(args, weights, table))
    if (folder / "items.jsonl").is_file():
        return open_session(folder)
    print(f"label: loading {printable(', '.join(names))}", file=sys.stderr, flush=True)
    opened = zip(weights, open_models(project, names), strict=True)
    models = [(Path(name).name if _is_folder(name) else name, md5, model) for md5, (name, model) in opened]
    sampling = Sampling(args.answers, args.max_new_tokens, args.temperature, args.seed)
    wanted = args.count * (1 if args.by == "random" else CANDIDATES)
    items = sample_items(models, found, wanted, args.ask, sampling)
    if args.by == "unsure":
        items = closest(items, reward_scores(), args.count)
    if args.by == "disagreement":
        items = most_disputed(items, reward_spreads(), args.count)
    session = Session(folder, args.ask, args.seed, args.repeat, tuple(items), args.held_out)
    session.save()
    return session


def prepare_shadow(project: Path, args: argparse.Namespace) -> Session:
    """Return a new session of logged answers. Without --name its name follows from the log and the options."""
    records = read_served(project)
    text = json.dumps([args.count, args.seed, args.repeat, [record["id"] for record in records]])
    folder = FOLDER / (args.name or hashlib.sha256(text.encode()).hexdigest()[:8])
    if (folder / "items.jsonl").is_file():
        return open_session(folder)
    found = usable([record["prompt"] for record in records], PROMPTS.parent) if records else []
    items = shadow_items(records, found, args.count, args.seed)
    session = Session(folder, "pairs", args.seed, args.repeat, tuple(items))
    session.save()
    return session


def folder_or_model_md5(project: Path, name: str, experiment: str) -> str:
    """Return the hash of a model's weights, by which DVC knows a folder."""
    from pipelines.tracking.content import folder_md5

    if _is_folder(name):
        return folder_md5(Path(name))
    return find_model(project, name, experiment).md5


def _is_folder(name: str) -> bool:
    """Return True if a model is named by its folder."""
    return (Path(name) / "config.json").is_file()


def serve(session: Session, project: Path, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM; then hand judgements over and print the summary."""
    from pipelines.labelling.server import application

    inbox, scores = location(project), needs_scores(project)
    gold = gold_answer(load_params(project / "params.yaml")) if session.held_out else None
    desk, token = Desk(session), credentials.secret(project, "label")
    address = f"http://{network.HOST}:{port}/#token={token}"

    def ready() -> None:
        print(
            f"{len(session.items)} items of {session.folder}\njudge them at {address}\nCtrl-C hands judgements over and stops",
            flush=True,
        )

    def give(annotator: str | None) -> int:
        return hand_over(desk, inbox, scores=scores, gold=gold, only=annotator)

    try:
        web.run(application(desk, give, port, token), port, ready)
        finish(desk)
    finally:
        desk.close()


def finish(desk: Desk) -> None:
    """Write and print the results. A session without judgements is removed; the same command samples it again."""
    if desk.is_untouched:
        shutil.rmtree(desk.session.folder)
        print_text(f"no judgements; {printable(str(desk.session.folder))} is removed")
        return
    write_results(desk)
    print_text("\n".join(map(printable, describe(summarise(desk.session, desk.judgements())).split("\n"))))


def import_export(project: Path, file: Path, name: str | None) -> None:
    """Make a session of an export, hand its judgements over, and print the summary. A second call for the same file changes nothing."""
    ask, items, judgements = read_export(file)
    allowed = {json.dumps(prompt) for prompt in usable([item.prompt for item in items], PROMPTS.parent)}
    kept = {item.id: item for item in items if json.dumps(item.prompt) in allowed}
    folder = FOLDER / (name or f"{re.sub(r'[^A-Za-z0-9_-]+', '-', file.stem)}-{file_digest(file)[:8]}")
    session = Session(folder, ask, 0, 0, tuple(kept.values()))
    if (folder / "items.jsonl").is_file() and open_session(folder) != session:
        raise DataError(f"{folder} is a different session; choose another --name")
    session.save()
    desk = Desk(session)
    try:
        given = {(each.annotator, each.item): each for each in judgements if each.item in kept}
        for each in given.values():
            desk.judge_item(each.annotator, each.item, f"{each.annotator}/{each.item}", each.value, each.time)
        if left := sum(each.item in kept for each in judgements) - len(given):
            print_text(f"{left} judgements are left out: the same annotator judged the item again later in the file")
        count = hand_over(desk, location(project), scores=needs_scores(project))
        print_text(f"{session.folder}: {len(kept)} items, {count} judgements handed to the inbox")
        print_text("\n".join(map(printable, describe(summarise(session, desk.judgements())).split("\n"))))
    finally:
        desk.close()


def print_summary(name: str) -> None:
    """Print agreement and biases of one session. Raises DataError if it does not exist, or is being served."""
    session = open_session(FOLDER / name)
    desk = Desk(session)
    try:
        print_text("\n".join(map(printable, describe(summarise(session, desk.judgements())).split("\n"))))
    finally:
        desk.close()


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = command_parser("posttrain label", __doc__)
    made.add_argument(
        "models", nargs="*", metavar="MODEL", help="alias, version number, model, or folder (default: champion)"
    )
    made.add_argument("--ask", choices=ASKS, default="pairs", help="which of two is better, scores 1-10, or a ranking")
    made.add_argument("--count", type=whole(1), default=50, help="items to judge (default: 50)")
    made.add_argument(
        "--answers", type=whole(1), help="answers per model and prompt (default: 2 of one model, 1 of several)"
    )
    made.add_argument(
        "--by",
        choices=("random", "unsure", "disagreement"),
        default="random",
        help="unsure: answers whose reward-model scores are closest; disagreement: answers on which the heads of an ensemble differ most",
    )
    made.add_argument(
        "--repeat", type=whole(0), default=0, help="items shown a second time, to measure consistency (default: 0)"
    )
    made.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="records with a `prompt`, such as the folder .posttrain/served (default: prompts of the training pairs)",
    )
    made.add_argument(
        "--shadow", action="store_true", help="compare logged answers of `posttrain serve --shadow` instead of new ones"
    )
    made.add_argument(
        "--held-out",
        action="store_true",
        help="with --prompts: people give scores, and an answer that two or more people all gave 10 makes a held-out problem",
    )
    made.add_argument("--name", help="name of the session in labels/ (default: from models, prompts and options)")
    made.add_argument("--temperature", type=TEMPERATURE, help="default: evaluation.temperature")
    made.add_argument("--max-new-tokens", type=whole(1), help="default: evaluation.max_new_tokens")
    made.add_argument("--seed", type=SEED, default=0)
    made.add_argument("--port", type=PORT, default=5050, help="port on 127.0.0.1; 0 takes a free one (default: 5050)")
    made.add_argument("--summary", metavar="NAME", help="print agreement and biases of a session")
    made.add_argument(
        "--import", dest="imported", type=Path, metavar="FILE", help="take in an export of Label Studio or Argilla"
    )
    return made  # fmt: skip


@reports_errors
@ends_with_ctrl_c
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    command = parser()
    args = command.parse_args(argv)
    if args.count < 1 or (args.answers is not None and not 1 <= args.answers <= 10) or args.repeat < 0:
        command.error("--count must be 1 or more, --answers 1 to 10, --repeat 0 or more")
    if args.shadow and (args.models or args.prompts or args.held_out or args.ask != "pairs" or args.by != "random"):
        command.error(
            "--shadow asks about logged answers in pairs; give no MODEL, --prompts, --held-out, --ask or --by"
        )
    if args.held_out and (args.prompts is None or args.by != "random"):
        command.error("--held-out needs --prompts FILE, since training prompts cannot be held out, and no --by")
    if args.held_out:
        args.ask = "scores"
    if args.name and (Path(args.name).name != args.name or args.name.startswith(".")):
        command.error(f"--name {args.name!r} must be the name of one folder")
    environment.quiet()
    project = environment.root()
    args.prompts = args.prompts and args.prompts.absolute()
    args.imported = args.imported and args.imported.absolute()
    args.models = [str(Path(m).absolute()) if _is_folder(m) else m for m in args.models]
    os.chdir(project)
    if args.imported:
        environment.require_writable(project)
        import_export(project, args.imported, args.name)
        return 0
    if args.summary:
        print_summary(args.summary)
        return 0
    environment.require_writable(project)
    port = free_port(args.port, "posttrain label … --port 0", 'make label ARGS="… --port 0"')
    session = prepare(project, args, load_params(project / "params.yaml"))
    serve(session, project, port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
