"""The edge of every command: its parser, and errors as one paragraph with an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from pipelines.runtime.environment import machine_fault
from pipelines.runtime.redaction import printable, redact
from posttrain.errors import OrchestrationError, PosttrainError

P = ParamSpec("P")


def command_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the text of the command's module, as it is written. `name` is the command as a user types it."""
    return argparse.ArgumentParser(prog=name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


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
    """Decorate the `main` of a command that runs until Ctrl-C or SIGTERM: it ends with status 0, with the prompt on a new line."""

    @wraps(main)
    def run(*args: P.args, **options: P.kwargs) -> int:
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


def print_text(text: str) -> None:
    """Print a text. A reader that has gone, as in `make status | head -1`, ends the output without an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
