"""One browser, and one MLflow server over recorded runs of three algorithms with two seeds, for all tests of pages."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines.commands.sync import synchronise
from pipelines.compare import question_of, ranking
from pipelines.config.params import load_params
from pipelines.report.analysis import compare
from pipelines.report.costs import write_costs
from pipelines.report.load import load
from pipelines.report.words import title
from pipelines.report.write import write
from pipelines.runtime.ranking import RECORD
from tasks.challenger import register
from tests.pages.browsing import Site, browser_path, serving
from tests.pipelines.synthetic_runs import build, close, content, finished

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ALGORITHMS, SEEDS = ("dpo", "grpo", "ppo"), (0, 1)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Return this machine's Chromium."""
    found = browser_path()
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="make setup installs playwright")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found)
        yield running
        running.close()


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Return a project with finished runs and their report, as `make demo` leaves them."""
    project = build(tmp_path_factory.mktemp("pages"), ALGORITHMS, SEEDS, prompts=40, steps=6, attack=False)
    shutil.rmtree(project / "runs" / "evaluate" / "gspo-0")  # its damaged left-over is for the report's tests
    shipped = (root / "params.yaml").read_text(encoding="utf-8")
    chosen, count = re.subn(r"algorithms: \[.*?\]", f"algorithms: [{', '.join(ALGORITHMS)}]", shipped, count=1)
    assert count == 1
    assert "  seeds: [0]\n" in chosen
    (project / "params.yaml").write_text(chosen.replace("  seeds: [0]\n", "  seeds: [0, 1]\n"), encoding="utf-8")
    params = load_params(project / "params.yaml")
    results = load(ALGORITHMS, SEEDS, project)
    comparison = compare(results, question_of(params))
    write(project / "report", results, comparison, params.report.samples_shown, 0)
    recorded = finished(project, Path("runs/compare"), "compare", {}, params)
    recorded.recorder.tag(RECORD, ranking(results, comparison))
    close(recorded, {"pairs/tested": len(comparison.pairs)})
    for name in ALGORITHMS:
        _measured(project, f"align-{name}-0", seconds=12.0)
    write_costs(project)
    return project


def _measured(project: Path, name: str, seconds: float) -> None:
    """Write the measurements of a run of so many seconds."""
    folder = project / ".posttrain" / "runs" / f"{name}-{'k' * 16}"
    folder.mkdir(parents=True)
    records = [{"kind": "start", "time": 100.0}, {"kind": "end", "time": 100.0 + seconds}]
    (folder / "measurements.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="session")
def site(recorded: Path) -> Iterator[Site]:
    """Return the server that `posttrain ui` starts, over the recorded runs, with the best model registered."""
    with ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).delenv("MLFLOW_TRACKING_URI", raising=False)
        params = load_params(recorded / "params.yaml")
        synchronise(recorded, 0.0)
        out = {"path": "models/align/grpo-0", "md5": content("grpo")[:32] + ".dir", "size": 1, "nfiles": 1}
        (recorded / "dvc.lock").write_text(
            f"schema: '2.0'\nstages:\n  align@grpo-0:\n    cmd: python -m pipelines.align\n    outs:\n    - {out}\n"
        )
        results = load(ALGORITHMS, SEEDS, recorded)
        register.fn(str(recorded), "grpo-0", title(compare(results, question_of(params))))
        yield stack.enter_context(serving(recorded))


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """Return a page of a desktop browser that is signed in to MLflow."""
    with site.signed_in(browser) as context:
        yield context.new_page()
