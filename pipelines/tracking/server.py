"""Run `mlflow server` with pages that open on the training runs and their results.

    python -m pipelines.tracking.server server --app-name basic-auth --port 5000 …      (the options of `mlflow`)

MLflow's pages keep in the browser whether they show agents or training runs, and begin with agents: a click on an experiment then opens
a page without runs. This server gives each browser the other beginning, keeps MLflow's assistant closed until it is opened, and leaves
out the hints of a first visit, which dim the page. A choice that the user has made in the browser is kept. The pages get the metrics of
a run in the order of the charts: the page of a run lists them in that order, and the comparison of two runs opens on the first one.

MLflow holds the whole body of a request before it asks for a password, so that anybody on the machine could fill its memory: bodies have a
limit here. Artifacts are streamed after the password, and have none.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from pipelines.runtime import environment
from pipelines.runtime.web import BodyLimit
from pipelines.tracking.describe import headline_metric, present_params
from pipelines.tracking.views import chart_order
from posttrain.errors import PosttrainError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from flask import Flask, Request, Response

SERVER = "pipelines.tracking.server"
BEGINNINGS = {
    "mlflow.workflowType_v1": "machine_learning",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,
    "mlflow.detectIssues.guidanceShown_v1": True,
    "mlflow.flagForReview.guidanceShown_v1": True,
}
"""Entries of the browser's local storage that MLflow's pages read, and their first values."""
MOST_BYTES = 64 << 20
"""Largest body of a request; MLflow's clients send at most a few megabytes at once."""
STREAMED = ("/api/2.0/mlflow-artifacts/artifacts/", "/ajax-api/2.0/mlflow-artifacts/artifacts/")
_PAGE = "/"
_RUNS = ("/graphql", "/ajax-api/2.0/mlflow/runs/get", "/ajax-api/2.0/mlflow/runs/search")
"""Addresses from which the pages read runs with their metrics; the page of a run asks the first."""
_HEAD = b"<head>"


def with_beginnings(page: bytes) -> bytes:
    """Return MLflow's page with a script, before its own, that writes each beginning into a storage without one."""
    values = json.dumps({name: json.dumps(value) for name, value in BEGINNINGS.items()})
    script = (
        f"<script>for (const [name, value] of Object.entries({values}))"
        " if (localStorage.getItem(name) === null) localStorage.setItem(name, value)</script>"
    )
    return page.replace(_HEAD, _HEAD + script.encode(), 1)


def in_chart_order(answer: dict[str, Any], headline: str) -> dict[str, Any]:
    """Return an answer of MLflow about one run or several, with the metrics of each run in the order of the charts.

    Each part may be absent or null: GraphQL answers so if a run does not exist or was not asked for.
    """
    asked = (answer.get("data") or {}).get("mlflowGetRun") or answer
    for run in [*(asked.get("runs") or []), asked.get("run") or {}]:
        metrics = (run.get("data") or {}).get("metrics") or []
        metrics.sort(key=lambda metric: chart_order(metric["key"], headline))
    return answer


def create_app() -> Flask | FastAPI:
    """Return MLflow's application with accounts, which answers browsers with the changed page and the ordered metrics."""
    from flask import request
    from mlflow.server import app, auth

    headline = _headline()

    @app.before_request
    def read_whole_page() -> None:
        if request.path == _PAGE:  # a browser may have kept the page of an MLflow server without the script
            for name in ("HTTP_IF_NONE_MATCH", "HTTP_IF_MODIFIED_SINCE"):
                request.environ.pop(name, None)

    @app.after_request
    def change(response: Response) -> Response:
        return _changed(request, response, headline)

    return with_limit(auth.create_app(app))


def with_limit(made: Flask | FastAPI) -> Flask | FastAPI:
    """Return MLflow's application with a limit of bodies; under a WSGI server (Windows) it is returned as it is."""
    from fastapi import FastAPI

    if isinstance(made, FastAPI):
        made.add_middleware(BodyLimit, most=MOST_BYTES, streamed=STREAMED)
    return made


def _changed(request: Request, response: Response, headline: str) -> Response:
    """Return the response to a browser, changed if it is the page or has runs."""
    if response.status_code != 200 or request.path not in (_PAGE, *_RUNS):
        return response
    response.direct_passthrough = False
    if request.path in _RUNS:
        response.set_data(json.dumps(in_chart_order(json.loads(response.get_data()), headline)))
        return response
    response.set_data(with_beginnings(response.get_data()))
    for name in ("ETag", "Last-Modified"):
        response.headers.pop(name, None)
    return response


def _headline() -> str:
    """Return the metric by which params.yaml ranks models; none if the file cannot be read, so that the pages still open."""
    try:
        return headline_metric(present_params(environment.root()))
    except (PosttrainError, OSError) as error:
        print(f"mlflow: the metrics are shown without a headline: {error}", file=sys.stderr, flush=True)
        return ""


def _find_app(app_name: str) -> str:
    """Return the address of `create_app` in place of MLflow's application of that name."""
    return f"{SERVER}:{create_app.__name__}"


def main() -> None:
    """Run MLflow's command line; its server loads `create_app` of this module."""
    from mlflow import cli, server

    server._find_app = _find_app
    cli.cli(sys.argv[1:], prog_name="mlflow")


if __name__ == "__main__":
    main()
