from pathlib import Path

import pytest

from flows.retrain import retrain
from tests.workspace import dvc

pytestmark = pytest.mark.usefixtures("prefect_url")


def test_new_data_runs_the_chain_and_no_new_data_stops_at_once(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (finished / "join.txt").read_text() == "7"
    (finished / "times.jsonl").unlink()
    before = (finished / "inbox.dvc").read_text()
    retrain(str(finished), tracking=False)
    assert "nothing to do" in capsys.readouterr().out

    (finished / "inbox" / "number.txt").write_text("10")
    retrain(str(finished), tracking=False)
    assert (finished / "join.txt").read_text() == str((10 + 1 + 1) * 2 + 1)
    assert (finished / "inbox.dvc").read_text() != before
    assert dvc(finished, "status", "--json").strip() == "{}"


def test_an_import_is_updated_from_its_source(workspace: Path, tmp_path: Path) -> None:
    source = tmp_path / "number.txt"
    source.write_text("3")
    dvc(workspace, "import-url", "-q", str(source), "number.txt")
    (workspace / "dvc.yaml").write_text(
        "stages:\n  start:\n    cmd: python work.py start number.txt\n"
        "    deps: [work.py, number.txt]\n    outs: [start.txt]\n"
    )
    source.write_text("41")
    retrain(str(workspace), tracking=False)
    assert (workspace / "start.txt").read_text() == "42"
