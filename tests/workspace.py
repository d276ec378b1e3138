"""A small git and DVC workspace of real stages, for the tests of tasks and flows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tasks.process import child_environment

STAGES = """
vars:
  - sides: [left, right]
stages:
  start:
    cmd: python work.py start inbox/number.txt
    deps: [work.py, inbox]
    outs: [start.txt]
  side:
    matrix:
      name: ${sides}
    cmd: python work.py side-${item.name} start.txt
    deps: [work.py, start.txt]
    outs: ["side-${item.name}.txt"]
  join:
    cmd: python work.py join side-left.txt side-right.txt
    deps: [side-left.txt, side-right.txt]
    outs: [join.txt]
"""

WORK = """
import os, sys, time
name, *inputs = sys.argv[1:]
began = time.time()
total = sum(int(open(path).read()) for path in inputs)
if name.startswith("side-"):
    time.sleep(float(os.environ.get("SIDE_SECONDS", "0")))
if total < 0:
    sys.exit(f"error: {name}: {total} is negative")
open(name + ".txt", "w").write(str(total + 1))
open("times.jsonl", "a").write('{"name": "%s", "began": %r, "ended": %r}\\n' % (name, began, time.time()))
"""


def dvc(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=root, env=child_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(root: Path) -> Path:
    """Return the workspace with nothing run yet and 1 in its inbox."""
    (root / "inbox").mkdir(parents=True)
    (root / "inbox" / "number.txt").write_text("1")
    (root / "dvc.yaml").write_text(STAGES)
    (root / "work.py").write_text(WORK)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    dvc(root, "init", "-q")
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    dvc(root, "add", "-q", "inbox")
    return root


def copy(template: Path, to: Path) -> Path:
    shutil.copytree(template, to, symlinks=True)
    return to


def times(root: Path) -> dict[str, tuple[float, float]]:
    """When each stage's own command began and ended, by name; a stage that ran twice fails."""
    path = root / "times.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len({record["name"] for record in records}) == len(records)
    return {record["name"]: (record["began"], record["ended"]) for record in records}
