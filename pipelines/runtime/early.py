"""Hand a command of a flow over to the fork server before its module, with the types of all parameters, is imported."""

from __future__ import annotations

import os
import re
import sys

from pipelines.runtime.fork_server import run_in_fork_server
from pipelines.runtime.process import GRACE_SECONDS, STAGE, up_to_dvc
from posttrain.guard import end_with

STAGE_MODULE = re.compile(r"pipelines\.[a-z_]+")
COSTS = "pipelines.report.costs"
"""The page that a flow writes after its last stage."""


def hand_over() -> None:
    """Run the command of a DVC stage, or the page of costs, in the flow's fork server and exit with its status.

    Returns if no server answers, or if a launcher starts the stage as several processes.
    """
    words = sys.orig_argv[1:]
    several = os.environ.get("POSTTRAIN_ACCELERATE", "").strip() or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several or "-m" not in words:
        return
    module, *arguments = words[words.index("-m") + 1 :]
    if STAGE in os.environ and STAGE_MODULE.fullmatch(module):
        end_with(up_to_dvc(), GRACE_SECONDS)
    elif module != COSTS:
        return
    status = run_in_fork_server(module, arguments)
    if status is not None:
        sys.exit(status)
