"""Run the intake without spare memory for the file bomb.jsonl:

    python -m tests.pipelines.commands.tight_intake

A bound counts the memory that a process gains. It needs its own process: memory that earlier tests have freed would hold the file.
"""

import sys
from pathlib import Path

from pipelines.commands import intake
from pipelines.data import bounds

ENOUGH = 2**40


def memory_for(path: Path) -> int:
    """Return the bound of the bomb, without spare memory; for other files, more than any machine has."""
    return bounds.memory_for(path) if path.name == "bomb.jsonl" else ENOUGH


if __name__ == "__main__":
    bounds.SPARE_BYTES = 0
    intake.memory_for = memory_for
    sys.exit(intake.main([]))
