"""The console script `posttrain`: every command and every step by its name.

    posttrain --help
    posttrain plan
    posttrain align --algorithm grpo --seed 0

`posttrain NAME` and `python -m pipelines.commands NAME` are the same.
"""

from __future__ import annotations

import ast
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from posttrain.text import nearest

STEPS = ("ingest", "base", "validate", "sft", "reward", "reward_readers", "align", "evaluate", "compare", "gate")
"""The versioned steps, in the order in which a pipeline runs them."""
COMMANDS = (
    "plan",
    "calibrate",
    "study",
    "preview",
    "configure",
    "push",
    "export",
    "ui",
    "models",
    "lineage",
    "drift",
    "forget",
    "replay",
    "chat",
    "label",
    "judge",
    "serve",
    "sync",
    "intake",
)
RENAMED = ("plan", "configure", "ui", "models", "sync", "intake")
"""Commands that were `python -m pipelines.NAME` before; pipelines/aliases keeps these names."""
PACKAGE = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command or step; return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0 if given else 2
    name, *rest = given
    if name not in (*COMMANDS, *STEPS):
        print(f"error: posttrain has no command {name!r}{nearest(name, (*COMMANDS, *STEPS))}", file=sys.stderr)
        return 2
    # Functions that params.yaml names by import path are found in the working directory, as with `python -m`.
    sys.path.insert(0, os.getcwd())
    sys.argv = [f"posttrain {name}", *rest]
    runpy.run_module(module(name), run_name="__main__", alter_sys=True)
    return 0


def run_old_name(name: str) -> None:
    """Run a command that was called by its old module name, and print the new one."""
    print(f"python -m pipelines.{name} is now called: posttrain {name}", file=sys.stderr)
    sys.exit(main([name, *sys.argv[1:]]))


def module(name: str) -> str:
    """Return the module of a command or step."""
    return f"pipelines.{name}" if name in STEPS else f"pipelines.commands.{name}"


def overview() -> str:
    """Return the help text: one line for each command and step."""
    lines = ["usage: posttrain NAME [options]; `posttrain NAME --help` explains one", ""]
    for title, names in (("commands", COMMANDS), ("steps, each a stage of dvc.yaml", STEPS)):
        lines += [f"{title}:", *(f"  {name:<14} {_first_line(name)}" for name in names), ""]
    lines += [
        "Start with `make demo`; then `posttrain plan` and `posttrain configure KEY=VALUE`. Documentation: docs/index.md"
    ]
    return "\n".join(lines).rstrip()


def _first_line(name: str) -> str:
    """Read the first line of a module's docstring without importing it."""
    path = PACKAGE.parent.joinpath(*module(name).split(".")).with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
