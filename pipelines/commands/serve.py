"""Serve models over an OpenAI-compatible interface on this machine; the champion is replaced when a promotion changes it.

    posttrain serve                            # the champion
    posttrain serve champion challenger dpo-0  # a request's `model` chooses
    posttrain serve --shadow challenger        # the challenger answers every request too, and only the log sees its answers
    export OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=$(cat .posttrain/secrets/model)

Answers at /v1/models, /v1/completions, /v1/chat/completions (for models with a chat template) and /health. Each answer names the version
of its weights in `system_fingerprint` and in the header X-Model-Version. The new champion answers as soon as models/champion holds it;
requests in progress are finished by the one before. Options that are not implemented are refused. The same seed gives the same answer,
whatever else is asked at the time.

tracking.served in params.yaml is the share of requests whose prompts and answers are logged, in .posttrain/served and as MLflow traces;
0, as shipped, logs nothing. Requests that a shadow answers are always logged.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.commands.ui import free_port
from pipelines.config.params import load_params
from pipelines.promotion.local_store import read_versions
from pipelines.promotion.named import find_model, no_champion
from pipelines.promotion.registry import CHAMPION, Registry
from pipelines.runtime import credentials, environment, web
from pipelines.runtime.command_line import PORT, command_parser, ends_with_ctrl_c, real, reports_errors, whole
from pipelines.runtime.redaction import printable
from pipelines.tracking.served import FOLDER as LOGGED
from pipelines.tracking.served import ServedTraces
from posttrain import network
from posttrain.errors import DataError, TrackingError

if TYPE_CHECKING:
    from pipelines.serving.models import Served

SECRET = "model"


def registered(project: Path, experiment: str) -> Callable[[str], str]:
    """Return the function that finds the number of a registered version by the hash of its weights."""

    def version(md5: str) -> str:
        try:
            versions = read_versions(project, experiment) or Registry(project, experiment).versions()
        except TrackingError as error:
            print(f"serve: answers name only the hash of the weights: {printable(str(error))}", file=sys.stderr)
            return ""
        return next((str(each.number) for each in versions if each.holds(md5)), "")

    return version


def open_served(project: Path, name: str, experiment: str) -> Served:
    """Load one model by alias, version number, name or folder. Raises DataError if there is no such model."""
    from pipelines.serving.models import POINTER, load_champion, serve_folder
    from pipelines.tracking.content import folder_md5

    version = registered(project, experiment)
    if name == CHAMPION:
        if not (project / POINTER).is_file():
            raise no_champion(project, experiment)
        served = load_champion(project, version)
        if served is None:
            raise DataError(
                "models/champion does not hold the weights that champion.dvc names: `dvc checkout champion.dvc`, or wait until the"
                " promotion has ended"
            )
        return served
    if (Path(name) / "config.json").is_file():
        return serve_folder(name, Path(name), folder_md5(Path(name)))
    found = find_model(project, name, experiment)
    folder = found.folder(project)
    if folder_md5(folder) != found.md5:
        raise DataError(
            f"{folder} does not hold the weights of {name} (md5 {found.md5}): a file was changed or is damaged, and answers would name"
            f" weights that did not give them. Type `dvc checkout --force {found.path}`; to serve the folder as it is, give its path."
        )
    return serve_folder(name, folder, found.md5, version(found.md5))


def serve(
    project: Path, names: list[str], port: int, max_tokens: int, shadow: str | None = None, shadow_share: float = 1.0
) -> None:
    """Load the models and serve them until Ctrl-C or SIGTERM."""
    from transformers.utils import logging

    from pipelines.serving.answer_log import AnswerLog
    from pipelines.serving.models import Models, Watch
    from pipelines.serving.observation import Observer
    from pipelines.serving.server import application

    logging.disable_progress_bar()
    params = load_params(project / "params.yaml")
    experiment = params.project.experiment
    second = None if shadow is None else open_served(project, shadow, experiment)
    models = Models({name: open_served(project, name, experiment) for name in names})
    watch = Watch(project, models, registered(project, experiment))
    token = credentials.secret(project, SECRET)
    observer = None
    if second is not None or params.tracking.served:
        log = AnswerLog(project, params.tracking.served, ServedTraces(project, experiment))
        observer = Observer(log, second, shadow_share)

    def ready() -> None:
        lines = [f"{served.name}: {served.fingerprint}" for served in models.all()]
        if second is not None:
            lines.append(f"{second.name}: {second.fingerprint} is the shadow of {shadow_share:.0%} of the requests")
        if observer is not None:
            lines.append(
                f"logs {max(params.tracking.served, shadow_share * bool(second)):.0%} of the requests in {LOGGED}"
            )
        lines += [
            f"answers at http://{network.HOST}:{port}/v1 with the key in {credentials.FOLDER / SECRET}",
            "Ctrl-C stops",
        ]
        print("\n".join(map(printable, lines)), flush=True)

    if CHAMPION in names:
        watch.start()
    try:
        web.run(application(models, port, token, max_tokens, observer), port, ready)
    finally:
        if CHAMPION in names:
            watch.stop()
        models.close()
        if observer is not None:
            observer.close()


def _absolute(name: str) -> str:
    """Return a model folder's absolute path, or any other name as it is."""
    return str(Path(name).absolute()) if name and (Path(name) / "config.json").is_file() else name


@reports_errors
@ends_with_ctrl_c
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain serve", __doc__)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="alias, version number, model, or folder (default: champion)",
    )
    parser.add_argument("--port", type=PORT, default=8000, help="port on 127.0.0.1; 0 takes a free one (default: 8000)")
    parser.add_argument(
        "--max-tokens",
        type=whole(1),
        default=256,
        help="longest answer to a request that names no limit (default: 256)",
    )
    parser.add_argument("--shadow", metavar="MODEL", help="a model whose answers are logged and never returned")
    parser.add_argument(
        "--shadow-share",
        type=real(0, 1),
        default=1.0,
        help="share of the requests that the shadow answers too (default: 1)",
    )
    args = parser.parse_args(argv)
    if not 0 < args.shadow_share <= 1:
        parser.error("--shadow-share must be above 0 and at most 1")
    if args.max_tokens < 1:
        parser.error("--max-tokens must be 1 or more")
    environment.quiet()
    project = environment.root()
    *names, shadow = [_absolute(name) for name in (*args.models, args.shadow or "")]
    os.chdir(project)
    environment.require_writable(project)
    port = free_port(args.port, "posttrain serve … --port 0", 'make serve-model ARGS="… --port 0"')
    serve(project, names or [CHAMPION], port, args.max_tokens, shadow or None, args.shadow_share)
    return 0


if __name__ == "__main__":
    sys.exit(main())
