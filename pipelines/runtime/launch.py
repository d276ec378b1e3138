"""Several processes for one step, as `accelerate launch` starts them. Where a run happens is environment: the step's command stays.

    POSTTRAIN_ACCELERATE=infra/accelerate/ddp_cpu.yaml dvc repro

The file is what `accelerate config` writes. `accelerate launch --config_file FILE -m pipelines.sft` by hand does the same; here the way a
step fails stays as it was as well: one paragraph, and its own exit status.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.config.params import read_yaml
from posttrain.errors import ConfigError, Interrupted

VARIABLE = "POSTTRAIN_ACCELERATE"


def process() -> int:
    """This process's number among those that were launched together; 0 is the one that logs and writes."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def configuration(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The file that the environment names. Raises ConfigError where there is none."""
    given = environ.get(VARIABLE, "").strip()
    if not given:
        return None
    path = Path(given).resolve()
    if not path.is_file():
        raise ConfigError(
            f"{VARIABLE} = {given!r}: no such file; see infra/accelerate, or make one with `accelerate config`"
        )
    return path


def processes(path: Path | None) -> int:
    """How many processes the configuration starts on this machine."""
    if path is None:
        return 1
    tree = read_yaml(path)
    found: Any = tree.get("num_processes") if isinstance(tree, dict) else None
    if not isinstance(found, int) or found < 1:
        raise ConfigError(f"{path}: num_processes = {found!r}; must be a whole number from 1")
    return max(1, found // int(tree.get("num_machines") or 1))


def launch(path: Path, module: str, arguments: list[str]) -> int:
    """Run `python -m module` in the processes of the configuration; the exit status of the first that failed."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # the processes have said all there is to say
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args = launch_command_parser().parse_args(["--config_file", str(path), "-m", module, *arguments])
    if read_yaml(path).get("use_cpu"):
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        launch_command(args)
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as told:
        print(f"stopped by {told.sigval.name}; the same command goes on", file=sys.stderr)
        return Interrupted.exit_code
    return 0
