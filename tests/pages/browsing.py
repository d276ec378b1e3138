"""Shared by the tests of pages and the pictures of the documentation: a browser, and the MLflow server of a project."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.commands.ui import links, mlflow_server
from pipelines.config.params import load_params
from pipelines.runtime import credentials
from pipelines.tracking.store import experiment_id, open_client
from posttrain import network
from posttrain.guard import signal_at_parents_death

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ViewportSize

DESKTOP: ViewportSize = {"width": 1400, "height": 1000}
PHONE: ViewportSize = {"width": 390, "height": 844}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_MS = 120_000
"""A page that needs longer on a loaded machine has failed."""


def browser_path() -> str | None:
    """Return this machine's Chromium, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Site:
    """A running MLflow server, the project behind it, and the links that `posttrain ui` prints."""

    project: Path
    base: str
    links: dict[str, str]

    def signed_in(self, browser: Browser) -> BrowserContext:
        """Return the context of a desktop browser on its first visit, signed in."""
        account = {"username": credentials.ADMIN, "password": credentials.secret(self.project, "mlflow")}
        context = browser.new_context(viewport=DESKTOP, http_credentials=account)  # type: ignore[arg-type]
        context.set_default_timeout(PATIENCE_MS)
        return context


@contextmanager
def serving(project: Path) -> Iterator[Site]:
    """Run the MLflow server that `posttrain ui` starts for a project."""
    client, experiment = open_client(project), load_params(project / "params.yaml").project.experiment
    server = mlflow_server(project, network.free_port(0))
    messages = project / ".posttrain" / "logs" / "mlflow-pages.log"
    messages.parent.mkdir(parents=True, exist_ok=True)
    here = {"PYTHONPATH": str(Path(__file__).parents[2])}
    with messages.open("wb") as log:
        process = subprocess.Popen(
            server.command, cwd=project, env={**os.environ, **here, **server.environment}, stdout=log, stderr=log,
            start_new_session=True, preexec_fn=signal_at_parents_death,
        )  # fmt: skip
    try:
        url = f"{server.base}{server.health}"
        if not network.wait_until(lambda: network.answers(url), lambda: process.poll() is None, 300):
            raise AssertionError(messages.read_text())
        yield Site(project, server.base, links(client, server.base, experiment_id(client, experiment, project)))
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)
