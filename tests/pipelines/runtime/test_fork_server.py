"""The fork server imports the project's modules in advance, and a fork uses them only if a fresh import would read the same files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.runtime import fork_server
from tests.pipelines.conftest import wait_for
from tests.reliability.workspace import CLIENT

SERVER = """
import sys
from pathlib import Path
from pipelines.runtime import fork_server
for name in [name for name in sys.modules if name.partition(".")[0] in fork_server.PACKAGES]:
    del sys.modules[name]
sys.path[:0] = [sys.argv[1]]
fork_server.AHEAD, fork_server.IF_IDLE, fork_server.STEPS = (), (), ("posttrain.value",)
fork_server.serve(Path(sys.argv[2]))
"""
STAGE = "import os\nfrom posttrain.value import VALUE, PROCESS\nprint(VALUE, PROCESS == os.getpid())\n"


def _project(folder: Path, value: int) -> Path:
    """Write a project with the packages' names, whose stage prints a value and whether it has imported it by itself."""
    for name in fork_server.PACKAGES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    (folder / "posttrain" / "value.py").write_text(f"import os\nVALUE, PROCESS = {value}, os.getpid()\n")
    (folder / "pipelines" / "stage.py").write_text(STAGE)
    return folder


@pytest.fixture
def server_socket(tmp_path: Path, root: Path) -> Iterator[Path]:
    """Return the socket of a server that has imported the modules of the folder `one`."""
    path, one = tmp_path / "warm", _project(tmp_path / "one", 1)
    command = [sys.executable, "-c", SERVER, str(one), str(path)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)}, cwd=tmp_path) as server:
        wait_for(path.exists)
        yield path
        server.kill()


def test_a_fork_runs_the_code_on_disk(server_socket: Path, tmp_path: Path, root: Path) -> None:
    def stage(folder: str, **extra: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(root), "POSTTRAIN_WARM": str(server_socket)} | extra
        command = [sys.executable, "-c", CLIENT, "pipelines.stage"]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path / folder, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert stage("one") == "1 False\n", "imported by the server"
    assert stage("one", POSTTRAIN_TRACE="used.jsonl") == "1 True\n", "the trace lists what the stage itself imports"
    _project(tmp_path / "two", 2)
    assert stage("two") == "2 True\n", "the same names in a different folder"
    (tmp_path / "one" / "posttrain" / "value.py").write_text("import os\nVALUE, PROCESS = 30, os.getpid()\n")
    assert stage("one") == "30 True\n", "edited after the import"


@pytest.mark.parametrize("change", ["edited", "deleted", "replaced", "of a different folder"])
def test_a_changed_file_is_noticed(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "module.py"
    file.write_text("VALUE = 1\n")
    stamps = {str(file): fork_server._stamp(file)}
    assert fork_server._is_current(stamps)
    if change == "edited":
        os.utime(file, ns=(time.time_ns(), time.time_ns() + 1))
    elif change == "deleted":
        file.unlink()
    elif change == "replaced":
        other = tmp_path / "other.py"
        other.write_text("VALUE = 2\n")
        os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
        other.replace(file)
    else:
        monkeypatch.syspath_prepend(_project(tmp_path / "own", 1))
    assert not fork_server._is_current(stamps)
    assert fork_server._is_current({}) is False, "nothing was imported"


def test_modules_of_single_stages_are_imported_only_while_no_step_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("of_one_stage", "of_a_second_stage")
    for name in names:
        (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fork_server, "IF_IDLE", ("absent", names[0]))
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as step:
        server.bind(str(tmp_path / "warm"))
        server.listen()
        fork_server._import_if_idle(server)
        step.connect(str(tmp_path / "warm"))
        monkeypatch.setattr(fork_server, "IF_IDLE", names[1:])
        fork_server._import_if_idle(server)
    assert [name in sys.modules for name in names] == [True, False]
    monkeypatch.delitem(sys.modules, names[0])
