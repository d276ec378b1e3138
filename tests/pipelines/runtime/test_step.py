"""Steps from outside: exit codes, files, resuming after a kill, and parameters that must be declared."""

from __future__ import annotations

import csv
import json
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import torch

from pipelines.config.params import Params, load_params
from pipelines.config.schema import AlgorithmParams, OnPolicyBudget
from pipelines.runtime.identity import code_digest, content_digest, input_digests, run_key
from pipelines.runtime.journal import ended, read
from pipelines.runtime.param_tracking import Reads, declared_values, watched
from pipelines.runtime.prices import judge_tokens
from posttrain.errors import ConfigError, DataError, memory_fault
from tests.pipelines.conftest import Project, wait_for


def test_a_finished_step_leaves_exactly_its_outputs(project: Project) -> None:
    done = project.run()
    assert (done.returncode, done.stderr) == (0, "")
    files = {p.relative_to(project.directory).as_posix() for p in project.directory.rglob("*") if p.is_file()}
    tables = {"artifacts/samples-000004.json", "artifacts/samples-000009.json"}
    assert files == {"journal.jsonl", "metrics.json", "curves.csv", "artifacts/note.txt"} | tables
    metrics = json.loads((project.directory / "metrics.json").read_text())
    assert metrics == {"heldout": {"accuracy": 0.75}, "loss": 2e-3 / 12, "pass@4": 0.5}
    rows = list(csv.DictReader((project.directory / "curves.csv").open()))
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == [(s, 2e-3 / (s + 1)) for s in range(12)]
    assert [row["odd"] for row in rows[:2]] == ["inf", "nan"]
    table = json.loads((project.directory / "artifacts" / "samples-000004.json").read_text())
    assert table == [{"prompt": "1+1", "completion": "4", "score": "NaN"}]


def test_no_clock_or_host_reaches_the_outputs(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    project.run()
    other = Project(tmp_path_factory.mktemp("elsewhere"), project._root)
    other.run(STEP_SECONDS="0.01")
    for name in ("journal.jsonl", "metrics.json", "curves.csv", "artifacts"):
        assert content_digest(project.directory / name) == content_digest(other.directory / name), name


@pytest.mark.parametrize("step", ["2", "4", "7", "11"])
def test_a_killed_and_resumed_run_leaves_the_bytes_of_an_undisturbed_one(project: Project, step: str) -> None:
    killed = project.run(DIE_AT=step)
    assert killed.returncode == -signal.SIGKILL
    assert not project.directory.exists()
    resumed = project.run()
    assert resumed.returncode == 0
    assert f"continuing run {project.state.name}" in resumed.stderr
    rough = {p.name: content_digest(p) for p in project.directory.iterdir()}
    assert any(record["kind"] == "resume" for record in read(project.state / "journal.jsonl"))
    dropped = (int(step) + 1) % 5  # steps after the last checkpoint ran twice, so their judge was paid twice
    paid = 12 + dropped
    assert judge_tokens(read(project.state / "measurements.jsonl")) == {"referee": (10 * paid, paid)}
    assert not (project.state / "checkpoints").exists()
    assert project.run().returncode == 0
    assert {p.name: content_digest(p) for p in project.directory.iterdir()} == rough


def test_a_journal_that_was_cut_before_its_parameters_is_begun_again(project: Project) -> None:
    """A kill, or a full disk, between the first two records: a run that went on from there would never show its parameters."""
    assert project.run(DIE_AT="0").returncode == -signal.SIGKILL
    journal = project.state / "journal.jsonl"
    first, second = journal.read_bytes().splitlines(keepends=True)[:2]
    journal.write_bytes(first + second[: len(second) // 2])
    assert project.run().returncode == 0
    cut = content_digest(project.directory / "journal.jsonl")
    assert project.run().returncode == 0
    assert content_digest(project.directory / "journal.jsonl") == cut
    assert "params" in [record["kind"] for record in read(project.directory / "journal.jsonl")]


def test_sigterm_stops_at_a_safe_point_and_is_told_as_killed(project: Project) -> None:
    done = project.run(TERM_AT="6")
    assert done.returncode == 143
    assert done.stderr == "error: stopped at a safe point\n"
    end = read(project.state / "journal.jsonl")[-1]
    assert end == {"kind": "end", "status": "KILLED", "reason": "stopped at a safe point"}
    assert project.run().returncode == 0


def test_a_step_that_never_asks_is_interrupted_where_it_stands(project: Project) -> None:
    source = project.folder / "steps" / "count.py"
    source.write_text(source.read_text().replace("run.context.stop_requested()", "False"))
    process = project.start(STEP_SECONDS="60")
    wait_for(lambda: any(read(path) for path in project.folder.glob(".posttrain/runs/*/measurements.jsonl")))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=50)  # before the step would end by itself
    assert process.returncode == 143
    assert err.startswith("error: stopped by SIGTERM")
    assert ended(read(project.state / "journal.jsonl")) == "KILLED"


def test_an_expected_error_is_one_paragraph_and_a_bug_a_traceback(project: Project) -> None:
    secret = "postgresql://anna:hunter2@db/x"
    failed = project.run(FAIL_AT="3", FAIL_WITH="data", FAIL_TEXT=f"cannot read {secret}", FAIL_CAUSE="first\nlast")
    place = project.state / "artifacts" / "traceback.txt"
    place_line = f"The full text of this error: {place}\n"
    assert (failed.returncode, failed.stderr) == (2, f"{place_line}error: cannot read postgresql://***@db/x\n")
    assert "first\nlast" in place.read_text()
    bug = project.run(FAIL_AT="3", FAIL_WITH="bug", FAIL_TEXT=secret)
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr
    assert "ZeroDivisionError" in bug.stderr
    end = read(project.state / "journal.jsonl")[-1]
    assert end["status"] == "FAILED"
    assert end["reason"] == "ZeroDivisionError: postgresql://***@db/x"
    assert "ZeroDivisionError" in (project.state / "artifacts" / "traceback.txt").read_text()
    written = [bug.stderr, *(p.read_text() for p in project.state.rglob("*") if p.is_file())]
    assert not any("hunter2" in text for text in written)


def test_a_lack_of_memory_is_words_and_not_a_bug(project: Project) -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**56)
    done = project.run(FAIL_AT="3", FAIL_WITH="memory", FAIL_TEXT=str(refused.value))
    assert done.returncode == 2
    assert "count ran out of memory (" in done.stderr
    assert "can't allocate memory" in done.stderr
    assert "Lower compute.micro_batch_tokens of this stage" in done.stderr
    assert "Traceback" not in done.stderr
    assert read(project.state / "journal.jsonl")[-1]["status"] == "FAILED"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 2 GiB"),
            "CUDA out of memory. Tried to allocate 2 GiB",
        ),
        (MemoryError(), "out of memory"),
        (RuntimeError("shape mismatch"), None),
    ],
)
def test_what_counts_as_a_lack_of_memory(error: BaseException, words: str | None) -> None:
    assert memory_fault(error) == words


def test_reading_an_undeclared_parameter_is_refused_by_name(project: Project) -> None:
    done = project.run(READ="1")
    assert done.returncode == 2
    assert "stage count reads the parameter reward.epochs" in done.stderr
    assert "Add 'reward'" in done.stderr


def test_the_trace_lists_what_was_read_and_imported(project: Project) -> None:
    trace = project.folder / "trace.jsonl"
    project.run(POSTTRAIN_TRACE=str(trace))
    (line,) = map(json.loads, trace.read_text().splitlines())
    assert (line["stage"], line["name"], line["params"]) == ("count", "count-grpo-0", ["sft.optimizer.learning_rate"])
    assert {"pipelines/runtime/step.py", "pipelines/runtime/run.py", "posttrain/errors.py"} <= set(line["modules"])
    assert not any(name.startswith("pipelines/tracking") for name in line["modules"])


def test_starting_a_step_imports_no_heavy_library(project: Project) -> None:
    code = "import sys, pipelines.runtime.step; print([m for m in ('torch', 'mlflow', 'pandas', 'numpy') if m in sys.modules])"
    (project.folder / "steps" / "light.py").write_text(code)
    assert project.run(module="light").stdout == "[]\n"


def test_the_same_run_twice_at_once_is_refused(project: Project) -> None:
    first = project.start(STEP_SECONDS="60")
    wait_for(lambda: list(project.folder.glob(".posttrain/runs/*/journal.jsonl")))
    second = project.run()
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert second.returncode == 2
    assert "count-grpo-0 is already running" in second.stderr


def test_a_step_dies_with_dvc_when_dvc_is_killed(project: Project) -> None:
    """A parent is killed while the step runs; the step notices and stops by itself."""
    script = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-m', 'count']); time.sleep(60)"
    (project.folder / "steps" / "parent.py").write_text(script)
    (project.folder / "steps.txt").write_text("100")  # twenty seconds: the kill comes before the end on any machine
    parent = project.start(module="parent", DVC_STAGE="count", STEP_SECONDS="0.2")
    wait_for(lambda: any(len(read(path)) > 3 for path in project.folder.glob(".posttrain/runs/*/journal.jsonl")))
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate(timeout=60)
    assert ended(read(project.state / "journal.jsonl")) == "KILLED"


def test_a_step_whose_dvc_was_killed_before_it_could_look_ends_at_once(project: Project) -> None:
    script = "import os, subprocess, sys; os.setsid(); subprocess.Popen([sys.executable, '-m', 'count'])"
    (project.folder / "steps" / "parent.py").write_text(script)
    (project.folder / "steps.txt").write_text("100")
    parent = project.start(module="parent", DVC_STAGE="count", STEP_SECONDS="0.2")
    parent.communicate(timeout=60)  # the step holds the pipes too: they close when it ends
    assert all(ended(read(path)) != "FINISHED" for path in project.folder.glob(".posttrain/runs/*/journal.jsonl"))
    assert not (project.directory / "journal.jsonl").exists()


def test_the_key_changes_with_parameters_and_inputs_only(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b").write_text("2")
    (tmp_path / "data" / "a").write_text("1")
    inputs = {"data": content_digest(tmp_path / "data")}
    key = run_key("sft", {"sft.seed": 0, "sft.epochs": 1}, inputs)
    assert key == run_key("sft", {"sft.epochs": 1, "sft.seed": 0}, dict(inputs))
    assert key != run_key("sft", {"sft.seed": 1, "sft.epochs": 1}, inputs)
    (tmp_path / "data" / "a").rename(tmp_path / "data" / "c")
    assert content_digest(tmp_path / "data") != inputs["data"]
    with pytest.raises(DataError, match="sft: the input absent does not exist"):
        input_digests("sft", ["absent"])


def test_the_code_of_a_checkpoint_is_what_dvc_watches_of_the_stage(tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "dvc.yaml").write_text(
        "stages: {count: {cmd: x, deps: [steps, data, pipelines/runtime/run.py]}, other: {cmd: y}}"
    )
    code = tmp_path / "steps" / "count.py"
    code.write_text("one")
    first = code_digest(tmp_path, "count")
    (tmp_path / "data" / "rows.jsonl").write_text("inputs are part of the run's key already")
    (tmp_path / "steps" / "notes.md").write_text("no code")
    assert code_digest(tmp_path, "count") == first
    assert code_digest(tmp_path, "other") != first
    code.write_text("two")
    assert code_digest(tmp_path, "count") != first
    code.write_text("one")
    (tmp_path / "steps" / "more.py").touch()
    assert code_digest(tmp_path, "count") != first


@pytest.fixture(scope="module")
def params(root: Path) -> Params:
    return load_params(root / "params.yaml")


def test_watched_parameters_behave_like_the_real_ones(params: Params) -> None:
    reads = Reads("align", ("align", "algorithms.grpo", "rewards"))
    seen = watched(params, reads)
    assert isinstance(seen, Params)
    assert isinstance(seen.algorithms["grpo"], AlgorithmParams)
    assert seen.algorithm("grpo") == params.algorithm("grpo")
    budget = seen.budget("grpo")
    assert isinstance(budget, OnPolicyBudget)
    assert budget == params.budget("grpo")
    assert dict(seen.rewards) == params.rewards
    assert seen.align.compute == params.align.compute
    assert pickle.loads(pickle.dumps(seen.align)) == params.align
    assert seen.algorithms["grpo"].rewards == {"answer": 1.0, "rm": 0.0}


def test_what_is_read_is_recorded_leaf_by_leaf(params: Params) -> None:
    reads = Reads("sft", ("sft",))
    seen = watched(params, reads)
    assert seen.sft.optimizer.learning_rate == 2e-3
    assert seen.sft.epochs == 6
    assert reads.leaves == {"sft.optimizer.learning_rate", "sft.epochs"}
    seen.sft.checkpoint.model_dump()
    added = {f"sft.checkpoint.{name}" for name in ("every_steps", "every_minutes", "keep")}
    assert reads.leaves == {"sft.optimizer.learning_rate", "sft.epochs"} | added


def test_another_algorithms_section_is_not_declared(params: Params) -> None:
    seen = watched(params, Reads("align", ("align", "algorithms.grpo")))
    with pytest.raises(ConfigError, match=r"reads the parameter algorithms\.ppo.*Add 'algorithms\.ppo'"):
        seen.algorithm("ppo")
    with pytest.raises(ConfigError, match="stage align reads the parameter algorithms "):
        list(seen.algorithms)


def test_a_declared_prefix_must_exist(params: Params) -> None:
    assert declared_values(params, ("sft.checkpoint",)) == {
        "sft.checkpoint.every_minutes": 10.0,
        "sft.checkpoint.every_steps": 50,
        "sft.checkpoint.keep": 2,
    }
    with pytest.raises(ConfigError, match=r"no parameter algorithms\.grop: 'grop' is unknown; did you mean 'grpo'"):
        declared_values(params, ("algorithms.grop",))


assert sys.platform.startswith("linux"), "the tests of signals and parents are about Linux"
