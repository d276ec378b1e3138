"""Decide the claims of studies from their finished runs, or list the studies.

    posttrain study                      # every study with its committed verdict
    posttrain study group_size           # decide from the finished runs in .posttrain/studies
    posttrain study group_size --write   # also write examples/studies/results and docs/claims.md
    posttrain study group_size --base my.yaml    # runs of the same study on other parameters, model and data

`make study NAME=…` (python -m flows.study) runs missing stages first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, reports_errors
from pipelines.studies.page import page, section, short
from pipelines.studies.results import PAGE, all_saved, judge, save
from pipelines.studies.study import load_study
from pipelines.studies.workspace import workspaces
from posttrain.files import write_atomic


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = command_parser("posttrain study", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="studies to decide (default: list all)")
    parser.add_argument("--base", type=Path, help="changes of params.yaml that replace the study's own base")
    parser.add_argument("--write", action="store_true", help="write the results and docs/claims.md")
    args = parser.parse_args(arguments)
    base = args.base.resolve() if args.base else None
    os.chdir(environment.root())
    for name in args.names:
        print(decide(Path.cwd(), name, base, write=args.write and base is None))
    if args.write and base is None:
        write_atomic(PAGE, page(all_saved(Path.cwd())).encode())
    if not args.names:
        print(listing(Path.cwd()))
    return 0


def decide(root: Path, name: str, base: Path | None = None, *, write: bool = False) -> str:
    """Decide one study and return its section of the page."""
    study = load_study(root, name)
    result = judge(name, study, workspaces(root, name, study, base))
    if write:
        save(root, result)
    return "\n".join(section(name, study, result))


def listing(root: Path) -> str:
    """Return one line for each study: name, verdict and question."""
    return "\n".join(
        f"{name:<22} {short(study, result, earlier):<14} {study.question}"
        for name, study, result, earlier in all_saved(root)
    )


if __name__ == "__main__":
    sys.exit(main())
