"""List the versions of the model registry: aliases, model, and the gate's decision.

    posttrain models [--full]

Long reasons are cut; --full prints them whole.

Promote or roll back with `python -m flows.promote`.
"""

from __future__ import annotations

import sys

from pipelines.config.params import load_params
from pipelines.promotion.registry import DECISION, MODEL, REASON, RETRAIN, ROLLED_BACK, Registry, Version
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, print_text, reports_errors
from pipelines.runtime.redaction import printable

WIDTH = 120


def line(version: Version, *, full: bool = False) -> str:
    """Return one version as one line; its reason is cut unless `full` is true."""
    tags = version.tags
    why = f"rolled back: {tags[ROLLED_BACK]}" if ROLLED_BACK in tags else tags.get(REASON, "")
    why = f"train again: {tags[RETRAIN]}; {why}" if RETRAIN in tags else why
    why = printable(" ".join((version.fault or why).split()))
    if not full and len(why) > WIDTH:
        why = why[: WIDTH - 1] + "…"
    aliases = ", ".join(version.aliases) or "-"
    model, decision = (version.words(tag, blank)[:WIDTH] for tag, blank in ((MODEL, "?"), (DECISION, "-")))
    return f"{version.number:>4}  {aliases:<20} {model:<16} {decision:<9} {why}"


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain models", __doc__)
    parser.add_argument("--full", action="store_true", help="print the reasons whole")
    args = parser.parse_args(argv)
    environment.quiet()
    project = environment.root()
    versions = Registry(project, load_params(project / "params.yaml").project.experiment).versions()
    lines = [line(version, full=args.full) for version in versions]
    print_text("\n".join(lines) or "no version is registered yet; `python -m flows.retrain` registers the first one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
