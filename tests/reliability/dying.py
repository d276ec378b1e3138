"""Runs a step of the pipeline as it is, and sends its process SIGKILL (or the signal that SIGNAL names) at a named point of its life.

    python -m tests.reliability.dying POINT pipelines.sft [ARGUMENT...]

A point is the moment right before the process changes something on disk: `open …/manifest.json`, `rename …/partial-00000004`,
`metrics 7` (the record is written and not yet on disk), `metrics 7 torn` (half of it is). POINT `-` is nowhere; several are separated
by commas. Those that were passed are written to the file that POINTS names.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree")


def main(points: str, module: str, arguments: list[str]) -> None:
    wanted, number = points.split(","), signal.Signals[os.environ.get("SIGNAL", "SIGKILL")]
    passed: list[str] = []
    home = os.getcwd()

    def reached(point: str, prepare: Callable[[], None] = lambda: None) -> None:
        passed.append(point)
        if point in wanted:
            prepare()
            os.kill(os.getpid(), number)

    def name_of(path: str) -> str:
        return os.path.relpath(path, home).removesuffix(f".{os.getpid()}")

    def audit(event: str, details: tuple[Any, ...]) -> None:
        if event not in EVENTS or not isinstance(details[0], str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(details[0]))
        if path.startswith(home) and not (event == "open" and "r" in str(details[1] or "r")):
            reached(f"{event.removeprefix('os.').removeprefix('shutil.')} {name_of(path)}")

    def watched_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "journal.jsonl":
            _at_record(path, reached)
        fsync(descriptor)

    fsync = os.fsync
    os.fsync = watched_fsync
    sys.addaudithook(audit)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        listing = os.environ.get("POINTS")
        if listing:
            wanted.clear()
            Path(listing).write_text(json.dumps(passed))


def _at_record(journal: Path, reached: Callable[..., None]) -> None:
    """Return the journal has a new last line: a point by its kind and step, whole and torn."""
    line = journal.read_bytes().splitlines(keepends=True)[-1]
    record = json.loads(line)
    point = f"{record['kind']} {record.get('step', record.get('path', ''))}".strip()
    reached(point)
    reached(f"{point} torn", lambda: os.truncate(journal, journal.stat().st_size - len(line) // 2))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
