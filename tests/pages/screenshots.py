"""Take the pictures of the documentation from the finished run of the working directory, as `make demo` leaves it.

python -m tests.pages.screenshots [FOLDER]     (default: docs/images)

If the algorithms ran with several seeds, MLflow's table is saved as mlflow-groups.png, else as mlflow-runs.png.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from pipelines.runtime import environment
from pipelines.runtime.publish import SHARED_REPORT
from pipelines.tracking.store import open_client
from pipelines.tracking.views import FILTER
from tests.pages.browsing import DESKTOP, PATIENCE_MS, PHONE, Site, browser_path, serving

if TYPE_CHECKING:
    from mlflow.entities import Run
    from playwright.sync_api import Browser

COLOURS = 128
LARGEST_BYTES = 120_000


def save(path: Path, taken: bytes) -> None:
    """Save a screenshot with few colours. Raises SystemExit if it is too large for the repository."""
    whole = Image.open(BytesIO(taken)).convert("RGB")
    picture = whole.quantize(
        COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
    )  # keeps the colours of small marks
    picture.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")
    if path.stat().st_size > LARGEST_BYTES:
        raise SystemExit(f"error: {path} is larger than {LARGEST_BYTES:,} bytes")


def report(browser: Browser, page_file: Path, target: Path) -> None:
    """Take the first screen of the report on a desktop, in both languages, and on a phone."""
    for name, viewport, language in (
        ("report", DESKTOP, "English"),
        ("report.zh-CN", DESKTOP, "中文"),
        ("report-phone", PHONE, "English"),
    ):
        page = browser.new_page(viewport=viewport)
        page.goto(page_file.as_uri())
        page.get_by_text(language, exact=True).click()
        save(target / f"{name}.png", page.screenshot())
        page.close()


def mlflow(browser: Browser, project: Path, target: Path) -> None:
    """Take MLflow's experiment, charts and table of the algorithms, two runs side by side, one run with its traces, and model versions."""
    with serving(project) as site, site.signed_in(browser) as context:
        for name, address, shown in _pages(site):
            page = context.new_page()
            page.goto(address)
            expect(page.get_by_text(shown).first).to_be_visible(timeout=PATIENCE_MS)
            if name == "compare":  # its plots fill the first screen; the settings that differ are below
                page.get_by_role("button", name="Visualizations").click()
            if name == "charts":  # its first panel is drawn last
                page.locator("svg .dimension").first.wait_for(state="attached", timeout=PATIENCE_MS)
            page.wait_for_timeout(5000)  # the charts are drawn one after another
            save(target / f"mlflow-{name}.png", page.screenshot())
            page.close()


def _pages(site: Site) -> Iterator[tuple[str, str, str]]:
    """Yield name, address and a text of each page of MLflow."""
    client, links = open_client(site.project), site.links
    experiment = next(part for part in links["every run"].split("/") if part.isdigit())
    found = client.search_runs([experiment], FILTER, order_by=["start_time"])
    run = f"{site.base}/#/experiments/{experiment}/runs/{found[-1].info.run_id}"
    several_seeds = len({each.data.tags.get("seed") for each in found}) > 1
    yield "experiment", f"{site.base}/#/experiments/{experiment}", str(found[-1].info.run_name)
    yield "charts", links["curves of the algorithms"], "ranked/sampled_accuracy"
    table = "groups" if several_seeds else "runs"
    yield table, links["results of the algorithms side by side"], "eval/sampled_accuracy"
    two = json.dumps([each.info.run_id for each in _two_algorithms(found)])
    yield "compare", f"{site.base}/#/compare-runs?runs={two}&experiments={json.dumps([experiment])}", "Run details"
    yield "run", run, "Sampled accuracy"
    yield "traces", f"{run}/traces", "Response"
    for name in links:
        if name.startswith("versions of"):
            yield "registry", links[name], "challenger"


def _two_algorithms(runs: Sequence[Run]) -> list[Run]:
    """Return a run of each of two algorithms: of GRPO and PPO if they ran."""
    by_algorithm = {each.data.tags["algorithm"]: each for each in runs}
    return [
        by_algorithm[name] for name in sorted(by_algorithm, key=lambda name: (name not in ("grpo", "ppo"), name))[:2]
    ]


def main() -> None:
    """Run the command line."""
    project, found = environment.root(), browser_path()
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else project / "docs" / "images"
    if found is None:
        raise SystemExit("error: no Chromium here: apt-get install chromium")
    if (
        not shutil.which("fc-list")
        or not subprocess.run(["fc-list", ":lang=zh"], capture_output=True, check=True).stdout
    ):
        raise SystemExit(
            "error: no font has Chinese characters, so they would be boxes: apt-get install fonts-wqy-microhei"
        )
    target.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found)
        report(browser, project / SHARED_REPORT, target)
        mlflow(browser, project, target)
        browser.close()


if __name__ == "__main__":
    main()
