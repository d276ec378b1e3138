"""Parameters, code or data that change while a stage runs are never recorded as if the stage had used them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.runtime.consistency import InputSnapshot
from pipelines.runtime.journal import ended, read
from posttrain.errors import TrackingError
from tests.pipelines.conftest import Project, wait_for

GRAPH = "stages: {count: {cmd: x, deps: [steps.txt, steps/count.py], params: [sft, algorithms.grpo]}}"


def edit(path: str, before: str, after: str) -> Callable[[Project], None]:
    def change(project: Project) -> None:
        text = (project.folder / path).read_text()
        assert before in text
        (project.folder / path).write_text(text.replace(before, after, 1))

    return change


def epochs(project: Project) -> None:
    """Change sft.epochs from 6 to 7."""
    head, section, rest = (project.folder / "params.yaml").read_text().partition("\nsft:")
    assert "epochs: 6" in rest
    (project.folder / "params.yaml").write_text(head + section + rest.replace("epochs: 6", "epochs: 7", 1))


def torn(project: Project) -> None:
    path = project.folder / "params.yaml"
    path.write_bytes(path.read_bytes() + b"\0")


CHANGES: dict[str, tuple[Callable[[Project], None], str]] = {
    "params": (epochs, "sft.epochs changed from 6 to 7 in params.yaml"),
    "torn params": (torn, "params.yaml became unreadable"),
    "code": (edit("steps/count.py", "Counts steps", "Counts"), "the code steps/count.py changed"),
    "data": (edit("steps.txt", "12", "13"), "the data steps.txt changed"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_during_the_run_is_refused_in_words(name: str, project: Project) -> None:
    change, words = CHANGES[name]
    (project.folder / "dvc.yaml").write_text(GRAPH)
    process = project.start(STEP_SECONDS="0.1")
    wait_for(lambda: any(len(read(path)) > 3 for path in project.folder.glob(".posttrain/runs/*/journal.jsonl")))
    change(project)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (2, False)
    assert f"error: count: {words}" in err
    assert "Run `dvc repro` again" in err
    assert not project.directory.exists()
    assert ended(read(project.state / "journal.jsonl")) == "FAILED"
    assert list(project.state.glob("checkpoints/*/*")), "the run continues if the old state is restored"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "posttrain").mkdir()
    (tmp_path / "posttrain" / "one.py").write_text("1")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a").write_text("a")
    (tmp_path / "dvc.yaml").write_text("stages: {s: {cmd: x, deps: [posttrain, rows, 'models/${item.x}']}}")
    (tmp_path / "params.yaml").write_text("s: {x: 1, y: {z: 2e-5}}\nt: {x: 1}\n")
    return tmp_path


def taken(here: Path) -> InputSnapshot:
    return InputSnapshot.take("s", here / "params.yaml", ["s"], ["rows"])


def test_only_what_the_stage_declares_counts(here: Path) -> None:
    before = taken(here)
    (here / "params.yaml").write_text("# a comment\nt: {x: 2}\ns: {y: {z: 0.00002}, x: 1}\n")
    (here / "posttrain" / "__pycache__").mkdir()
    (here / "posttrain" / "__pycache__" / "one.pyc").write_text("")
    (here / "other").write_text("")
    before.verify({})
    (here / "params.yaml").write_text("s: {x: 1, y: {z: 3e-5}}\n")
    (here / "posttrain" / "two.py").write_text("2")
    (here / "rows" / "b").write_text("b")
    assert before.changes() == [
        "s.y.z changed from 2e-05 to 3e-05 in params.yaml", "the code posttrain/two.py changed", "the data rows changed",
    ]  # fmt: skip


def test_data_that_were_rewritten_with_the_same_content_are_no_change(here: Path) -> None:
    from pipelines.runtime.identity import input_digests

    digests, before = input_digests("s", ["rows"]), taken(here)
    (here / "rows" / "a").unlink()
    (here / "rows" / "a").write_text("a")
    before.verify(digests)
    (here / "rows" / "a").write_text("b")
    with pytest.raises(TrackingError, match="s: the data rows changed while the stage ran"):
        before.verify(digests)


def test_another_parameter_file_is_not_recorded_by_dvc(here: Path) -> None:
    (here / "mine.yaml").write_text("s: {x: 1}")
    before = InputSnapshot.take("s", here / "mine.yaml", ["s"], ["rows"])
    (here / "mine.yaml").write_text("s: {x: 2}")
    assert before.changes() == []


def test_a_flow_reads_the_snapshot_that_a_step_wrote(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = here / "logs" / "s.snapshot.json"
    monkeypatch.setenv("POSTTRAIN_SNAPSHOT", str(path))
    assert InputSnapshot.read(path) is None
    taken(here).write()
    monkeypatch.chdir("/")
    read_again = InputSnapshot.read(path)
    assert read_again is not None
    assert read_again.changes(root=here) == []
    (here / "posttrain" / "one.py").write_text("2")
    assert read_again.changes(root=here) == ["the code posttrain/one.py changed"]
