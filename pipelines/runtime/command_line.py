"""The edge of every command: its parser, and errors as one paragraph with an exit status."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec

from pipelines.runtime.environment import machine_fault
from pipelines.runtime.redaction import printable, redact
from posttrain.errors import OrchestrationError, PosttrainError
from posttrain.guard import end_with_make
from posttrain.settings import TEMPERATURES

P = ParamSpec("P")
GRACE_SECONDS = 60.0
"""From SIGTERM to SIGKILL if the `make` that started a command has ended: its servers get up to 20 s each."""


def command_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the text of the command's module, as it is written. `name` is the command as a user types it."""
    return argparse.ArgumentParser(prog=name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def whole(least: int, greatest: int = 2**53) -> Callable[[str], int]:
    """Return an argument's type: a whole number of this range.

    Example:
        >>> whole(1)("8")
        8
    """

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= greatest:
            upper = f" to {greatest}" if greatest < 2**53 else " on"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from {least}{upper}")
        return value

    return read


def real(least: float, greatest: float, *, or_zero: bool = False) -> Callable[[str], float]:
    """Return an argument's type: a number of this range, or 0 if `or_zero`.

    Example:
        >>> real(0.5, 2)("1.5"), real(0.5, 2, or_zero=True)("0")
        (1.5, 0.0)
    """

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= greatest or (or_zero and value == 0)):
            zero = "0, or " if or_zero else ""
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {zero}a number from {least:g} to {greatest:g}")
        return value

    return read


SEED, PORT = whole(0, 2**32 - 1), whole(0, 65535)
"""Types of a seed and of a port; port 0 takes a free one."""
TEMPERATURE = real(*TEMPERATURES, or_zero=True)
"""Type of a sampling temperature; 0 is greedy."""


def reports_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate the `main` of a command: an error of the project or the machine is printed, and its exit status returned."""

    @wraps(main)
    def run(*args: P.args, **options: P.kwargs) -> int:
        try:
            return main(*args, **options)
        except PosttrainError as error:
            return report_error(error)
        except OSError as error:
            return report_machine_fault(error)

    return run


def ends_with_ctrl_c(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate the `main` of a command that runs until Ctrl-C, SIGTERM, or the end of the `make` that started it.

    At Ctrl-C it ends with status 0, with the prompt on a new line.
    """

    @wraps(main)
    def run(*args: P.args, **options: P.kwargs) -> int:
        end_with_make(GRACE_SECONDS)
        try:
            return main(*args, **options)
        except KeyboardInterrupt:
            if sys.stdout.isatty():
                print()
            return 0

    return run


def report_error(error: PosttrainError) -> int:
    """Print an error as one paragraph on stderr and return its exit status."""
    print(f"error: {printable(redact(str(error)))}", file=sys.stderr)
    return error.exit_code


def report_machine_fault(error: OSError) -> int:
    """Print a full disk, a missing right or a limit as one paragraph and return the exit status. Raises any other error again."""
    fault = machine_fault(error)
    if fault is None:
        raise error
    return report_error(OrchestrationError(f"{fault}, then run again."))


def end_without_threads(error: RuntimeError) -> NoReturn:
    """End the command with one paragraph and exit status 2, for an error of threads that the system refuses. Raises any other error."""
    fault = machine_fault(error)
    if fault is None:
        raise error
    sys.exit(report_error(OrchestrationError(f"{fault}, then run again.")))


def print_text(text: str) -> None:
    """Print a text. A reader that has gone, as in `make status | head -1`, ends the output without an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
