"""The versioned steps, one module per stage of dvc.yaml. `aliases` keeps the old names of commands."""

import os
import sys
from pathlib import Path

__path__.append(str(Path(__file__).with_name("aliases")))

if sys.flags.optimize > 1:
    print(
        "error: PYTHONOPTIMIZE=2 (python -OO) removes docstrings, and libraries of this project end in an error without them. Unset it.",
        file=sys.stderr,
    )
    sys.exit(2)

if sys.argv[0] == "-m":  # `python -m pipelines.NAME`, before NAME is imported
    from pipelines.runtime import garbage, threads

    garbage.collect_rarely()
    try:
        # NumPy starts a thread for each processor while it is imported, and ends in KeyboardInterrupt if it may not
        threads.require_threads(os.cpu_count() or 1)
    except RuntimeError as error:
        from pipelines.runtime.command_line import end_without_threads

        end_without_threads(error)

    if "POSTTRAIN_WARM" in os.environ:
        from pipelines.runtime.early import hand_over

        hand_over()
