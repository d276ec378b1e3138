"""Limits of the machine in every step: files that may not grow or be read, few open files, few processes.

Each ends in words with exit status 2, loses nothing, and the same command without the limit arrives at the bytes of an undisturbed run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.reliability.limited import NOBODY
from tests.reliability.workspace import Workspace

STEPS = {
    "ingest": (("pipelines.ingest",), ("data/tables", "runs/ingest")),
    "validate": (("pipelines.validate",), ("data/valid", "runs/validate")),
    "sft": (("pipelines.sft",), ("models/sft", "runs/sft")),
    "reward": (("pipelines.reward",), ("models/reward", "runs/reward")),
    "align-grpo-0": (
        ("pipelines.align", "--algorithm", "grpo", "--seed", "0"),
        ("models/align/grpo-0", "runs/align/grpo-0"),
    ),
    "evaluate-sft": (("pipelines.evaluate", "--model", "sft"), ("runs/evaluate/sft",)),
}
SHARE = 6
"""How many sizes of files are tried for a step in the slow tier."""


class Limited:
    """One step of a workspace, with its undisturbed result."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.workspace, self.name = workspace, name
        self.command, self.outputs = STEPS[name]
        self.forget()
        workspace.succeed(*self.command)
        self.expected = workspace.results(*self.outputs)
        written = [path for path in self._files() if path.is_file()]
        self.sizes = sorted({path.stat().st_size for path in written} - {0})

    def _files(self) -> Iterator[Path]:
        for output in self.outputs:
            yield from sorted((self.workspace.folder / output).rglob("*"))

    def forget(self) -> None:
        """Remove everything that earlier runs of the step wrote."""
        for folder in self.workspace.folder.glob(f".posttrain/runs/{self.name}-*"):
            shutil.rmtree(folder)
        for output in self.outputs:
            shutil.rmtree(self.workspace.folder / output, ignore_errors=True)

    def refuses(self, limit: str, *words: str) -> None:
        """Run the step under a limit: it fails in one paragraph with the words. Run it again: it succeeds as if nothing had been."""
        done = self.workspace.run("tests.reliability.limited", limit, *self.command)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), f"{limit}: {done.stderr}"
        last = done.stderr.splitlines()[-1]
        assert "error: " in last
        assert [word for word in words if word not in last] == [], f"{limit}: {last}"
        self.workspace.succeed(*self.command)
        assert self.workspace.results(*self.outputs) == self.expected, limit


@pytest.fixture
def copy(workspace: Workspace, tmp_path: Path) -> Workspace:
    folder = tmp_path / "project"
    shutil.copytree(workspace.folder, folder, ignore=shutil.ignore_patterns(".posttrain"))
    return Workspace(folder, workspace.warm)


def test_a_journal_that_is_cut_between_its_first_two_records_is_begun_again(copy: Workspace) -> None:
    # the second record holds the parameters: a run that continued without it would never show them
    ingest = Limited(copy, "ingest")
    ingest.forget()
    ingest.refuses(
        "FSIZE=300", "journal.jsonl: only", "the disk may be full. Free space, then run the same command again"
    )
    ingest.forget()
    largest = ingest.sizes[-1]
    ingest.refuses(f"FSIZE={largest - 1}", "File too large", "Free space", "then run the same command")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", STEPS)
def test_a_file_of_any_size_that_cannot_be_written_is_named_and_the_next_run_arrives(
    name: str, copy: Workspace
) -> None:
    """Journal, checkpoint, table, model, artifact: each is the first one that is too large for some limit."""
    step = Limited(copy, name)
    chosen = [step.sizes[i * (len(step.sizes) - 1) // (SHARE - 1)] - 1 for i in range(SHARE)]
    for size in sorted({0, 1, 300, *chosen}):
        step.forget()
        step.refuses(f"FSIZE={size}", "ree space", "then run")


def test_a_limit_of_open_files_is_named_by_a_step(copy: Workspace) -> None:
    ingest = Limited(copy, "ingest")
    ingest.forget()
    ingest.refuses("NOFILE=10", "Too many open files", "e.g. `ulimit -n 4096`, then run")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", STEPS)
def test_any_limit_of_open_files_is_named_or_enough(name: str, copy: Workspace) -> None:
    step = Limited(copy, name)
    enough = 0
    for limit in (7, 8, 10, 12, 14, 16, 20, 24, 32, 64):
        step.forget()
        done = copy.run("tests.reliability.limited", f"NOFILE={limit}", *step.command)
        if done.returncode == 0:
            enough += 1
        else:
            assert (done.returncode, "Traceback" in done.stderr) == (2, False), f"NOFILE={limit}: {done.stderr}"
            assert "ulimit -n" in done.stderr.splitlines()[-1]
            copy.succeed(*step.command)
        assert copy.results(*step.outputs) == step.expected
    assert enough, "64 open files are enough for any step"


@pytest.fixture
def nobodys(copy: Workspace) -> Iterator[tuple[Workspace, str]]:
    """A workspace for whose user modes count, and the limit that makes a step that user: they do not count for root."""
    if os.geteuid() != 0:
        yield copy, "NOFILE=1024"
        return
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest closes its own folders to others
    shutil.copytree(copy.folder, folder, dirs_exist_ok=True)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    yield Workspace(folder, copy.warm), "NOBODY=1"
    shutil.rmtree(folder)


ENOUGH = 56 + 4 * (os.cpu_count() or 1)
"""Processes and threads that suffice for any step; torch, NumPy and tokenizers start some for each processor."""


def limited_processes(nobodys: tuple[Workspace, str], name: str, limits: Sequence[int]) -> list[int | None]:
    """Run a step under limits of processes and threads, which bind nobody and not root. Return the limits that were enough.

    None is no limit. Under a limit that is not enough it fails in one paragraph, and then the step without a limit succeeds.
    Either way the bytes are those of an undisturbed run.
    """
    copy, user = nobodys
    user = user.replace("NOBODY=1", "NOBODY=files")  # `align` starts an interpreter, which may be in root's home
    command, outputs = STEPS[name]
    expected: dict[str, str] | None = None
    enough: list[int | None] = []
    for limit in (None, *limits):
        for folder in [*copy.folder.glob(f".posttrain/runs/{name}-*"), *(copy.folder / output for output in outputs)]:
            shutil.rmtree(folder, ignore_errors=True)
        words = user if limit is None else f"{user},NPROC={limit}"
        done = copy.run("tests.reliability.limited", words, *command)
        if done.returncode == 0:
            enough.append(limit)
        else:
            assert (done.returncode, "Traceback" in done.stderr) == (2, False), f"{words}: {done.stderr}"
            assert "`ulimit -u`" in done.stderr.splitlines()[-1], f"{words}: {done.stderr}"
            copy.succeed("tests.reliability.limited", user, *command)
        found = copy.results(*outputs)
        assert found
        assert found == (expected or found), words
        expected = found
    return enough


def test_a_limit_of_processes_is_named_by_a_step(nobodys: tuple[Workspace, str]) -> None:
    assert limited_processes(nobodys, "ingest", [1]) == [None]


START = """
import os, sys
from tests.reliability.limited import limit
limit(sys.argv[1])
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
"""


def test_a_limit_that_numpy_meets_while_a_step_is_imported_is_named(root: Path) -> None:
    """Leave room for one thread: NumPy would start one for each processor, and end in a traceback with KeyboardInterrupt."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a step as a user without other processes")
    command = [sys.executable, "-c", START, "NOBODY=files,NPROC=1", "pipelines.sft", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (words,) = done.stderr.splitlines()
    assert words.startswith("error: can't start new thread.")
    assert "`ulimit -u`" in words


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", STEPS)
def test_any_limit_of_processes_is_named_or_enough(name: str, nobodys: tuple[Workspace, str]) -> None:
    between = range(16, ENOUGH, 4)
    assert ENOUGH in limited_processes(nobodys, name, [1, 2, 4, 8, 12, *between, ENOUGH]), (
        f"{ENOUGH} are enough for any step"
    )


UNREADABLE = [
    ("params.yaml", 0, ("pipelines.ingest",)),
    ("data/valid/sft.parquet", 0, ("pipelines.sft",)),
    ("models/base/model.safetensors", 0, ("pipelines.sft",)),
    ("models/base", 0o300, ("pipelines.sft",)),
    ("models", 0o500, ("pipelines.base",)),
    ("data/tables", 0o500, ("pipelines.ingest",)),
    ("data/tables", 0, ("pipelines.validate",)),
    (".posttrain", 0, ("pipelines.ingest",)),
    (".posttrain/runs", 0o500, ("pipelines.ingest",)),
    ("runs/evaluate", 0, ("pipelines.compare",)),
    ("runs/sft/journal.jsonl", 0, ("pipelines.commands.sync",)),
    (".posttrain/runs", 0, ("pipelines.commands.sync",)),
    ("data/raw/accepted/sft", 0o300, ("pipelines.ingest",)),
]
LIGHT = {0, 3, 12}


@pytest.mark.parametrize(
    ("place", "mode", "command"),
    [
        pytest.param(*case, marks=() if i in LIGHT else pytest.mark.slow, id=f"{case[0]}-{case[1]:o}")
        for i, case in enumerate(UNREADABLE)
    ],
)
def test_a_file_that_may_not_be_read_or_a_folder_that_may_not_be_used_is_named(
    place: str, mode: int, command: tuple[str, ...], nobodys: tuple[Workspace, str]
) -> None:
    copy, user = nobodys
    path = copy.folder / place
    if not path.exists():
        path.mkdir(parents=True)
        if os.geteuid() == 0:
            for made in (path, path.parent):
                os.chown(made, NOBODY, NOBODY)
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        done = copy.run("tests.reliability.limited", user, *command)
    finally:
        path.chmod(before)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    last = done.stderr.splitlines()[-1]
    assert "error: " in last
    assert path.name in last
