"""Programs with large libraries collect garbage rarely while they start, and not when they end."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runtime import garbage

LIBRARY = """import atexit, gc, sys
print(__name__, sys.argv[1:], sys.path[0] == __import__("os").getcwd(), gc.get_threshold())
atexit.register(lambda: print(gc.get_freeze_count() > 0))
"""
ORDER = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); import pipelines; print(gc.get_threshold())"


def test_a_library_runs_as_with_python_m_in_any_folder(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(LIBRARY)
    command = garbage.library_command("library", "status", "-q")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    # what is registered later runs earlier: the objects are frozen after it
    assert done.stdout == "__main__ ['status', '-q'] True (50000, 20, 50)\nFalse\n"


@pytest.mark.parametrize(("argument", "lines"), [("-m", "(50000, 20, 50)\nTrue\n"), ("-c", "(700, 10, 10)\nFalse\n")])
def test_a_command_of_the_package_freezes_its_objects_at_its_end(root: Path, argument: str, lines: str) -> None:
    code = f"import sys; sys.argv[0] = {argument!r}; {ORDER}"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == lines


def test_a_step_collects_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_threshold()
    monkeypatch.setattr(garbage, "USUAL", [(before[0] + 1, *before[1:])])
    try:
        garbage.collect_as_usual()
        assert gc.get_threshold() == (before[0] + 1, *before[1:])
    finally:
        gc.set_threshold(*before)
